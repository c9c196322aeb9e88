// Eight floats at a time, in two registers: AArch64's Advanced SIMD as every such processor has it.
//
// Two, because a look-up of eight bytes then fills the registers that TBL reads: sixteen indices,
// looked up in four tables of bytes and put together. The other way, one TBL with a table of four
// registers, gives four floats for three times the price of a TBL with one (Arm's optimisation
// guides for Neoverse N1, V1 and N2).

struct V {
  struct F {
    float32x4_t low, high;
  };
  // Sixteen values, one for each 4-bit index: byte p of all of them in plane p.
  struct Table {
    uint8x16_t plane[4];
  };

  static constexpr int kWidth = 8;
  static constexpr int kTileRows = 6;  // 24 registers of sums, 4 weights, 2 activations: 30 of 32
  static constexpr int kTileVectors = 2;
  static constexpr int kDotSums = 4;     // sums of a few rows' products in registers at once
  static constexpr int kDotWeights = 2;  // rows of W at once: each has a table in 4 registers
  static constexpr int kDotRows = 8;     // rows of x that one reading of the weights serves

  static constexpr bool kHasPairs = false;  // no product of bfloat16 pairs
  static constexpr bool kHasMasks = false;  // no loads and stores of a few lanes

  // Eight numbers, each of which is wanted in all lanes: FMLA takes a lane of a register.
  using Numbers = F;
  static Numbers numbers(const float* from) { return load<LK_FLOAT32>(from, 0); }
  static F spread(Numbers from, int i) { return set1(i < 4 ? from.low[i] : from.high[i - 4]); }

  static F zero() { return set1(0.0f); }
  static F set1(float value) { return {vdupq_n_f32(value), vdupq_n_f32(value)}; }
  static F add(F a, F b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
  static F subtract(F a, F b) { return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
  static F multiply(F a, F b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
  static F divide(F a, F b) { return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)}; }
  static F negate(F a) { return {vnegq_f32(a.low), vnegq_f32(a.high)}; }
  // The second operand where either is NaN: FMIN and FMAX would give the NaN.
  static F minimum(F a, F b) {
    return {vbslq_f32(vcltq_f32(a.low, b.low), a.low, b.low),
            vbslq_f32(vcltq_f32(a.high, b.high), a.high, b.high)};
  }
  static F maximum(F a, F b) {
    return {vbslq_f32(vcgtq_f32(a.low, b.low), a.low, b.low),
            vbslq_f32(vcgtq_f32(a.high, b.high), a.high, b.high)};
  }
  static F nearest(F a) { return {vrndnq_f32(a.low), vrndnq_f32(a.high)}; }
  // For n a whole number such that a and the result are normal.
  static F times_power_of_two(F a, F n) {
    return {times_power_of_two(a.low, n.low), times_power_of_two(a.high, n.high)};
  }
  static F multiply_add(F a, F b, F c) {
    return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
  }
  static float sum(F a) {
    const float32x4_t four = vaddq_f32(a.low, a.high);
    return vaddv_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)));
  }

  template <lk_dtype DT>
  static F load(const void* base, int64_t index) {
    if constexpr (DT == LK_FLOAT32) {
      const float* at = static_cast<const float*>(base) + index;
      return {vld1q_f32(at), vld1q_f32(at + 4)};
    } else {
      return widened<DT>(vld1q_u16(static_cast<const uint16_t*>(base) + index));
    }
  }

  template <lk_dtype DT>
  static void store(void* base, int64_t index, F value) {
    if constexpr (DT == LK_FLOAT32) {
      float* at = static_cast<float*>(base) + index;
      vst1q_f32(at, value.low);
      vst1q_f32(at + 4, value.high);
    } else {
      vst1q_u16(static_cast<uint16_t*>(base) + index, halves<DT>(value));
    }
  }

  template <lk_dtype DT>
  static Table table(float scale) {
    const float32x4_t by = vdupq_n_f32(scale);
    const F first{vmulq_f32(vld1q_f32(kCode), by), vmulq_f32(vld1q_f32(kCode + 4), by)};
    const F last{vmulq_f32(vld1q_f32(kCode + 8), by), vmulq_f32(vld1q_f32(kCode + 12), by)};
    Table table;
    split(rounded<DT>(first), rounded<DT>(last), table);
    return table;
  }

  // The values of the 16 indices in 8 bytes, in order.
  static void look_up(const uint8_t* bytes, const Table& table, F* out) {
    const uint8x8_t packed = vld1_u8(bytes);
    const uint8x8x2_t indices = vzip_u8(vshr_n_u8(packed, 4), vand_u8(packed, vdup_n_u8(15)));
    choose(vcombine_u8(indices.val[0], indices.val[1]), table, out[0], out[1]);
  }

  // The values of the 16 indices in 8 bytes: the even ones, which are the high nibbles, and the
  // odd.
  static void look_up_split(const uint8_t* bytes, const Table& table, F& even, F& odd) {
    const uint8x8_t packed = vld1_u8(bytes);
    choose(vcombine_u8(vshr_n_u8(packed, 4), vand_u8(packed, vdup_n_u8(15))), table, even, odd);
  }

  static void transpose(F* row) {
    for (int i = 0; i < 4; ++i) {
      const float32x4_t upper_right = row[i].high;
      row[i].high = row[i + 4].low;
      row[i + 4].low = upper_right;
    }
    transpose_four(row[0].low, row[1].low, row[2].low, row[3].low);
    transpose_four(row[0].high, row[1].high, row[2].high, row[3].high);
    transpose_four(row[4].low, row[5].low, row[6].low, row[7].low);
    transpose_four(row[4].high, row[5].high, row[6].high, row[7].high);
  }

  // Rounded to DT and widened again.
  template <lk_dtype DT>
  static F rounded(F value) {
    return DT == LK_FLOAT32 ? value : widened<DT>(halves<DT>(value));
  }

  // The larger magnitude of two, where infinity is above all numbers and NaN above infinity. The
  // first operand is a magnitude already.
  static F larger_magnitude(F a, F b) {
    return {larger_magnitude(a.low, b.low), larger_magnitude(a.high, b.high)};
  }
  static float largest_magnitude(F a) {
    return float_of(
        vmaxvq_u32(vmaxq_u32(vreinterpretq_u32_f32(a.low), vreinterpretq_u32_f32(a.high))));
  }

  // The indices of the centroids nearest to 32 numbers in [-1, 1], in 16 bytes.
  static void nearest(const F* values, uint8_t* bytes) {
    const uint8x16_t first = nearest_sixteen(values[0], values[1]);
    const uint8x16_t last = nearest_sixteen(values[2], values[3]);
    vst1q_u8(bytes, vsliq_n_u8(vuzp2q_u8(first, last), vuzp1q_u8(first, last), 4));
  }

  struct Halves {  // sixteen values of a dtype of two bytes, one for each 4-bit index
    uint8x16_t low, high;
  };

  template <lk_dtype DT>
  static Halves halves(float scale) {
    uint16_t values[16];
    for (int i = 0; i < 16; i += kWidth) {
      store<DT>(values, i, multiply(load<LK_FLOAT32>(kCode, i), set1(scale)));
    }
    const uint8x16x2_t bytes = vld2q_u8(reinterpret_cast<const uint8_t*>(values));
    return {bytes.val[0], bytes.val[1]};
  }

  // The values of the 32 indices in 16 bytes, in order.
  static void look_up_halves(const uint8_t* bytes, const Halves& table, uint16_t* out) {
    const uint8x16_t packed = vld1q_u8(bytes);
    const uint8x16_t even = vshrq_n_u8(packed, 4), odd = vandq_u8(packed, vdupq_n_u8(15));
    const uint8x16_t index[2] = {vzip1q_u8(even, odd), vzip2q_u8(even, odd)};
    for (int i = 0; i < 2; ++i) {
      const uint8x16x2_t halves = {
          {vqtbl1q_u8(table.low, index[i]), vqtbl1q_u8(table.high, index[i])}};
      vst2q_u8(reinterpret_cast<uint8_t*>(out + 16 * i), halves);
    }
  }

  // Whole numbers: eight of 32 bits, or 32 bytes.
  struct I {
    int32x4_t low, high;
  };

  static I zero_units() { return set1_unit(0); }
  static I set1_unit(int32_t value) { return {vdupq_n_s32(value), vdupq_n_s32(value)}; }
  static I load_units(const void* at) {
    const auto* bytes = static_cast<const int8_t*>(at);
    return {vreinterpretq_s32_s8(vld1q_s8(bytes)), vreinterpretq_s32_s8(vld1q_s8(bytes + 16))};
  }
  // The first four units; the rest are zero and not read.
  static I load_units(const void* at, int) {
    return {vreinterpretq_s32_s8(vld1q_s8(static_cast<const int8_t*>(at))), vdupq_n_s32(0)};
  }
  static void store_units(void* at, I value) {
    auto* bytes = static_cast<int8_t*>(at);
    vst1q_s8(bytes, vreinterpretq_s8_s32(value.low));
    vst1q_s8(bytes + 16, vreinterpretq_s8_s32(value.high));
  }
  static F bits_of_units(I value) {
    return {vreinterpretq_f32_s32(value.low), vreinterpretq_f32_s32(value.high)};
  }
  static I units_of_bits(F value) {
    return {vreinterpretq_s32_f32(value.low), vreinterpretq_s32_f32(value.high)};
  }
  static F to_floats(I value) { return {vcvtq_f32_s32(value.low), vcvtq_f32_s32(value.high)}; }
  static I to_nearest_units(F value) {
    return {vcvtnq_s32_f32(value.low), vcvtnq_s32_f32(value.high)};
  }

  static constexpr int kCodeOffset = 0;  // products are of signed bytes
  static constexpr int kByteRows = 6;    // of a tile at once: 24 registers of sums
  using Codes = I;

  static Codes codes_of(I bytes) { return bytes; }

  // In each 32-bit lane: sums plus the products of its four codes with its four values.
  static I dot(I sums, Codes codes, I values) {
    return {dot(sums.low, codes.low, values.low), dot(sums.high, codes.high, values.high)};
  }

  // The byte codes of the 64 indices in 32 bytes: the even ones, which are the high nibbles, and
  // the odd.
  static void look_up_bytes(I packed, I& even, I& odd) {
    look_up_bytes(packed.low, even.low, odd.low);
    look_up_bytes(packed.high, even.high, odd.high);
  }

  // The first of BLOCKS floats in the first lanes, the second in as many lanes that follow.
  template <int BLOCKS>
  static F over_lanes(const float* values) {
    static_assert(BLOCKS == 2, "a block has a whole number of lanes");
    return {vdupq_n_f32(values[0]), vdupq_n_f32(values[1])};
  }

  // table[index[i]] for as many bytes as there are lanes.
  static F look_up_floats(const uint8_t* index, const float* table) {
    const float values[8] = {table[index[0]], table[index[1]], table[index[2]], table[index[3]],
                             table[index[4]], table[index[5]], table[index[6]], table[index[7]]};
    return load<LK_FLOAT32>(values, 0);
  }

 private:
  static int32x4_t dot(int32x4_t sums, int32x4_t codes, int32x4_t values) {
    const int8x16_t a = vreinterpretq_s8_s32(codes), b = vreinterpretq_s8_s32(values);
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(sums, a, b);
#else
    // Two products of up to 127 x 127 fit into 16 bits.
    const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b));
    return vpadalq_s16(sums, vpaddq_s16(low, vmull_high_s8(a, b)));
#endif
  }

  static void look_up_bytes(int32x4_t packed, int32x4_t& even, int32x4_t& odd) {
    const uint8x16_t bytes = vreinterpretq_u8_s32(packed);
    const int8x16_t table = vld1q_s8(kByteCode);
    even = vreinterpretq_s32_s8(vqtbl1q_s8(table, vshrq_n_u8(bytes, 4)));
    odd = vreinterpretq_s32_s8(vqtbl1q_s8(table, vandq_u8(bytes, vdupq_n_u8(15))));
  }

  static float32x4_t larger_magnitude(float32x4_t a, float32x4_t b) {
    const uint32x4_t magnitude = vandq_u32(vreinterpretq_u32_f32(b), vdupq_n_u32(0x7fffffff));
    return vreinterpretq_f32_u32(vmaxq_u32(vreinterpretq_u32_f32(a), magnitude));
  }

  // nearest_centroid of scalar.h.
  static uint8x16_t nearest_sixteen(F a, F b) {
    const uint8x16_t index =
        narrow(roughly(a.low), roughly(a.high), roughly(b.low), roughly(b.high));
    Table middles;
    split(load<LK_FLOAT32>(kMiddles, 0), load<LK_FLOAT32>(kMiddles, 8), middles);
    F first, last;
    choose(index, middles, first, last);
    const uint8x16_t above = narrow(vcgtq_f32(a.low, first.low), vcgtq_f32(a.high, first.high),
                                    vcgtq_f32(b.low, last.low), vcgtq_f32(b.high, last.high));
    return vsubq_u8(index, above);  // where it is above, all bits are set, which is -1
  }

  static uint32x4_t roughly(float32x4_t value) {
    float32x4_t cubic = vfmaq_f32(vdupq_n_f32(kCubic[2]), value, vdupq_n_f32(kCubic[3]));
    cubic = vfmaq_f32(vdupq_n_f32(kCubic[1]), cubic, value);
    cubic = vfmaq_f32(vdupq_n_f32(kCubic[0]), cubic, value);
    return vcvtq_u32_f32(cubic);
  }

  // The lowest bytes of sixteen lanes.
  static uint8x16_t narrow(uint32x4_t a, uint32x4_t b, uint32x4_t c, uint32x4_t d) {
    const uint16x8_t ab = vuzp1q_u16(vreinterpretq_u16_u32(a), vreinterpretq_u16_u32(b));
    const uint16x8_t cd = vuzp1q_u16(vreinterpretq_u16_u32(c), vreinterpretq_u16_u32(d));
    return vuzp1q_u8(vreinterpretq_u8_u16(ab), vreinterpretq_u8_u16(cd));
  }

  static float32x4_t times_power_of_two(float32x4_t a, float32x4_t n) {
    const int32x4_t exponent = vshlq_n_s32(vcvtq_s32_f32(n), 23);
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(a), exponent));
  }

  template <lk_dtype DT>
  static F widened(uint16x8_t halves) {
    if constexpr (DT == LK_FLOAT16) {
      const float16x8_t values = vreinterpretq_f16_u16(halves);
      return {vcvt_f32_f16(vget_low_f16(values)), vcvt_high_f32_f16(values)};
    } else {
      return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(halves), 16)),
              vreinterpretq_f32_u32(vshll_high_n_u16(halves, 16))};
    }
  }

  template <lk_dtype DT>
  static uint16x8_t halves(F value) {
    if constexpr (DT == LK_FLOAT16) {
      return vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(value.low), value.high));
    } else {
      return vuzp2q_u16(bf16_bits(value.low), bf16_bits(value.high));
    }
  }

  // Rounded to bfloat16, in the upper half of each 32-bit lane; the lower half is undefined.
  static uint16x8_t bf16_bits(float32x4_t value) {
    const uint32x4_t bits = vreinterpretq_u32_f32(value);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vreinterpretq_u16_u32(vbslq_u32(vceqq_f32(value, value), rounded, quiet));
  }

  static uint16x8_t halves_of(float32x4_t value) { return vreinterpretq_u16_f32(value); }

  static void split(F first, F last, Table& table) {
    // First the lower and the upper halves of eight values, then the bytes of sixteen halves.
    const uint8x16_t low[2] = {
        vreinterpretq_u8_u16(vuzp1q_u16(halves_of(first.low), halves_of(first.high))),
        vreinterpretq_u8_u16(vuzp1q_u16(halves_of(last.low), halves_of(last.high)))};
    const uint8x16_t high[2] = {
        vreinterpretq_u8_u16(vuzp2q_u16(halves_of(first.low), halves_of(first.high))),
        vreinterpretq_u8_u16(vuzp2q_u16(halves_of(last.low), halves_of(last.high)))};
    table.plane[0] = vuzp1q_u8(low[0], low[1]);
    table.plane[1] = vuzp2q_u8(low[0], low[1]);
    table.plane[2] = vuzp1q_u8(high[0], high[1]);
    table.plane[3] = vuzp2q_u8(high[0], high[1]);
  }

  // The values of 16 indices: each byte of each looked up in its plane, then put together.
  static void choose(uint8x16_t indices, const Table& table, F& first, F& last) {
    const uint8x16_t b0 = vqtbl1q_u8(table.plane[0], indices);
    const uint8x16_t b1 = vqtbl1q_u8(table.plane[1], indices);
    const uint8x16_t b2 = vqtbl1q_u8(table.plane[2], indices);
    const uint8x16_t b3 = vqtbl1q_u8(table.plane[3], indices);
    first = join(vzip1q_u8(b0, b1), vzip1q_u8(b2, b3));
    last = join(vzip2q_u8(b0, b1), vzip2q_u8(b2, b3));
  }

  static F join(uint8x16_t lower, uint8x16_t upper) {
    const uint16x8_t a = vreinterpretq_u16_u8(lower), b = vreinterpretq_u16_u8(upper);
    return {vreinterpretq_f32_u16(vzip1q_u16(a, b)), vreinterpretq_f32_u16(vzip2q_u16(a, b))};
  }

  static void transpose_four(float32x4_t& a, float32x4_t& b, float32x4_t& c, float32x4_t& d) {
    const float64x2_t ab_even = vreinterpretq_f64_f32(vtrn1q_f32(a, b));
    const float64x2_t ab_odd = vreinterpretq_f64_f32(vtrn2q_f32(a, b));
    const float64x2_t cd_even = vreinterpretq_f64_f32(vtrn1q_f32(c, d));
    const float64x2_t cd_odd = vreinterpretq_f64_f32(vtrn2q_f32(c, d));
    a = vreinterpretq_f32_f64(vtrn1q_f64(ab_even, cd_even));
    b = vreinterpretq_f32_f64(vtrn1q_f64(ab_odd, cd_odd));
    c = vreinterpretq_f32_f64(vtrn2q_f64(ab_even, cd_even));
    d = vreinterpretq_f32_f64(vtrn2q_f64(ab_odd, cd_odd));
  }
};
