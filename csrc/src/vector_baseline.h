// Four floats at a time in the compiler's own vectors: any processor.

struct V {
  typedef float F __attribute__((vector_size(16)));
  struct Table {  // sixteen values, one for each 4-bit index
    float value[16];
  };

  static constexpr int kWidth = 4;
  static constexpr int kTileRows = 4;  // 4 x 2 sums, 2 weights, 1 activation: 11 of 16 registers
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

  static F zero() { return F{0.0f, 0.0f, 0.0f, 0.0f}; }
  static F set1(float value) { return F{value, value, value, value}; }
  static F add(F a, F b) { return a + b; }
  static F subtract(F a, F b) { return a - b; }
  static F multiply(F a, F b) { return a * b; }
  static F divide(F a, F b) { return a / b; }
  static F negate(F a) { return -a; }
  // The second operand where either is NaN.
  static F minimum(F a, F b) { return a < b ? a : b; }
  static F maximum(F a, F b) { return a > b ? a : b; }
  // For |a| below 2^22: adding 1.5 * 2^23 rounds to a whole number.
  static F nearest(F a) {
    const F shift = set1(12582912.0f);
    return a + shift - shift;
  }
  // For n a whole number such that a and the result are normal.
  static F times_power_of_two(F a, F n) {
    for (int i = 0; i < kWidth; ++i) {
      // n + 1.5 * 2^23 has n in its lowest bits.
      const uint32_t exponent = bits_of(n[i] + 12582912.0f) << 23;
      if (a[i] == a[i]) a[i] = float_of(bits_of(a[i]) + exponent);
    }
    return a;
  }
  static F multiply_add(F a, F b, F c) { return a * b + c; }
  static float sum(F a) { return (a[0] + a[2]) + (a[1] + a[3]); }

  template <lk_dtype DT>
  static F load(const void* base, int64_t index) {
    F value;
    if constexpr (DT == LK_FLOAT32) {
      __builtin_memcpy(&value, static_cast<const float*>(base) + index, sizeof value);
    } else {
      const uint16_t* halves = static_cast<const uint16_t*>(base) + index;
      for (int i = 0; i < kWidth; ++i) {
        value[i] = DT == LK_FLOAT16 ? f16_to_float(halves[i]) : bf16_to_float(halves[i]);
      }
    }
    return value;
  }

  template <lk_dtype DT>
  static void store(void* base, int64_t index, F value) {
    if constexpr (DT == LK_FLOAT32) {
      __builtin_memcpy(static_cast<float*>(base) + index, &value, sizeof value);
    } else {
      uint16_t* halves = static_cast<uint16_t*>(base) + index;
      for (int i = 0; i < kWidth; ++i) {
        halves[i] = DT == LK_FLOAT16 ? float_to_f16(value[i]) : float_to_bf16(value[i]);
      }
    }
  }

  // Values as they are once stored as DT.
  template <lk_dtype DT>
  static F rounded(F values) {
    for (int i = 0; i < kWidth; ++i) values[i] = round_to<DT>(values[i]);
    return values;
  }

  template <lk_dtype DT>
  static Table table(float scale) {
    Table table;
    for (int i = 0; i < 16; ++i) table.value[i] = round_to<DT>(kCode[i] * scale);
    return table;
  }

  // The values of the 16 indices in 8 bytes, in order.
  static void look_up(const uint8_t* bytes, const Table& table, F* out) {
    for (int i = 0; i < 4; ++i) {
      const uint8_t first = bytes[2 * i], second = bytes[2 * i + 1];
      out[i] = F{table.value[first >> 4], table.value[first & 15], table.value[second >> 4],
                 table.value[second & 15]};
    }
  }

  // The values of the 8 indices in 4 bytes: the even ones, which are the high nibbles, and the odd.
  static void look_up_split(const uint8_t* bytes, const Table& table, F& even, F& odd) {
    for (int i = 0; i < kWidth; ++i) {
      even[i] = table.value[bytes[i] >> 4];
      odd[i] = table.value[bytes[i] & 15];
    }
  }

  // table[index[i]] for as many bytes as there are lanes; gathering instructions are slower.
  static F look_up_floats(const uint8_t* index, const float* table) {
    return F{table[index[0]], table[index[1]], table[index[2]], table[index[3]]};
  }

  static void transpose(F* row) {
    for (int i = 0; i < kWidth; ++i) {
      for (int j = i + 1; j < kWidth; ++j) {
        const float swapped = row[i][j];
        row[i][j] = row[j][i];
        row[j][i] = swapped;
      }
    }
  }

  // The larger magnitude of two, where infinity is above all numbers and NaN above infinity. The
  // first operand is a magnitude already.
  static F larger_magnitude(F a, F b) {
    for (int i = 0; i < kWidth; ++i) {
      const uint32_t magnitude = bits_of(b[i]) & 0x7fffffffu;
      if (magnitude > bits_of(a[i])) a[i] = float_of(magnitude);
    }
    return a;
  }
  static float largest_magnitude(F a) {
    uint32_t largest = 0;
    for (int i = 0; i < kWidth; ++i) largest = bits_of(a[i]) > largest ? bits_of(a[i]) : largest;
    return float_of(largest);
  }

  // The indices of the centroids nearest to 32 numbers in [-1, 1], in 16 bytes.
  static void nearest(const F* values, uint8_t* bytes) {
    for (int i = 0; i < 16; ++i) {
      const F four = values[i / 2];
      const int at = i % 2 * 2;
      bytes[i] =
          static_cast<uint8_t>(nearest_centroid(four[at]) << 4 | nearest_centroid(four[at + 1]));
    }
  }

  struct Halves {  // sixteen values of a dtype of two bytes, one for each 4-bit index
    uint16_t value[16];
  };

  template <lk_dtype DT>
  static Halves halves(float scale) {
    Halves table;
    for (int i = 0; i < 16; ++i) {
      const float value = kCode[i] * scale;
      table.value[i] = DT == LK_FLOAT16 ? float_to_f16(value) : float_to_bf16(value);
    }
    return table;
  }

  // The values of the 32 indices in 16 bytes, in order.
  static void look_up_halves(const uint8_t* bytes, const Halves& table, uint16_t* out) {
    for (int i = 0; i < 16; ++i) {
      out[2 * i] = table.value[bytes[i] >> 4];
      out[2 * i + 1] = table.value[bytes[i] & 15];
    }
  }

  // Whole numbers: four of 32 bits, or 16 bytes.
  typedef int32_t I __attribute__((vector_size(16)));

  static I zero_units() { return I{0, 0, 0, 0}; }
  static I set1_unit(int32_t value) { return I{value, value, value, value}; }
  static I load_units(const void* at) {
    I value;
    __builtin_memcpy(&value, at, sizeof value);
    return value;
  }
  static void store_units(void* at, I value) { __builtin_memcpy(at, &value, sizeof value); }
  static F bits_of_units(I value) { return reinterpret_cast<F>(value); }
  static I units_of_bits(F value) { return reinterpret_cast<I>(value); }
  static F to_floats(I value) { return __builtin_convertvector(value, F); }
  // For |value| below 2^22.
  static I to_nearest_units(F value) { return __builtin_convertvector(nearest(value), I); }

  static constexpr int kCodeOffset = 0;  // products are of signed bytes
  static constexpr int kByteRows = 4;
  typedef int16_t Shorts __attribute__((vector_size(16)));
  struct Codes {  // widened: the bytes in the upper halves of 16 bits, and those in the lower
    Shorts upper, lower;
  };

  static Codes codes_of(I bytes) { return {upper_bytes(bytes), lower_bytes(bytes)}; }

  // In each 32-bit lane: sums plus the products of its four codes with its four values. Two
  // products of up to 127 x 127 fit into 16 bits.
  static I dot(I sums, Codes codes, I values) {
    const Shorts pairs = codes.upper * upper_bytes(values) + codes.lower * lower_bytes(values);
    const I both = reinterpret_cast<I>(pairs);
    typedef uint32_t Words __attribute__((vector_size(16)));
    return sums + (both >> 16) + (reinterpret_cast<I>(reinterpret_cast<Words>(both) << 16) >> 16);
  }

  // The byte codes of the 32 indices in 16 bytes: the even ones, which are the high nibbles, and
  // the odd.
  static void look_up_bytes(I packed, I& even, I& odd) {
    uint8_t bytes[16];
    int8_t high[16], low[16];
    store_units(bytes, packed);
    for (int i = 0; i < 16; ++i) {
      high[i] = kByteCode[bytes[i] >> 4];
      low[i] = kByteCode[bytes[i] & 15];
    }
    even = load_units(high);
    odd = load_units(low);
  }

 private:
  static Shorts upper_bytes(I bytes) { return reinterpret_cast<Shorts>(bytes) >> 8; }
  static Shorts lower_bytes(I bytes) {
    typedef uint16_t Words __attribute__((vector_size(16)));
    return reinterpret_cast<Shorts>(reinterpret_cast<Words>(bytes) << 8) >> 8;
  }
};
