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
#define LK_ABI_VERSION 4

typedef enum {
  LK_OK = 0,
  LK_BAD_ARGUMENT = 1, /* a size, stride, dtype or blocksize that makes no sense */
  LK_OUT_OF_MEMORY = 2,
  LK_UNKNOWN_ISA = 3, /* lk_set_isa: no such variant, or this processor cannot run it */
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

/* LK_ABI_VERSION of the library that was loaded. */
LK_API int32_t lk_abi_version(void);

/* Release that the library was built from, such as "0.1.0". */
LK_API const char* lk_version(void);

/* Instruction set in use: "baseline", "avx2", "avx512", "avx512_bf16" or "neon". */
LK_API const char* lk_isa(void);

/* Space-separated names of the variants that this library holds and this processor runs. */
LK_API const char* lk_isas(void);

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
 *   grad      [M, N] of dtype, rows `grad_stride` elements apart
 *   out       [M, K] of dtype, contiguous; may not overlap grad
 */
LK_API lk_status lk_nf4_linear_transposed(const lk_nf4_matrix* weight, lk_dtype dtype, int64_t M,
                                          const void* grad, int64_t grad_stride, void* out,
                                          int32_t threads);

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
 * For i in [0, count), with t = tokens[i]:
 *
 *   z[v]    = logit_scale * sum_d hidden[t, d] * head[v, d],   l = softcap * tanh(z / softcap), or
 * z lse[t]  = logsumexp(l) loss[t] = lse[t] - l[labels[t]] grad[t] = d loss[t] / d hidden[t]
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
 */
LK_API lk_status lk_ranged_attention(lk_dtype dtype, int64_t batch, int64_t heads,
                                     int64_t key_heads, int64_t S, int64_t T, int64_t head_dim,
                                     const void* q, const lk_strides* q_strides, const void* k,
                                     const lk_strides* k_strides, const void* v,
                                     const lk_strides* v_strides, const int64_t* first, float scale,
                                     void* out, int32_t threads);

#ifdef __cplusplus
}
#endif

#endif /* LADDER_KERNELS_H */
