#include <immintrin.h>

#define LK_ISA avx2
#define LK_VECTOR_HEADER "vector_avx2.h"
#include "variant.inc"
