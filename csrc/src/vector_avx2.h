// Eight floats at a time: AVX2, FMA, F16C.

struct V {
  using F = __m256;
  struct Table {  // sixteen values, one for each 4-bit index
    __m256 low, high;
  };

  static constexpr int kWidth = 8;
  static constexpr int kTileRows = 6;  // 6 x 2 sums, 2 weights, 1 activation: 15 of 16 registers
  static constexpr int kTileVectors = 2;
  static constexpr int kDotSums = 4;     // sums of a few rows' products in registers at once
  static constexpr int kDotWeights = 4;  // rows of W at once
  static constexpr int kDotRows = 4;     // rows of x that one reading of the weights serves

  static constexpr bool kHasPairs = false;  // no product of bfloat16 pairs
  static constexpr bool kHasMasks = false;  // no loads and stores of a few lanes

  // kWidth numbers, each of which is wanted in all lanes.
  using Numbers = const float*;
  static Numbers numbers(const float* from) { return from; }
  static F spread(Numbers from, int i) { return set1(from[i]); }

  static F zero() { return _mm256_setzero_ps(); }
  static F set1(float value) { return _mm256_set1_ps(value); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F subtract(F a, F b) { return _mm256_sub_ps(a, b); }
  static F multiply(F a, F b) { return _mm256_mul_ps(a, b); }
  static F divide(F a, F b) { return _mm256_div_ps(a, b); }
  static F negate(F a) { return _mm256_sub_ps(_mm256_setzero_ps(), a); }
  // The second operand where either is NaN.
  static F minimum(F a, F b) { return _mm256_min_ps(a, b); }
  static F maximum(F a, F b) { return _mm256_max_ps(a, b); }
  static F nearest(F a) {
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // For n a whole number such that a and the result are normal.
  static F times_power_of_two(F a, F n) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), exponent));
  }
  static F multiply_add(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static float sum(F a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  template <lk_dtype DT>
  static F load(const void* base, int64_t index) {
    if constexpr (DT == LK_FLOAT32) {
      return _mm256_loadu_ps(static_cast<const float*>(base) + index);
    } else {
      const void* at = static_cast<const uint16_t*>(base) + index;
      const __m128i halves = _mm_loadu_si128(static_cast<const __m128i*>(at));
      if constexpr (DT == LK_FLOAT16) return _mm256_cvtph_ps(halves);
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
    }
  }

  template <lk_dtype DT>
  static void store(void* base, int64_t index, F value) {
    if constexpr (DT == LK_FLOAT32) {
      _mm256_storeu_ps(static_cast<float*>(base) + index, value);
    } else {
      void* at = static_cast<uint16_t*>(base) + index;
      __m128i halves;
      if constexpr (DT == LK_FLOAT16) {
        halves = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      } else {
        const __m256i upper = _mm256_srli_epi32(bf16_bits(value), 16);
        halves =
            _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
      }
      _mm_storeu_si128(static_cast<__m128i*>(at), halves);
    }
  }

  // Values as they are once stored as DT.
  template <lk_dtype DT>
  static F rounded(F values) {
    if constexpr (DT == LK_BFLOAT16) {
      return _mm256_castsi256_ps(
          _mm256_and_si256(bf16_bits(values), _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
    }
    if constexpr (DT == LK_FLOAT16) {
      return _mm256_cvtph_ps(
          _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    return values;
  }

  template <lk_dtype DT>
  static Table table(float scale) {
    const F by = _mm256_set1_ps(scale);
    return {rounded<DT>(_mm256_mul_ps(_mm256_load_ps(kCode), by)),
            rounded<DT>(_mm256_mul_ps(_mm256_load_ps(kCode + 8), by))};
  }

  // The values of the 16 indices in 8 bytes, in order.
  static void look_up(const uint8_t* bytes, const Table& table, F* out) {
    out[0] = look_up_eight(bytes, table);
    out[1] = look_up_eight(bytes + 4, table);
  }

  // The values of the 16 indices in 8 bytes: the even ones, which are the high nibbles, and the
  // odd.
  static void look_up_split(const uint8_t* bytes, const Table& table, F& even, F& odd) {
    const __m256i lanes =
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
    even = choose(_mm256_srli_epi32(lanes, 4), table);
    odd = choose(lanes, table);
  }

  // table[index[i]] for as many bytes as there are lanes; gathering instructions are slower.
  static F look_up_floats(const uint8_t* index, const float* table) {
    return _mm256_setr_ps(table[index[0]], table[index[1]], table[index[2]], table[index[3]],
                          table[index[4]], table[index[5]], table[index[6]], table[index[7]]);
  }

  static void transpose(F* row) {
    F pair[8];
    for (int i = 0; i < 8; i += 2) {
      pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
      pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
    }
    F quad[8];
    for (int i = 0; i < 8; i += 4) {
      quad[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
      quad[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
      quad[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
      quad[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
    }
    for (int c = 0; c < 4; ++c) {
      row[c] = _mm256_permute2f128_ps(quad[c], quad[4 + c], 0x20);
      row[c + 4] = _mm256_permute2f128_ps(quad[c], quad[4 + c], 0x31);
    }
  }

  // The larger magnitude of two, where infinity is above all numbers and NaN above infinity. The
  // first operand is a magnitude already.
  static F larger_magnitude(F a, F b) {
    const __m256i magnitude =
        _mm256_and_si256(_mm256_castps_si256(b), _mm256_set1_epi32(0x7fffffff));
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), magnitude));
  }
  static float largest_magnitude(F a) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m128i four =
        _mm_max_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    const __m128i one = _mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1));
    return float_of(static_cast<uint32_t>(_mm_cvtsi128_si32(one)));
  }

  // The indices of the centroids nearest to 32 numbers in [-1, 1], in 16 bytes.
  static void nearest(const F* values, uint8_t* bytes) {
    // Two indices a 64-bit lane, in its lower and its upper half; four vectors, a byte each.
    const __m256i low =
        _mm256_or_si256(nearest_eight(values[0]), _mm256_slli_epi32(nearest_eight(values[1]), 8));
    const __m256i high =
        _mm256_or_si256(nearest_eight(values[2]), _mm256_slli_epi32(nearest_eight(values[3]), 8));
    const __m256i four = _mm256_or_si256(low, _mm256_slli_epi32(high, 16));
    const __m256i pairs = _mm256_or_si256(_mm256_slli_epi64(four, 4), _mm256_srli_epi64(four, 32));
    const __m256i order = _mm256_broadcastsi128_si256(
        _mm_set_epi8(-1, -1, -1, -1, -1, -1, -1, -1, 11, 3, 10, 2, 9, 1, 8, 0));
    const __m256i ordered = _mm256_shuffle_epi8(pairs, order);
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(bytes),
        _mm_unpacklo_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1)));
  }

  // Sixteen values of a dtype of two bytes, one for each 4-bit index: their lower and upper bytes,
  // twice.
  struct Halves {
    __m256i low, high;
  };

  template <lk_dtype DT>
  static Halves halves(float scale) {
    alignas(32) uint16_t values[16];
    const F by = _mm256_set1_ps(scale);
    store<DT>(values, 0, _mm256_mul_ps(_mm256_load_ps(kCode), by));
    store<DT>(values, 8, _mm256_mul_ps(_mm256_load_ps(kCode + 8), by));
    const __m256i words = _mm256_load_si256(reinterpret_cast<const __m256i*>(values));
    const __m256i low = _mm256_and_si256(words, _mm256_set1_epi16(0xff));
    // Packed lane by lane: the bytes of values 0 to 7 in one lane, of 8 to 15 in the other, twice.
    const __m256i bytes = _mm256_packus_epi16(low, _mm256_srli_epi16(words, 8));
    const __m256i each = _mm256_permute4x64_epi64(bytes, 0xd8);
    return {_mm256_permute2x128_si256(each, each, 0x00),
            _mm256_permute2x128_si256(each, each, 0x11)};
  }

  // The values of the 32 indices in 16 bytes, in order.
  static void look_up_halves(const uint8_t* bytes, const Halves& table, uint16_t* out) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
    const __m128i four_bits = _mm_set1_epi8(15);
    const __m128i even = _mm_and_si128(_mm_srli_epi16(packed, 4), four_bits);
    const __m128i odd = _mm_and_si128(packed, four_bits);
    const __m256i index =
        _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
    const __m256i low = _mm256_shuffle_epi8(table.low, index);
    const __m256i high = _mm256_shuffle_epi8(table.high, index);
    const __m256i first = _mm256_unpacklo_epi8(low, high);
    const __m256i second = _mm256_unpackhi_epi8(low, high);
    __m256i* to = reinterpret_cast<__m256i*>(out);
    _mm256_storeu_si256(to, _mm256_permute2x128_si256(first, second, 0x20));
    _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(first, second, 0x31));
  }

  // Whole numbers: eight of 32 bits, or 32 bytes.
  using I = __m256i;

  static I zero_units() { return _mm256_setzero_si256(); }
  static I set1_unit(int32_t value) { return _mm256_set1_epi32(value); }
  static I load_units(const void* at) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(at));
  }
  // The first four units; the rest are zero and not read.
  static I load_units(const void* at, int) {
    return _mm256_inserti128_si256(_mm256_setzero_si256(),
                                   _mm_loadu_si128(static_cast<const __m128i*>(at)), 0);
  }
  static void store_units(void* at, I value) {
    _mm256_storeu_si256(static_cast<__m256i*>(at), value);
  }
  static F bits_of_units(I value) { return _mm256_castsi256_ps(value); }
  static I units_of_bits(F value) { return _mm256_castps_si256(value); }
  static F to_floats(I value) { return _mm256_cvtepi32_ps(value); }
  static I to_nearest_units(F value) { return _mm256_cvtps_epi32(value); }

#if defined(__AVXVNNI__)
  // Products are of unsigned with signed bytes: codes are moved up, which whoever adds them up
  // takes back.
  static constexpr int kCodeOffset = 128;
  static constexpr int kByteRows = 6;
  using Codes = I;

  static Codes codes_of(I bytes) { return bytes; }

  // In each 32-bit lane: sums plus the products of its four codes with its four values.
  static I dot(I sums, Codes codes, I values) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(codes), "x"(values));
    return sums;
  }
#else
  static constexpr int kCodeOffset = 0;
  static constexpr int kByteRows = 3;  // of a tile at once: 3 x 2 sums
  struct Codes {  // the products are of unsigned with signed bytes: the values take over the signs
    I magnitude, bytes;
  };

  static Codes codes_of(I bytes) { return {_mm256_abs_epi8(bytes), bytes}; }

  // In each 32-bit lane: sums plus the products of its four codes with its four values. Two
  // products of up to 127 x 127 fit into 16 bits.
  static I dot(I sums, Codes codes, I values) {
    const I pairs = _mm256_maddubs_epi16(codes.magnitude, _mm256_sign_epi8(values, codes.bytes));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
#endif

  // The byte codes, plus kCodeOffset, of the 64 indices in 32 bytes: the even ones, which are the
  // high nibbles, and the odd.
  static void look_up_bytes(I packed, I& even, I& odd) {
    const __m128i codes = _mm_load_si128(reinterpret_cast<const __m128i*>(kByteCode));
    const I table =
        _mm256_broadcastsi128_si256(_mm_add_epi8(codes, _mm_set1_epi8(int8_t(kCodeOffset))));
    const I low = _mm256_set1_epi8(15);
    even = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(packed, 4), low));
    odd = _mm256_shuffle_epi8(table, _mm256_and_si256(packed, low));
  }

  // The first of BLOCKS floats in the first lanes, the second in as many lanes that follow.
  template <int BLOCKS>
  static F over_lanes(const float* values) {
    static_assert(BLOCKS == 2, "a block has a whole number of lanes");
    return _mm256_blend_ps(_mm256_set1_ps(values[0]), _mm256_set1_ps(values[1]), 0xf0);
  }

 private:
  static __m256i nearest_eight(F value) {
    F cubic = _mm256_fmadd_ps(value, _mm256_set1_ps(kCubic[3]), _mm256_set1_ps(kCubic[2]));
    cubic = _mm256_fmadd_ps(cubic, value, _mm256_set1_ps(kCubic[1]));
    cubic = _mm256_fmadd_ps(cubic, value, _mm256_set1_ps(kCubic[0]));
    const __m256i index = _mm256_cvttps_epi32(cubic);
    const F border = choose(index, {_mm256_load_ps(kMiddles), _mm256_load_ps(kMiddles + 8)});
    const F above = _mm256_cmp_ps(value, border, _CMP_GT_OQ);  // all bits set, which is -1
    return _mm256_sub_epi32(index, _mm256_castps_si256(above));
  }

  static F look_up_eight(const uint8_t* bytes, const Table& table) {
    int32_t packed;
    __builtin_memcpy(&packed, bytes, sizeof packed);
    // Byte i into the 32-bit lanes 2i and 2i + 1; the even lane's index is the high nibble. The
    // permutations read the low three bits of a lane, the fourth chooses between them.
    const __m256i spread = _mm256_shuffle_epi8(
        _mm256_set1_epi32(packed), _mm256_set_epi64x(static_cast<int64_t>(0x8080800380808003ull),
                                                     static_cast<int64_t>(0x8080800280808002ull),
                                                     static_cast<int64_t>(0x8080800180808001ull),
                                                     static_cast<int64_t>(0x8080800080808000ull)));
    const __m256i index = _mm256_srlv_epi32(spread, _mm256_set1_epi64x(4));
    return choose(index, table);
  }

  // The values of the indices in the low four bits of each lane.
  static F choose(__m256i index, const Table& table) {
    const F upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, index),
                            _mm256_permutevar8x32_ps(table.high, index), upper);
  }

  // Rounded to bfloat16, in the upper half of each lane; the lower half is undefined.
  static __m256i bf16_bits(F value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, quiet, nan);
  }
};
