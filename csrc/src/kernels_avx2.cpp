#include <immintrin.h>

#define LK_ISA avx2
#define LK_VECTOR_HEADER "vector_avx2.h"
#include "nf4_linear.inc"

namespace lk {
const Kernels kernels_avx2{"avx2", avx2::nf4_linear, avx2::nf4_linear_transposed};
}  // namespace lk
