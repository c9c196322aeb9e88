// bfloat16 and float16 in plain integers, for what vectors do not cover. Included once by each
// variant, inside its own namespace, so that no variant's code is linked into another.

inline uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline float bf16_to_float(uint16_t half) { return float_of(static_cast<uint32_t>(half) << 16); }

// To nearest, ties to even, as torch rounds; NaN stays NaN.
inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float f16_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t rest = half & 0x7fffu;
  if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  if (rest >= 0x0400u) return float_of(sign | ((rest << 13) + (112u << 23)));
  const float subnormal = static_cast<float>(rest) * 0x1p-24f;  // exact
  return float_of(sign | bits_of(subnormal));
}

inline uint16_t float_to_f16(float value) {
  const uint32_t bits = bits_of(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 lets the hardware round at 2^-24
    return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
}

template <lk_dtype DT>
inline float round_to(float value) {
  if (DT == LK_BFLOAT16) return bf16_to_float(float_to_bf16(value));
  if (DT == LK_FLOAT16) return f16_to_float(float_to_f16(value));
  return value;
}

// NF4's centroids.
alignas(64) constexpr float kCode[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

constexpr float middle(int i) { return (kCode[i] + kCode[i + 1]) / 2.0f; }

// The borders between neighbours, rounded as bitsandbytes rounds them; nothing is beyond the last.
alignas(64) constexpr float kMiddles[16] = {
    middle(0),  middle(1),  middle(2),  middle(3),        middle(4),  middle(5),
    middle(6),  middle(7),  middle(8),  middle(9),        middle(10), middle(11),
    middle(12), middle(13), middle(14), __builtin_inff(),
};

// A cubic whose value at border i is i + 1/2, give or take 0.11. So the centroid nearest to a
// number in [-1, 1] is the whole part of the cubic, or one more if the number is above that border:
// far from the borders, the rounding of the cubic does not matter.
constexpr float kCubic[4] = {7.12f, 11.414f, 0.644f, -4.425f};

// For a number in [-1, 1]; a tie goes to the lower index.
inline int nearest_centroid(float value) {
  const float cubic = ((value * kCubic[3] + kCubic[2]) * value + kCubic[1]) * value + kCubic[0];
  const int index = cubic > 0.0f ? static_cast<int>(cubic) : 0;  // for NaN, too
  return index + (value > kMiddles[index] ? 1 : 0);
}
// The same as signed bytes: round(127 * code).
alignas(16) constexpr int8_t kByteCode[16] = {-127, -88, -67, -50, -36, -23, -12, 0,
                                              10,   20,  31,  43,  56,  71,  92,  127};
