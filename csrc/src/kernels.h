// What each instruction set variant offers to the interface; one table a variant.
#pragma once

#include "ladder_kernels.h"

namespace lk {

struct LinearCall {
  lk_nf4_matrix weight;
  lk_dtype dtype;
  int64_t M;
  const void* x;
  int64_t x_stride;
  const void* bias;
  const void* residual;
  int64_t residual_stride;
  void* out;
  int32_t threads;
};

struct Kernels {
  const char* isa;
  lk_status (*nf4_linear)(const LinearCall&);
  lk_status (*nf4_linear_transposed)(const LinearCall&);
};

extern const Kernels kernels_baseline;
#if defined(LK_HAVE_AVX2)
extern const Kernels kernels_avx2;
#endif
#if defined(LK_HAVE_AVX512)
extern const Kernels kernels_avx512;
#endif
#if defined(LK_HAVE_AVX512_BF16)
extern const Kernels kernels_avx512_bf16;
#endif

}  // namespace lk
