#define LK_ISA baseline
#define LK_VECTOR_HEADER "vector_baseline.h"
#include "nf4_linear.inc"

namespace lk {
const Kernels kernels_baseline{"baseline", baseline::nf4_linear, baseline::nf4_linear_transposed};
}  // namespace lk
