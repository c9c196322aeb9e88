#include <arm_neon.h>

#define LK_BYTES_ONLY
#define LK_ISA neon_dotprod
#define LK_VECTOR_HEADER "vector_neon.h"
#include "variant.inc"
