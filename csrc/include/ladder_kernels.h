/*
 * The C interface of ladder_kernels' native CPU library.
 *
 * Plain C types only, so that Python's ctypes (and any other language) can call it without knowing
 * a compiler's C++ conventions. Every function may be called from several threads at once.
 */
#ifndef LADDER_KERNELS_H
#define LADDER_KERNELS_H

#include <stdint.h>

#if defined(_WIN32)
#define LK_API __declspec(dllexport)
#else
#define LK_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised by one with every change of this file that an old caller would not survive. */
#define LK_ABI_VERSION 9

typedef enum {
  LK_OK = 0,
  LK_BAD_ARGUMENT = 1, /* a size, stride, dtype or blocksize that makes no sense */
  LK_OUT_OF_MEMORY = 2,
  LK_UNKNOWN_ISA = 3, /* lk_set_isa: no such variant, or this processor cannot run it */
  LK_NOT_FINITE = 4,  /* an input that must be finite holds NaN or infinity */
} lk_status;

typedef enum { LK_FLOAT32 = 0, LK_BFLOAT16 = 1, LK_FLOAT16 = 2 } lk_dtype;

/*
 * An NF4 matrix [rows, cols] as bitsandbytes stores it: row-major, two 4-bit indices a byte, the
 * even element in the high nibble; one scale for each `blocksize` consecutive elements.
 * Either `absmax` holds the scales, or `absmax_q8` and the three nested fields do:
 * scale[b] = round(nested_code[absmax_q8[b]] * nested_absmax[b / 256]) + *nested_offset.
 */
typedef struct {
  const uint8_t* packed;
  const float* absmax;
  const uint8_t* absmax_q8;
  const float* nested_absmax;
  const float* nested_code;
  const float* nested_offset;
  int64_t rows;
  int64_t cols;
  int64_t blocksize;
} lk_nf4_matrix;

/* A matrix [rows, cols] of floats, rows `stride` elements apart, elements of a row adjacent. */
typedef struct {
  const void* data;
  lk_dtype dtype;
  int64_t rows;
  int64_t cols;
  int64_t stride;
} lk_dense_matrix;

/* Elements from one batch entry, head and token to the next; those of a head are adjacent. */
typedef struct {
  int64_t batch;
  int64_t head;
  int64_t token;
} lk_strides;

/* What a rung reads of one layer, and its projection. */
typedef struct {
  lk_dense_matrix tap;  /* [T, D], any dtype */
  lk_dense_matrix down; /* [d, D] */
  void* ddown;          /* lk_rung_merge_backward: [d, D] contiguous, or NULL if not wanted */
} lk_rung_tap;

/* LK_ABI_VERSION of the library that was loaded. */
LK_API int32_t lk_abi_version(void);

/* Release that the library was built from, such as "0.1.0". */
LK_API const char* lk_version(void);

/*
 * Instruction set in use: "baseline", "avx2", "avx2_vnni", "avx512", "avx512_vnni", "avx512_bf16"
 * (with VNNI), "neon" or "neon_dotprod". Those with VNNI or dot products differ from those without
 * in the products of bytes only.
 */
LK_API const char* lk_isa(void);

/* Space-separated names of the variants that this library holds and this processor runs. */
LK_API const char* lk_isas(void);

/*
 * GCC's entry to a parallel region of OpenMP, GOMP_parallel, which LLVM's and Intel's runtimes have
 * too: body(data) on each of `threads` threads.
 */
typedef void (*lk_parallel_region)(void (*body)(void*), void* data, unsigned threads,
                                   unsigned flags);

/*
 * Run loops in the parallel regions of an OpenMP runtime that the process uses too, not in threads
 * of the library's own; NULL for those again. Threads of two runtimes get into each other's way:
 * those of OpenMP spin for a while after each region, in case another comes, and hold the cores
 * that others are woken for. A child of fork() uses threads of its own in any case.
 */
LK_API void lk_set_parallel_region(lk_parallel_region region);

/* Use one of lk_isas() from now on, for the whole process. Not while other calls are running. */
LK_API lk_status lk_set_isa(const char* name);

/*
 * out[m, n] = sum_k x[m, k] * W[n, k] (+ bias[n]) (+ residual[m, n]), rounded once.
 *
 *   W         rows = N, cols = K; dequantised to `dtype` (centroid * scale, rounded once)
 *   x         [M, K] of dtype, rows `x_stride` elements apart, elements of a row adjacent
 *   bias      [N] of dtype, or NULL
 *   residual  [M, N] of dtype, rows `residual_stride` elements apart, or NULL
 *   out       [M, N] of dtype, contiguous; may not overlap the inputs
 *   threads   how many threads may work, at least 1; the result does not depend on it
 */
LK_API lk_status lk_nf4_linear(const lk_nf4_matrix* weight, lk_dtype dtype, int64_t M,
                               const void* x, int64_t x_stride, const void* bias,
                               const void* residual, int64_t residual_stride, void* out,
                               int32_t threads);

/*
 * out[m, k] = sum_n grad[m, n] * W[n, k], rounded once: the gradient of lk_nf4_linear to x.
 *
 *   W         the rows of `weight`, and below them those of `below`, of as many columns, or NULL;
 * so that the gradients through two products of x are summed before they are rounded grad      [M,
 * N] of dtype, N the rows of both, rows `grad_stride` elements apart out       [M, K] of dtype,
 * contiguous; may not overlap grad
 */
LK_API lk_status lk_nf4_linear_transposed(const lk_nf4_matrix* weight, const lk_nf4_matrix* below,
                                          lk_dtype dtype, int64_t M, const void* grad,
                                          int64_t grad_stride, void* out, int32_t threads);

/*
 * out[m, n] = silu(sum_k x[m, k] * G[n, k]) * sum_k x[m, k] * U[n, k], rounded once, where
 * silu(z) = z / (1 + exp(-z)).
 *
 *   G, U      rows = N, cols = K; as W of lk_nf4_linear
 *   x         [M, K] of dtype, rows `x_stride` elements apart
 *   out       [M, N] of dtype, contiguous; may not overlap x
 */
LK_API lk_status lk_nf4_swiglu(const lk_nf4_matrix* gate, const lk_nf4_matrix* up, lk_dtype dtype,
                               int64_t M, const void* x, int64_t x_stride, void* out,
                               int32_t threads);

/*
 * The same as lk_nf4_linear and lk_nf4_swiglu in whole numbers, with x rounded to 8 bits, each row
 * in blocks of W's blocksize:
 *
 *   a[m, b] = max over k in b of |x[m, k]|,  q[m, k] = round(x[m, k] * (127 / a[m, b]))
 *   c[n, k] = round(127 * code of W[n, k])
 *   y[m, n] = (sum_b scale[n, b] * (a[m, b] / 127) * sum_{k in b} q[m, k] * c[n, k]) / 127
 *
 * Sums inside a block are exact, those of blocks float32. A row of x with NaN or infinity gives
 * NaN; a block so small that 127 / a is infinite counts as zeros. Blocks must begin with rows: cols
 * is a multiple of the blocksize, which is at least 32, and the same for G and U.
 */
LK_API lk_status lk_nf4_linear_int8(const lk_nf4_matrix* weight, lk_dtype dtype, int64_t M,
                                    const void* x, int64_t x_stride, const void* bias,
                                    const void* residual, int64_t residual_stride, void* out,
                                    int32_t threads);
LK_API lk_status lk_nf4_swiglu_int8(const lk_nf4_matrix* gate, const lk_nf4_matrix* up,
                                    lk_dtype dtype, int64_t M, const void* x, int64_t x_stride,
                                    void* out, int32_t threads);

/*
 * For i in [0, count), with t = tokens[i]:
 *
 *   z[v] = logit_scale * sum_d hidden[t, d] * head[v, d]
 *   l[v] = softcap * tanh(z[v] / softcap), or z[v]
 *
 *   lse[t] = logsumexp(l),   loss[t] = lse[t] - l[labels[t]],   grad[t] = d loss[t] / d hidden[t]
 *
 *   nf4_head, dense_head  rows = V, cols = D; one of the two, the other NULL. An NF4 head is
 *                         dequantised to dtype, a dense one may have another dtype.
 *   hidden                [T, D] of dtype, rows `hidden_stride` elements apart
 *   tokens                [count], which rows count, each in [0, T)
 *   labels                [T], in [0, V) where they count
 *   softcap               above 0; 0 for none
 *   loss, lse             [T] float32; only the rows that count are written
 *   grad                  [T, D] of dtype, rows `grad_stride` elements apart, as loss; or NULL
 */
LK_API lk_status lk_linear_cross_entropy(const lk_nf4_matrix* nf4_head,
                                         const lk_dense_matrix* dense_head, lk_dtype dtype,
                                         const void* hidden, int64_t hidden_stride,
                                         const int64_t* tokens, const int64_t* labels,
                                         int64_t count, float softcap, float logit_scale,
                                         float* loss, float* lse, void* grad, int64_t grad_stride,
                                         int32_t threads);

/*
 * Attention in which query s sees the keys first[b, s] to T - S + s:
 *
 *   out[b, s, h] = softmax(scale * q[b, h, s] @ keys^T) @ values
 *
 *   q         [batch, heads, S, head_dim] of dtype
 *   k, v      [batch, key_heads, T, head_dim] of dtype, T >= S; heads is a multiple of key_heads
 *   first     [batch, S], each in [0, T - S + s], or NULL for 0
 *   out       [batch, S, heads, head_dim] of dtype, contiguous; may not overlap the inputs
 *   lse       [batch, heads, S], the logarithm of each query's sum of exponentials; NULL if it is
 *             not wanted
 */
LK_API lk_status lk_ranged_attention(lk_dtype dtype, int64_t batch, int64_t heads,
                                     int64_t key_heads, int64_t S, int64_t T, int64_t head_dim,
                                     const void* q, const lk_strides* q_strides, const void* k,
                                     const lk_strides* k_strides, const void* v,
                                     const lk_strides* v_strides, const int64_t* first, float scale,
                                     void* out, float* lse, int32_t threads);

/*
 * The gradients of lk_ranged_attention's inputs, which are added to what dq, dk and dv hold.
 *
 *   grad      [batch, S, heads, head_dim] of dtype, contiguous: the gradient of out
 *   out, lse  the results of lk_ranged_attention
 *   dq        [batch, S, heads, head_dim] of float32, contiguous
 *   dk, dv    [batch, T, key_heads, head_dim] of float32, contiguous
 */
LK_API lk_status lk_ranged_attention_backward(
    lk_dtype dtype, int64_t batch, int64_t heads, int64_t key_heads, int64_t S, int64_t T,
    int64_t head_dim, const void* q, const lk_strides* q_strides, const void* k,
    const lk_strides* k_strides, const void* v, const lk_strides* v_strides, const int64_t* first,
    float scale, const void* grad, const void* out, const float* lse, float* dq, float* dk,
    float* dv, int32_t threads);

/*
 * Quantise a flat tensor to NF4, to the bits of bitsandbytes on a CPU.
 *
 *   weight    [count] of dtype
 *   blocksize a power of two, at least 32
 *   packed    [ceil(count / 2)]; a missing last element is zero
 *   absmax    [ceil(count / blocksize)], the largest magnitude of each block
 *
 * LK_NOT_FINITE if weight holds NaN or infinity; packed and absmax are then not to be used.
 */
LK_API lk_status lk_nf4_quantize(lk_dtype dtype, const void* weight, int64_t count,
                                 int64_t blocksize, uint8_t* packed, float* absmax,
                                 int32_t threads);

/*
 * Quantise scales to 8 bits (double quantisation): for each 256 of them the largest magnitude of
 * scale - offset, and for each scale the entry of `nearest` for (scale - offset) / that, where
 * [-1, 1] is cut into 65535 equal steps.
 *
 *   absmax        [blocks], finite
 *   offset        their mean, as the caller sums
 *   nearest       [65536], indices of the map's values that are nearest to the ends of the steps
 *   absmax_q8     [blocks]
 *   nested_absmax [ceil(blocks / 256)]
 */
LK_API lk_status lk_nf4_quantize_absmax(const float* absmax, int64_t blocks, float offset,
                                        const uint8_t* nearest, uint8_t* absmax_q8,
                                        float* nested_absmax, int32_t threads);

/* out[i] = element first + i of the flattened matrix, centroid * scale rounded once to dtype. */
LK_API lk_status lk_nf4_dequantize(const lk_nf4_matrix* weight, lk_dtype dtype, int64_t first,
                                   int64_t count, void* out, int32_t threads);

/*
 * out[m] = weight * round(x[m] * r_m),  r_m = 1 / sqrt(mean(x[m]^2) + eps), for each row m; with a
 * residual, x[m] + residual[m], rounded, takes the place of x[m] and is written to total.
 *
 *   x, residual   [rows, cols] of dtype, rows `*_stride` elements apart; residual may be NULL
 *   weight        [cols] of dtype, or NULL for none
 *   total, out    [rows, cols] of dtype, contiguous; total is NULL where residual is
 */
LK_API lk_status lk_rms_norm(lk_dtype dtype, int64_t rows, int64_t cols, const void* x,
                             int64_t x_stride, const void* residual, int64_t residual_stride,
                             const void* weight, float eps, void* total, void* out,
                             int32_t threads);

/*
 * The gradients of lk_rms_norm's out to its x (or x + residual) and weight:
 *
 *   dx[m] = r_m * (a - h * mean(a * h)),  dweight = sum_m grad[m] * h,  h = x[m] * r_m,
 *   a = grad[m] * weight, in float32
 *
 *   grad, x   [rows, cols] of dtype, rows `*_stride` elements apart
 *   dx        [rows, cols] of dtype, contiguous
 *   dweight   [cols] of dtype, or NULL where it is not wanted
 */
LK_API lk_status lk_rms_norm_backward(lk_dtype dtype, int64_t rows, int64_t cols, const void* grad,
                                      int64_t grad_stride, const void* x, int64_t x_stride,
                                      const void* weight, float eps, void* dx, void* dweight,
                                      int32_t threads);

/*
 * Rotary position embedding in place: channel i of each head turns with channel i + half by the
 * angle whose cosine and sine the tables hold; each product and sum is rounded to dtype.
 *
 *   x          [batch, length, heads, 2 * half] of dtype
 *   cos, sin   [batch, length, half] of dtype, one for all heads; `table_strides` holds for both
 */
LK_API lk_status lk_rotary(lk_dtype dtype, int64_t batch, int64_t length, int64_t heads,
                           int64_t half, void* x, const lk_strides* strides, const void* cos,
                           const void* sin, const lk_strides* table_strides, int32_t threads);

/*
 * out[t] = g * side[t] + (1 - g) * z[t], or side[t] + z[t] without a gate, rounded once, with
 *
 *   z[t] = sum_j n(tap_j[t]) @ down_j^T,   n(x) = x / sqrt(mean(x^2) + eps)
 *
 *   side    [T, d] of dtype, rows `side_stride` elements apart
 *   taps    `count` of them; each may have another D; downs are of dtype
 *   gate    [gates] of dtype, or NULL; gates is 1 or d
 *   out     [T, d] of dtype, contiguous; may not overlap the inputs
 */
LK_API lk_status lk_rung_merge(lk_dtype dtype, int64_t T, int64_t d, const void* side,
                               int64_t side_stride, const lk_rung_tap* taps, int64_t count,
                               const void* gate, int64_t gates, float eps, void* out,
                               int32_t threads);

/*
 * The gradients of lk_rung_merge from that of its out. With G_j = grad^T @ n(tap_j):
 *
 *   dside = g * grad,   ddown_j = (1 - g) * G_j,
 *   dgate = sum_t grad[t] * side[t] - sum_j sum_k G_j[:, k] * down_j[:, k], summed over the
 *           channels where there is one gate for all
 *
 *   grad            [T, d] of dtype, rows `grad_stride` elements apart
 *   dside, dgate    [T, d] and [gates] of dtype, contiguous; NULL where not wanted
 */
LK_API lk_status lk_rung_merge_backward(lk_dtype dtype, int64_t T, int64_t d, const void* grad,
                                        int64_t grad_stride, const void* side, int64_t side_stride,
                                        const lk_rung_tap* taps, int64_t count, const void* gate,
                                        int64_t gates, float eps, void* dside, void* dgate,
                                        int32_t threads);

/*
 * The products of low-rank adapters, each with a matrix of few rows. What is wide is of dtype, all
 * else float32 and contiguous, and so are the sums.
 *
 *   lk_low_rank_narrow:    out = x @ p^T        [rows, rank]
 *   lk_low_rank_widen:     out = narrow @ p     [rows, cols] of dtype, contiguous, rounded once;
 *                          with `add`, what out holds is added before that
 *   lk_low_rank_gradient:  out = narrow^T @ x   [rank, cols]
 *
 *   x         [rows, cols] of dtype, rows `x_stride` elements apart
 *   narrow    [rows, rank]
 *   p         [rank, cols]
 */
LK_API lk_status lk_low_rank_narrow(lk_dtype dtype, int64_t rows, int64_t cols, int64_t rank,
                                    const void* x, int64_t x_stride, const float* p, float* out,
                                    int32_t threads);
LK_API lk_status lk_low_rank_widen(lk_dtype dtype, int64_t rows, int64_t cols, int64_t rank,
                                   const float* narrow, const float* p, int32_t add, void* out,
                                   int32_t threads);
LK_API lk_status lk_low_rank_gradient(lk_dtype dtype, int64_t rows, int64_t cols, int64_t rank,
                                      const float* narrow, const void* x, int64_t x_stride,
                                      float* out, int32_t threads);

/*
 * What joins the two halves of a gated MLP, in place: a becomes silu(a) * b, rounded once, with
 * silu(a) = a / (1 + exp(-a)).
 *
 *   a, b   [count] of dtype, contiguous; may not overlap
 */
LK_API lk_status lk_swiglu(lk_dtype dtype, int64_t count, void* a, const void* b, int32_t threads);

/*
 * The gradients of that, in place, from the a and b that it was given and the gradient f of what it
 * made: a becomes its gradient, b becomes its own, and f becomes silu(a) * b once more.
 *
 *   a, b, f   [count] of dtype, contiguous; may not overlap
 */
LK_API lk_status lk_swiglu_backward(lk_dtype dtype, int64_t count, void* a, void* b, void* f,
                                    int32_t threads);

#ifdef __cplusplus
}
#endif

#endif /* LADDER_KERNELS_H */
