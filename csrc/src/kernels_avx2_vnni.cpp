#include <immintrin.h>

#define LK_BYTES_ONLY
#define LK_ISA avx2_vnni
#define LK_VECTOR_HEADER "vector_avx2.h"
#include "variant.inc"
