#include <arm_neon.h>

#define LK_ISA neon
#define LK_VECTOR_HEADER "vector_neon.h"
#include "variant.inc"
