#include <immintrin.h>

#define LK_ISA avx512_bf16
#define LK_VECTOR_HEADER "vector_avx512.h"
#include "nf4_linear.inc"

namespace lk {
const Kernels kernels_avx512_bf16{"avx512_bf16", avx512_bf16::nf4_linear,
                                  avx512_bf16::nf4_linear_transposed};
}  // namespace lk
