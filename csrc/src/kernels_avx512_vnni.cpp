#include <immintrin.h>

#define LK_BYTES_ONLY
#define LK_ISA avx512_vnni
#define LK_VECTOR_HEADER "vector_avx512.h"
#include "variant.inc"
