// Random numbers for the test programs, in both dtypes, and whether results are close to them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "ladder_kernels.h"

inline std::mt19937 generator(0);

inline int below(int n) { return static_cast<int>(generator() % static_cast<unsigned>(n)); }

inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float from_bf16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Floats whose values both dtypes hold, in either dtype.
struct Floats {
  std::vector<float> wide;
  std::vector<uint16_t> narrow;

  explicit Floats(int64_t n) : wide(static_cast<size_t>(n)), narrow(static_cast<size_t>(n)) {
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < wide.size(); ++i) {
      narrow[i] = to_bf16(normal(generator));
      wide[i] = from_bf16(narrow[i]);
    }
  }
  const void* as(lk_dtype dtype) const {
    return dtype == LK_FLOAT32 ? static_cast<const void*>(wide.data()) : narrow.data();
  }
};

// Whether element `index` of `out` is close to `exact`, a sum of terms whose magnitudes sum to
// `scale`.
inline bool close(const std::vector<unsigned char>& out, int64_t index, lk_dtype dtype,
                  double exact, double scale) {
  double got;
  if (dtype == LK_FLOAT32) {
    float value;
    std::memcpy(&value, out.data() + 4 * index, 4);
    got = static_cast<double>(value);
  } else {
    uint16_t half;
    std::memcpy(&half, out.data() + 2 * index, 2);
    got = static_cast<double>(from_bf16(half));
  }
  const double allowed = dtype == LK_FLOAT32 ? 1e-5 * scale : std::fabs(exact) / 250 + 1e-5 * scale;
  return std::fabs(got - exact) <= allowed;
}
