// The C interface: checks of arguments, and which instruction set variant runs.
#include <atomic>
#include <cstring>
#include <string>
#include <vector>

#if defined(LK_HAVE_AVX2)
#include <cpuid.h>
#endif
#if defined(LK_HAVE_NEON_DOTPROD) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "kernels.h"
#include "thread_pool.h"

namespace {

#if defined(LK_HAVE_AVX2_VNNI)
// Not every compiler that has AVX-VNNI knows it by a name.
bool has_avx_vnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 4 & 1) != 0;
}
#endif

#if defined(LK_HAVE_NEON_DOTPROD)
bool has_dot_product() {
#if defined(__APPLE__)
  return true;  // part of every processor of Apple's with macOS
#elif defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
  return false;
#endif
}
#endif

// Each variant is compiled with exactly the extensions that are asked for here; best first.
std::vector<lk::Kernels> runnable() {
  std::vector<lk::Kernels> found;
#if defined(LK_HAVE_AVX2)
  __builtin_cpu_init();
  unsigned eax, ebx, ecx = 0, edx;  // not every Clang knows "f16c" as a name
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C) != 0;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
#endif
#if defined(LK_HAVE_AVX512)
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  const bool avx512_vnni = avx512 && __builtin_cpu_supports("avx512vnni");
#endif
#if defined(LK_HAVE_AVX512_BF16)
  if (avx512_vnni && __builtin_cpu_supports("avx512bf16")) {
    found.push_back(lk::avx512_bf16::kernels);
  }
#endif
#if defined(LK_HAVE_AVX512_VNNI)
  if (avx512_vnni) found.push_back(lk::avx512_vnni::over(lk::avx512::kernels));
#endif
#if defined(LK_HAVE_AVX512)
  if (avx512) found.push_back(lk::avx512::kernels);
#endif
#if defined(LK_HAVE_AVX2_VNNI)
  if (avx2 && has_avx_vnni()) found.push_back(lk::avx2_vnni::over(lk::avx2::kernels));
#endif
#if defined(LK_HAVE_AVX2)
  if (avx2) found.push_back(lk::avx2::kernels);
#endif
#if defined(LK_HAVE_NEON_DOTPROD)
  if (has_dot_product()) found.push_back(lk::neon_dotprod::over(lk::neon::kernels));
#endif
#if defined(LK_HAVE_NEON)
  found.push_back(lk::neon::kernels);  // part of every AArch64
#endif
  found.push_back(lk::baseline::kernels);
  return found;
}

const std::vector<lk::Kernels>& variants() {
  static const std::vector<lk::Kernels> found = runnable();
  return found;
}

std::atomic<const lk::Kernels*>& chosen() {
  static std::atomic<const lk::Kernels*> kernels{&variants().front()};
  return kernels;
}

bool is_power_of_two(int64_t value) { return value > 0 && (value & (value - 1)) == 0; }

bool is_valid(lk_dtype dtype) {
  return dtype == LK_FLOAT32 || dtype == LK_BFLOAT16 || dtype == LK_FLOAT16;
}

bool is_valid(const lk_dense_matrix* weight) {
  return weight->rows >= 0 && weight->cols >= 0 && is_valid(weight->dtype) &&
         (weight->rows <= 1 || weight->stride >= weight->cols) &&
         (weight->data != nullptr || weight->rows == 0 || weight->cols == 0);
}

bool is_valid(const lk_nf4_matrix* weight) {
  if (weight == nullptr || weight->rows < 0 || weight->cols < 0) return false;
  if (weight->blocksize < 16 || !is_power_of_two(weight->blocksize)) return false;
  if (weight->rows == 0 || weight->cols == 0) return true;
  if (weight->packed == nullptr) return false;
  const bool nested = weight->absmax_q8 != nullptr && weight->nested_absmax != nullptr &&
                      weight->nested_code != nullptr && weight->nested_offset != nullptr;
  return (weight->absmax != nullptr) != nested;
}

bool is_valid(lk_dtype dtype, int64_t T, int64_t d, const lk_rung_tap* taps, int64_t count,
              const void* gate, int64_t gates) {
  if (!is_valid(dtype) || T < 0 || d < 0 || count < 1 || taps == nullptr) return false;
  if (gate != nullptr && gates != 1 && gates != d) return false;
  for (int64_t j = 0; j < count; ++j) {
    const lk_dense_matrix &tap = taps[j].tap, &down = taps[j].down;
    if (!is_valid(&tap) || !is_valid(&down) || tap.rows != T || down.rows != d) return false;
    if (tap.cols != down.cols || down.dtype != dtype) return false;
  }
  return true;
}

bool is_valid(const lk::AttentionInputs& inputs, int32_t threads) {
  if (!is_valid(inputs.dtype) || inputs.batch < 0 || threads < 1) return false;
  if (inputs.S < 0 || inputs.T < inputs.S || inputs.head_dim < 1) return false;
  if (inputs.heads < 1 || inputs.key_heads < 1 || inputs.heads % inputs.key_heads != 0) {
    return false;
  }
  if (inputs.heads / inputs.key_heads > 512) return false;  // more than a task can take
  if (inputs.batch == 0 || inputs.S == 0) return true;
  return inputs.q != nullptr && inputs.k != nullptr && inputs.v != nullptr;
}

bool is_low_rank(lk_dtype dtype, int64_t rows, int64_t cols, int64_t rank, int32_t threads) {
  return is_valid(dtype) && rows >= 0 && cols >= 0 && rank >= 0 && threads >= 1;
}

// What sums in whole numbers need: blocks that begin with rows.
bool has_whole_blocks(const lk_nf4_matrix* weight) {
  return weight->blocksize >= 32 && weight->cols % weight->blocksize == 0;
}

}  // namespace

int32_t lk_abi_version(void) { return LK_ABI_VERSION; }

const char* lk_version(void) { return LK_VERSION; }

const char* lk_isa(void) { return chosen().load()->isa; }

const char* lk_isas(void) {
  static const std::string names = [] {
    std::string all;
    for (const lk::Kernels& variant : variants()) {
      if (!all.empty()) all += ' ';
      all += variant.isa;
    }
    return all;
  }();
  return names.c_str();
}

lk_status lk_set_isa(const char* name) {
  if (name == nullptr) return LK_BAD_ARGUMENT;
  for (const lk::Kernels& variant : variants()) {
    if (std::strcmp(variant.isa, name) == 0) {
      chosen().store(&variant);
      return LK_OK;
    }
  }
  return LK_UNKNOWN_ISA;
}

void lk_set_parallel_region(lk_parallel_region region) { lk::set_parallel_region(region); }

lk_status lk_nf4_linear(const lk_nf4_matrix* weight, lk_dtype dtype, int64_t M, const void* x,
                        int64_t x_stride, const void* bias, const void* residual,
                        int64_t residual_stride, void* out, int32_t threads) {
  if (!is_valid(weight) || !is_valid(dtype) || M < 0 || threads < 1) return LK_BAD_ARGUMENT;
  if (M == 0 || weight->rows == 0) return LK_OK;
  const bool empty = weight->cols == 0;
  if (out == nullptr || (!empty && x == nullptr)) return LK_BAD_ARGUMENT;
  if (M > 1 && !empty && x_stride < weight->cols) return LK_BAD_ARGUMENT;
  if (M > 1 && residual != nullptr && residual_stride < weight->rows) return LK_BAD_ARGUMENT;
  return chosen().load()->nf4_linear(
      {*weight, dtype, M, x, x_stride, bias, residual, residual_stride, out, threads});
}

lk_status lk_nf4_linear_transposed(const lk_nf4_matrix* weight, const lk_nf4_matrix* below,
                                   lk_dtype dtype, int64_t M, const void* grad, int64_t grad_stride,
                                   void* out, int32_t threads) {
  if (!is_valid(weight) || !is_valid(dtype) || M < 0 || threads < 1) return LK_BAD_ARGUMENT;
  if (below != nullptr && (!is_valid(below) || below->cols != weight->cols)) return LK_BAD_ARGUMENT;
  if (M == 0 || weight->cols == 0) return LK_OK;
  const int64_t rows = weight->rows + (below != nullptr ? below->rows : 0);
  if (out == nullptr || (rows > 0 && grad == nullptr)) return LK_BAD_ARGUMENT;
  if (M > 1 && grad_stride < rows) return LK_BAD_ARGUMENT;
  return chosen().load()->nf4_linear_transposed(
      {*weight, below, dtype, M, grad, grad_stride, out, threads});
}

lk_status lk_nf4_swiglu(const lk_nf4_matrix* gate, const lk_nf4_matrix* up, lk_dtype dtype,
                        int64_t M, const void* x, int64_t x_stride, void* out, int32_t threads) {
  if (!is_valid(gate) || !is_valid(up) || !is_valid(dtype) || M < 0 || threads < 1) {
    return LK_BAD_ARGUMENT;
  }
  if (gate->rows != up->rows || gate->cols != up->cols) return LK_BAD_ARGUMENT;
  if (M == 0 || gate->rows == 0) return LK_OK;
  const bool empty = gate->cols == 0;
  if (out == nullptr || (!empty && x == nullptr)) return LK_BAD_ARGUMENT;
  if (M > 1 && !empty && x_stride < gate->cols) return LK_BAD_ARGUMENT;
  return chosen().load()->nf4_swiglu({*gate, *up, dtype, M, x, x_stride, out, threads});
}

lk_status lk_nf4_linear_int8(const lk_nf4_matrix* weight, lk_dtype dtype, int64_t M, const void* x,
                             int64_t x_stride, const void* bias, const void* residual,
                             int64_t residual_stride, void* out, int32_t threads) {
  if (!is_valid(weight) || !has_whole_blocks(weight) || !is_valid(dtype) || M < 0 || threads < 1) {
    return LK_BAD_ARGUMENT;
  }
  if (M == 0 || weight->rows == 0) return LK_OK;
  const bool empty = weight->cols == 0;
  if (out == nullptr || (!empty && x == nullptr)) return LK_BAD_ARGUMENT;
  if (M > 1 && !empty && x_stride < weight->cols) return LK_BAD_ARGUMENT;
  if (M > 1 && residual != nullptr && residual_stride < weight->rows) return LK_BAD_ARGUMENT;
  return chosen().load()->nf4_linear_int8(
      {*weight, dtype, M, x, x_stride, bias, residual, residual_stride, out, threads});
}

lk_status lk_nf4_swiglu_int8(const lk_nf4_matrix* gate, const lk_nf4_matrix* up, lk_dtype dtype,
                             int64_t M, const void* x, int64_t x_stride, void* out,
                             int32_t threads) {
  if (!is_valid(gate) || !is_valid(up) || !is_valid(dtype) || M < 0 || threads < 1) {
    return LK_BAD_ARGUMENT;
  }
  if (gate->rows != up->rows || gate->cols != up->cols) return LK_BAD_ARGUMENT;
  if (!has_whole_blocks(gate) || gate->blocksize != up->blocksize) return LK_BAD_ARGUMENT;
  if (M == 0 || gate->rows == 0) return LK_OK;
  const bool empty = gate->cols == 0;
  if (out == nullptr || (!empty && x == nullptr)) return LK_BAD_ARGUMENT;
  if (M > 1 && !empty && x_stride < gate->cols) return LK_BAD_ARGUMENT;
  return chosen().load()->nf4_swiglu_int8({*gate, *up, dtype, M, x, x_stride, out, threads});
}

lk_status lk_linear_cross_entropy(const lk_nf4_matrix* nf4_head, const lk_dense_matrix* dense_head,
                                  lk_dtype dtype, const void* hidden, int64_t hidden_stride,
                                  const int64_t* tokens, const int64_t* labels, int64_t count,
                                  float softcap, float logit_scale, float* loss, float* lse,
                                  void* grad, int64_t grad_stride, int32_t threads) {
  if ((nf4_head != nullptr) == (dense_head != nullptr)) return LK_BAD_ARGUMENT;
  if (nf4_head != nullptr ? !is_valid(nf4_head) : !is_valid(dense_head)) return LK_BAD_ARGUMENT;
  if (!is_valid(dtype) || count < 0 || threads < 1 || !(softcap >= 0)) return LK_BAD_ARGUMENT;
  if (count == 0) return LK_OK;
  const int64_t rows = nf4_head != nullptr ? nf4_head->rows : dense_head->rows;
  const int64_t cols = nf4_head != nullptr ? nf4_head->cols : dense_head->cols;
  if (rows == 0 || tokens == nullptr || labels == nullptr) return LK_BAD_ARGUMENT;
  if (loss == nullptr || lse == nullptr || (cols > 0 && hidden == nullptr)) return LK_BAD_ARGUMENT;
  if (hidden_stride < 0 || grad_stride < 0) return LK_BAD_ARGUMENT;
  return chosen().load()->linear_cross_entropy({nf4_head, dense_head, dtype, hidden, hidden_stride,
                                                tokens, labels, count, softcap, logit_scale, loss,
                                                lse, grad, grad_stride, threads});
}

lk_status lk_ranged_attention(lk_dtype dtype, int64_t batch, int64_t heads, int64_t key_heads,
                              int64_t S, int64_t T, int64_t head_dim, const void* q,
                              const lk_strides* q_strides, const void* k,
                              const lk_strides* k_strides, const void* v,
                              const lk_strides* v_strides, const int64_t* first, float scale,
                              void* out, float* lse, int32_t threads) {
  if (q_strides == nullptr || k_strides == nullptr || v_strides == nullptr) return LK_BAD_ARGUMENT;
  const lk::AttentionInputs inputs{dtype,      batch,    heads,      key_heads,  S,
                                   T,          head_dim, q,          *q_strides, k,
                                   *k_strides, v,        *v_strides, first,      scale};
  if (!is_valid(inputs, threads)) return LK_BAD_ARGUMENT;
  if (batch == 0 || S == 0) return LK_OK;
  if (out == nullptr) return LK_BAD_ARGUMENT;
  return chosen().load()->ranged_attention({inputs, out, lse, threads});
}

lk_status lk_ranged_attention_backward(lk_dtype dtype, int64_t batch, int64_t heads,
                                       int64_t key_heads, int64_t S, int64_t T, int64_t head_dim,
                                       const void* q, const lk_strides* q_strides, const void* k,
                                       const lk_strides* k_strides, const void* v,
                                       const lk_strides* v_strides, const int64_t* first,
                                       float scale, const void* grad, const void* out,
                                       const float* lse, float* dq, float* dk, float* dv,
                                       int32_t threads) {
  if (q_strides == nullptr || k_strides == nullptr || v_strides == nullptr) return LK_BAD_ARGUMENT;
  const lk::AttentionInputs inputs{dtype,      batch,    heads,      key_heads,  S,
                                   T,          head_dim, q,          *q_strides, k,
                                   *k_strides, v,        *v_strides, first,      scale};
  if (!is_valid(inputs, threads)) return LK_BAD_ARGUMENT;
  if (batch == 0 || S == 0) return LK_OK;
  if (grad == nullptr || out == nullptr || lse == nullptr) return LK_BAD_ARGUMENT;
  if (dq == nullptr || dk == nullptr || dv == nullptr) return LK_BAD_ARGUMENT;
  return chosen().load()->ranged_attention_backward({inputs, grad, out, lse, dq, dk, dv, threads});
}

lk_status lk_nf4_quantize(lk_dtype dtype, const void* weight, int64_t count, int64_t blocksize,
                          uint8_t* packed, float* absmax, int32_t threads) {
  if (!is_valid(dtype) || count < 0 || threads < 1) return LK_BAD_ARGUMENT;
  if (blocksize < 32 || !is_power_of_two(blocksize)) return LK_BAD_ARGUMENT;
  if (count == 0) return LK_OK;
  if (weight == nullptr || packed == nullptr || absmax == nullptr) return LK_BAD_ARGUMENT;
  return chosen().load()->nf4_quantize({dtype, weight, count, blocksize, packed, absmax, threads});
}

lk_status lk_nf4_quantize_absmax(const float* absmax, int64_t blocks, float offset,
                                 const uint8_t* nearest, uint8_t* absmax_q8, float* nested_absmax,
                                 int32_t threads) {
  if (blocks < 0 || threads < 1) return LK_BAD_ARGUMENT;
  if (blocks == 0) return LK_OK;
  if (absmax == nullptr || nearest == nullptr || absmax_q8 == nullptr || nested_absmax == nullptr) {
    return LK_BAD_ARGUMENT;
  }
  return chosen().load()->nf4_quantize_absmax(
      {absmax, blocks, offset, nearest, absmax_q8, nested_absmax, threads});
}

lk_status lk_nf4_dequantize(const lk_nf4_matrix* weight, lk_dtype dtype, int64_t first,
                            int64_t count, void* out, int32_t threads) {
  if (!is_valid(weight) || !is_valid(dtype) || threads < 1) return LK_BAD_ARGUMENT;
  if (first < 0 || count < 0 || count > weight->rows * weight->cols - first) return LK_BAD_ARGUMENT;
  if (count == 0) return LK_OK;
  if (out == nullptr) return LK_BAD_ARGUMENT;
  return chosen().load()->nf4_dequantize({*weight, dtype, first, count, out, threads});
}

lk_status lk_rms_norm(lk_dtype dtype, int64_t rows, int64_t cols, const void* x, int64_t x_stride,
                      const void* residual, int64_t residual_stride, const void* weight, float eps,
                      void* total, void* out, int32_t threads) {
  if (!is_valid(dtype) || rows < 0 || cols < 0 || threads < 1) return LK_BAD_ARGUMENT;
  if (rows == 0 || cols == 0) return LK_OK;
  if (x == nullptr || out == nullptr) return LK_BAD_ARGUMENT;
  if ((residual == nullptr) != (total == nullptr)) return LK_BAD_ARGUMENT;
  return chosen().load()->rms_norm({dtype, rows, cols, x, x_stride, residual, residual_stride,
                                    weight, eps, total, out, threads});
}

lk_status lk_rms_norm_backward(lk_dtype dtype, int64_t rows, int64_t cols, const void* grad,
                               int64_t grad_stride, const void* x, int64_t x_stride,
                               const void* weight, float eps, void* dx, void* dweight,
                               int32_t threads) {
  if (!is_valid(dtype) || rows < 0 || cols < 0 || threads < 1) return LK_BAD_ARGUMENT;
  if (cols == 0) return LK_OK;
  if (rows > 0 && (grad == nullptr || x == nullptr || dx == nullptr)) return LK_BAD_ARGUMENT;
  return chosen().load()->rms_norm_backward(
      {dtype, rows, cols, grad, grad_stride, x, x_stride, weight, eps, dx, dweight, threads});
}

lk_status lk_rotary(lk_dtype dtype, int64_t batch, int64_t length, int64_t heads, int64_t half,
                    void* x, const lk_strides* strides, const void* cos, const void* sin,
                    const lk_strides* table_strides, int32_t threads) {
  if (!is_valid(dtype) || batch < 0 || length < 0 || heads < 0 || half < 0 || threads < 1) {
    return LK_BAD_ARGUMENT;
  }
  if (batch == 0 || length == 0 || heads == 0 || half == 0) return LK_OK;
  if (x == nullptr || cos == nullptr || sin == nullptr) return LK_BAD_ARGUMENT;
  if (strides == nullptr || table_strides == nullptr) return LK_BAD_ARGUMENT;
  return chosen().load()->rotary(
      {dtype, batch, length, heads, half, x, *strides, cos, sin, *table_strides, threads});
}

lk_status lk_rung_merge(lk_dtype dtype, int64_t T, int64_t d, const void* side, int64_t side_stride,
                        const lk_rung_tap* taps, int64_t count, const void* gate, int64_t gates,
                        float eps, void* out, int32_t threads) {
  if (!is_valid(dtype, T, d, taps, count, gate, gates) || threads < 1) return LK_BAD_ARGUMENT;
  if (T == 0 || d == 0) return LK_OK;
  if (side == nullptr || out == nullptr) return LK_BAD_ARGUMENT;
  return chosen().load()->rung_merge(
      {dtype, T, d, side, side_stride, taps, count, gate, gates, eps, out, threads});
}

lk_status lk_rung_merge_backward(lk_dtype dtype, int64_t T, int64_t d, const void* grad,
                                 int64_t grad_stride, const void* side, int64_t side_stride,
                                 const lk_rung_tap* taps, int64_t count, const void* gate,
                                 int64_t gates, float eps, void* dside, void* dgate,
                                 int32_t threads) {
  if (!is_valid(dtype, T, d, taps, count, gate, gates) || threads < 1) return LK_BAD_ARGUMENT;
  if (dgate != nullptr && gate == nullptr) return LK_BAD_ARGUMENT;
  if (T > 0 && d > 0 && (grad == nullptr || side == nullptr)) return LK_BAD_ARGUMENT;
  return chosen().load()->rung_merge_backward({dtype, T, d, grad, grad_stride, side, side_stride,
                                               taps, count, gate, gates, eps, dside, dgate,
                                               threads});
}

lk_status lk_low_rank_narrow(lk_dtype dtype, int64_t rows, int64_t cols, int64_t rank,
                             const void* x, int64_t x_stride, const float* p, float* out,
                             int32_t threads) {
  if (!is_low_rank(dtype, rows, cols, rank, threads)) return LK_BAD_ARGUMENT;
  if (rows == 0 || rank == 0) return LK_OK;
  if (out == nullptr || (cols > 0 && (x == nullptr || p == nullptr))) return LK_BAD_ARGUMENT;
  if (rows > 1 && x_stride < cols) return LK_BAD_ARGUMENT;
  return chosen().load()->low_rank_narrow(
      {dtype, rows, cols, rank, x, x_stride, nullptr, p, false, out, threads});
}

lk_status lk_low_rank_widen(lk_dtype dtype, int64_t rows, int64_t cols, int64_t rank,
                            const float* narrow, const float* p, int32_t add, void* out,
                            int32_t threads) {
  if (!is_low_rank(dtype, rows, cols, rank, threads)) return LK_BAD_ARGUMENT;
  if (rows == 0 || cols == 0) return LK_OK;
  if (out == nullptr || (rank > 0 && (narrow == nullptr || p == nullptr))) return LK_BAD_ARGUMENT;
  return chosen().load()->low_rank_widen(
      {dtype, rows, cols, rank, nullptr, 0, narrow, p, add != 0, out, threads});
}

lk_status lk_low_rank_gradient(lk_dtype dtype, int64_t rows, int64_t cols, int64_t rank,
                               const float* narrow, const void* x, int64_t x_stride, float* out,
                               int32_t threads) {
  if (!is_low_rank(dtype, rows, cols, rank, threads)) return LK_BAD_ARGUMENT;
  if (cols == 0 || rank == 0) return LK_OK;
  if (out == nullptr || (rows > 0 && (x == nullptr || narrow == nullptr))) return LK_BAD_ARGUMENT;
  if (rows > 1 && x_stride < cols) return LK_BAD_ARGUMENT;
  return chosen().load()->low_rank_gradient(
      {dtype, rows, cols, rank, x, x_stride, narrow, nullptr, false, out, threads});
}

lk_status lk_swiglu(lk_dtype dtype, int64_t count, void* a, const void* b, int32_t threads) {
  if (!is_valid(dtype) || count < 0 || threads < 1) return LK_BAD_ARGUMENT;
  if (count == 0) return LK_OK;
  if (a == nullptr || b == nullptr) return LK_BAD_ARGUMENT;
  return chosen().load()->swiglu({dtype, count, a, b, threads});
}

lk_status lk_swiglu_backward(lk_dtype dtype, int64_t count, void* a, void* b, void* f,
                             int32_t threads) {
  if (!is_valid(dtype) || count < 0 || threads < 1) return LK_BAD_ARGUMENT;
  if (count == 0) return LK_OK;
  if (a == nullptr || b == nullptr || f == nullptr) return LK_BAD_ARGUMENT;
  return chosen().load()->swiglu_backward({dtype, count, a, b, f, threads});
}
