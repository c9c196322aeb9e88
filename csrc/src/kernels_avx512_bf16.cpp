#include <immintrin.h>

#define LK_ISA avx512_bf16
#define LK_VECTOR_HEADER "vector_avx512.h"
#include "variant.inc"
