// Sixteen floats at a time: AVX-512 F, BW, VL, DQ; and BF16 where the variant is compiled with it.

struct V {
  using F = __m512;
  using Table = __m512;  // sixteen values, one for each 4-bit index

  static constexpr int kWidth = 16;
  static constexpr int kTileRows = 14;  // 14 x 2 sums, 2 weights, 1 activation: 31 of 32 registers
  static constexpr int kTileVectors = 2;
  static constexpr int kDotSums = 24;    // sums of a few rows' products in registers at once
  static constexpr int kDotWeights = 4;  // rows of W at once
  static constexpr int kDotRows = 6;     // rows of x that one reading of the weights serves

  // kWidth numbers, each of which is wanted in all lanes.
  using Numbers = const float*;
  static Numbers numbers(const float* from) { return from; }
  static F spread(Numbers from, int i) { return set1(from[i]); }

  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float value) { return _mm512_set1_ps(value); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F subtract(F a, F b) { return _mm512_sub_ps(a, b); }
  static F multiply(F a, F b) { return _mm512_mul_ps(a, b); }
  static F divide(F a, F b) { return _mm512_div_ps(a, b); }
  static F negate(F a) { return _mm512_sub_ps(_mm512_setzero_ps(), a); }
  // The second operand where either is NaN.
  static F minimum(F a, F b) { return _mm512_min_ps(a, b); }
  static F maximum(F a, F b) { return _mm512_max_ps(a, b); }
  static F nearest(F a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static F times_power_of_two(F a, F n) { return _mm512_scalef_ps(a, n); }
  static F multiply_add(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(F a) { return _mm512_reduce_add_ps(a); }

  template <lk_dtype DT>
  static F load(const void* base, int64_t index) {
    if constexpr (DT == LK_FLOAT32) {
      return _mm512_loadu_ps(static_cast<const float*>(base) + index);
    } else {
      const void* at = static_cast<const uint16_t*>(base) + index;
      const __m256i halves = _mm256_loadu_si256(static_cast<const __m256i*>(at));
      if constexpr (DT == LK_FLOAT16) return _mm512_cvtph_ps(halves);
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
  }

  static constexpr bool kHasMasks = true;

  // The first n < 16 lanes, the rest zero; touches nothing beyond them.
  template <lk_dtype DT>
  static F load_first(const void* base, int64_t index, int64_t n) {
    const __mmask16 lanes = static_cast<__mmask16>((1u << n) - 1);
    if constexpr (DT == LK_FLOAT32) {
      return _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(base) + index);
    } else {
      const void* at = static_cast<const uint16_t*>(base) + index;
      const __m256i halves = _mm256_maskz_loadu_epi16(lanes, at);
      if constexpr (DT == LK_FLOAT16) return _mm512_cvtph_ps(halves);
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
  }

  template <lk_dtype DT>
  static void store_first(void* base, int64_t index, int64_t n, F value) {
    const __mmask16 lanes = static_cast<__mmask16>((1u << n) - 1);
    if constexpr (DT == LK_FLOAT32) {
      _mm512_mask_storeu_ps(static_cast<float*>(base) + index, lanes, value);
    } else {
      void* at = static_cast<uint16_t*>(base) + index;
      _mm256_mask_storeu_epi16(at, lanes, halves_of<DT>(value));
    }
  }

  template <lk_dtype DT>
  static void store(void* base, int64_t index, F value) {
    if constexpr (DT == LK_FLOAT32) {
      _mm512_storeu_ps(static_cast<float*>(base) + index, value);
    } else {
      void* at = static_cast<uint16_t*>(base) + index;
      _mm256_storeu_si256(static_cast<__m256i*>(at), halves_of<DT>(value));
    }
  }

  // Values as they are once stored as DT. Without bf16_bits' care for NaN: the one that arithmetic
  // on numbers of DT makes stays one.
  template <lk_dtype DT>
  static F rounded(F values) {
    if constexpr (DT == LK_BFLOAT16) {
      const __m512i bits = _mm512_castps_si512(values);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      const __m512i rounded =
          _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
      return _mm512_castsi512_ps(
          _mm512_and_si512(rounded, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
    }
    if constexpr (DT == LK_FLOAT16) {
      return _mm512_cvtph_ps(
          _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    return values;
  }

  template <lk_dtype DT>
  static Table table(float scale) {
    return rounded<DT>(_mm512_mul_ps(_mm512_load_ps(kCode), _mm512_set1_ps(scale)));
  }

  // The values of the 16 indices in 8 bytes, in order.
  static void look_up(const uint8_t* bytes, Table table, F* out) {
    int64_t packed;
    __builtin_memcpy(&packed, bytes, sizeof packed);
    // Byte i into the 32-bit lanes 2i and 2i + 1; the even lane's index is the high nibble. The
    // permutation reads only the low four bits of a lane.
    const __m512i spread = _mm512_shuffle_epi8(
        _mm512_set1_epi64(packed),
        _mm512_set_epi64(0x8080800780808007, 0x8080800680808006, 0x8080800580808005,
                         0x8080800480808004, 0x8080800380808003, 0x8080800280808002,
                         0x8080800180808001, 0x8080800080808000));
    const __m512i index = _mm512_srlv_epi32(spread, _mm512_set1_epi64(4));
    out[0] = _mm512_permutexvar_ps(index, table);
  }

  // The values of the 32 indices in 16 bytes: the even ones, which are the high nibbles, and the
  // odd.
  static void look_up_split(const uint8_t* bytes, Table table, F& even, F& odd) {
    const __m512i lanes =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    even = _mm512_permutexvar_ps(_mm512_srli_epi32(lanes, 4), table);
    odd = _mm512_permutexvar_ps(lanes, table);
  }

  // table[index[i]] for as many bytes as there are lanes; gathering instructions are slower.
  static F look_up_floats(const uint8_t* index, const float* table) {
    const F low = _mm512_castps256_ps512(eight(index, table));
    return _mm512_insertf32x8(low, eight(index + 8, table), 1);
  }

  static void transpose(F* row) {
    F pair[16];
    for (int i = 0; i < 16; i += 2) {
      pair[i] = _mm512_unpacklo_ps(row[i], row[i + 1]);
      pair[i + 1] = _mm512_unpackhi_ps(row[i], row[i + 1]);
    }
    F quad[16];
    for (int i = 0; i < 16; i += 4) {
      quad[i] = unpack_low(pair[i], pair[i + 2]);
      quad[i + 1] = unpack_high(pair[i], pair[i + 2]);
      quad[i + 2] = unpack_low(pair[i + 1], pair[i + 3]);
      quad[i + 3] = unpack_high(pair[i + 1], pair[i + 3]);
    }
    // quad[4 q + c] holds columns c, c + 4, c + 8, c + 12 of rows 4 q to 4 q + 3, a lane a column.
    for (int c = 0; c < 4; ++c) {
      const F even_low = _mm512_shuffle_f32x4(quad[c], quad[4 + c], 0x88);
      const F odd_low = _mm512_shuffle_f32x4(quad[c], quad[4 + c], 0xdd);
      const F even_high = _mm512_shuffle_f32x4(quad[8 + c], quad[12 + c], 0x88);
      const F odd_high = _mm512_shuffle_f32x4(quad[8 + c], quad[12 + c], 0xdd);
      row[c] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
      row[c + 4] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
      row[c + 8] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
      row[c + 12] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
    }
  }

  // The larger magnitude of two, where infinity is above all numbers and NaN above infinity. The
  // first operand is a magnitude already.
  static F larger_magnitude(F a, F b) {
    const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(b), _mm512_set1_epi32(kNoSign));
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), magnitude));
  }
  static float largest_magnitude(F a) {
    return float_of(static_cast<uint32_t>(_mm512_reduce_max_epi32(_mm512_castps_si512(a))));
  }

  // The indices of the centroids nearest to 32 numbers in [-1, 1], in 16 bytes.
  static void nearest(const F* values, uint8_t* bytes) {
    const __m512i first = nearest_sixteen(values[0]), second = nearest_sixteen(values[1]);
    // Two indices a 64-bit lane, in its lower and its upper half; two vectors, a byte each.
    const __m512i both = _mm512_or_si512(first, _mm512_slli_epi32(second, 8));
    const __m512i pairs = _mm512_or_si512(_mm512_slli_epi64(both, 4), _mm512_srli_epi64(both, 32));
    const __m128i order = _mm_set_epi8(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes),
                     _mm_shuffle_epi8(_mm512_cvtepi64_epi16(pairs), order));
  }

  // Sixteen values of a dtype of two bytes, one for each 4-bit index; twice.
  using Halves = __m512i;

  template <lk_dtype DT>
  static Halves halves(float scale) {
    alignas(32) uint16_t values[16];
    store<DT>(values, 0, _mm512_mul_ps(_mm512_load_ps(kCode), _mm512_set1_ps(scale)));
    return _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(values)));
  }

  // The values of the 32 indices in 16 bytes, in order.
  static void look_up_halves(const uint8_t* bytes, Halves table, uint16_t* out) {
    const __m512i lanes =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    // The permutation reads only the low five bits of a word.
    const __m512i index =
        _mm512_or_si512(_mm512_srli_epi32(lanes, 4), _mm512_slli_epi32(lanes, 16));
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, table));
  }

#if defined(__AVX512BF16__)
  static constexpr bool kHasPairs = true;

  // The upper halves of two vectors side by side in each lane, `even` in the lower half: exact for
  // floats that are bfloat16 already.
  static F pair(F even, F odd) {
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
    return _mm512_castsi512_ps(_mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_castps_si512(odd)));
  }

  // 32 numbers, rounded to bfloat16, two neighbours a lane.
  static F rounded_pairs(F first, F second) {
    return _mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(second, first));
  }

  // Two vectors rounded to bfloat16, side by side in each lane, `even` in the lower half.
  static F rounded_pair(F even, F odd) {
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_load_si512(kInterleaved), halves));
  }

  // Sixteen values of bfloat16 for the first 32 of 64 bytes and sixteen for the others.
  using PairTable = __m512i;
  static PairTable pair_table(float first, float second) {
    const F code = _mm512_load_ps(kCode);
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(code, _mm512_set1_ps(second)),
                                        _mm512_mul_ps(code, _mm512_set1_ps(first)));
  }

  // The values of the indices in bits 4 PART to 4 PART + 3 of the 32 words of 64 bytes: elements
  // 4 i + (1, 0, 3, 2)[PART].
  template <int PART>
  static F look_up_pairs(__m512i packed, PairTable table) {
    // The permutation reads five bits of a word: an index, and above it which half of the table.
    const __m512i second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    const __m512i index = _mm512_ternarylogic_epi64(_mm512_srli_epi16(packed, 4 * PART),
                                                    _mm512_set1_epi16(15), second, kAndOr);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(index, table));
  }

  // c plus both products of the bfloat16 pairs in each lane.
  static F multiply_add_pairs(F a, F b, F c) {
    return _mm512_dpbf16_ps(c, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
  }
#else
  static constexpr bool kHasPairs = false;
#endif

  // Whole numbers: sixteen of 32 bits, or 64 bytes.
  using I = __m512i;

  static I zero_units() { return _mm512_setzero_si512(); }
  static I set1_unit(int32_t value) { return _mm512_set1_epi32(value); }
  static I load_units(const void* at) { return _mm512_loadu_si512(at); }
  // The first `count` units; the rest are zero and not read.
  static I load_units(const void* at, int count) {
    return _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << count) - 1), at);
  }
  static void store_units(void* at, I value) { _mm512_storeu_si512(at, value); }
  static F bits_of_units(I value) { return _mm512_castsi512_ps(value); }
  static I units_of_bits(F value) { return _mm512_castps_si512(value); }
  static F to_floats(I value) { return _mm512_cvtepi32_ps(value); }
  static I to_nearest_units(F value) { return _mm512_cvtps_epi32(value); }

#if defined(__AVX512VNNI__)
  // Products are of unsigned with signed bytes: codes are moved up, which whoever adds them up
  // takes back.
  static constexpr int kCodeOffset = 128;
  static constexpr int kByteRows = 7;
  using Codes = I;

  static Codes codes_of(I bytes) { return bytes; }

  // In each 32-bit lane: sums plus the products of its four codes with its four values.
  static I dot(I sums, Codes codes, I values) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(values));
    return sums;
  }
#else
  static constexpr int kCodeOffset = 0;
  static constexpr int kByteRows = 7;  // of a tile at once: 7 x 2 sums
  struct Codes {  // the products are of unsigned with signed bytes: the values take over the signs
    I magnitude;
    __mmask64 negative;
  };

  static Codes codes_of(I bytes) { return {_mm512_abs_epi8(bytes), _mm512_movepi8_mask(bytes)}; }

  // In each 32-bit lane: sums plus the products of its four codes with its four values. Two
  // products of up to 127 x 127 fit into 16 bits.
  static I dot(I sums, Codes codes, I values) {
    const I with_sign =
        _mm512_mask_sub_epi8(values, codes.negative, _mm512_setzero_si512(), values);
    const I pairs = _mm512_maddubs_epi16(codes.magnitude, with_sign);
    return _mm512_add_epi32(sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
  }
#endif

  // The byte codes, plus kCodeOffset, of the 128 indices in 64 bytes: the even ones, which are the
  // high nibbles, and the odd.
  static void look_up_bytes(I packed, I& even, I& odd) {
    const __m128i codes = _mm_load_si128(reinterpret_cast<const __m128i*>(kByteCode));
    const I table = _mm512_broadcast_i32x4(_mm_add_epi8(codes, _mm_set1_epi8(int8_t(kCodeOffset))));
    const I low = _mm512_set1_epi8(15);
    even = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(packed, 4), low));
    odd = _mm512_shuffle_epi8(table, _mm512_and_si512(packed, low));
  }

  // The first of BLOCKS floats in the first lanes, the second in as many lanes that follow, ...
  template <int BLOCKS>
  static F over_lanes(const float* values) {
    static_assert(BLOCKS == 2 || BLOCKS == 4, "a block has a whole number of lanes");
    if constexpr (BLOCKS == 2) {
      return _mm512_mask_mov_ps(_mm512_set1_ps(values[0]), 0xff00, _mm512_set1_ps(values[1]));
    }
    const F four = _mm512_broadcast_f32x4(_mm_loadu_ps(values));
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
                                 four);
  }

 private:
  static constexpr int kNoSign = 0x7fffffff;
  static constexpr int kAndOr = 0xea;  // (a & b) | c, for a ternary operation
  // The order that puts the first 16 halves of a vector side by side with the others.
  alignas(64) static constexpr uint16_t kInterleaved[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

  static __m512i nearest_sixteen(F value) {
    F cubic = _mm512_fmadd_ps(value, _mm512_set1_ps(kCubic[3]), _mm512_set1_ps(kCubic[2]));
    cubic = _mm512_fmadd_ps(cubic, value, _mm512_set1_ps(kCubic[1]));
    cubic = _mm512_fmadd_ps(cubic, value, _mm512_set1_ps(kCubic[0]));
    const __m512i index = _mm512_cvttps_epi32(cubic);
    const F border = _mm512_permutexvar_ps(index, _mm512_load_ps(kMiddles));
    const __mmask16 above = _mm512_cmp_ps_mask(value, border, _CMP_GT_OQ);
    return _mm512_mask_add_epi32(index, above, index, _mm512_set1_epi32(1));
  }

  static __m256 eight(const uint8_t* index, const float* table) {
    return _mm256_setr_ps(table[index[0]], table[index[1]], table[index[2]], table[index[3]],
                          table[index[4]], table[index[5]], table[index[6]], table[index[7]]);
  }
  static F unpack_low(F a, F b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }
  static F unpack_high(F a, F b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }

  template <lk_dtype DT>
  static __m256i halves_of(F value) {
    if constexpr (DT == LK_FLOAT16) {
      return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bf16_bits(value), 16));
  }

  // Rounded to bfloat16, in the upper half of each lane; the lower half is undefined.
  static __m512i bf16_bits(F value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  }
};
