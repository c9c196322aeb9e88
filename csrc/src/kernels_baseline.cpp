#define LK_ISA baseline
#define LK_VECTOR_HEADER "vector_baseline.h"
#include "variant.inc"
