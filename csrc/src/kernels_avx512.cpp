#include <immintrin.h>

#define LK_ISA avx512
#define LK_VECTOR_HEADER "vector_avx512.h"
#include "variant.inc"
