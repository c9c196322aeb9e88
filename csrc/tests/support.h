// What the tests of the kernels share: random numbers in every dtype, NF4 matrices, results, and
// how close they must come. Everything is computed in double here, by other means than in src/.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "ladder_kernels.h"

constexpr double kClose = 1e-5;  // allowed error of a sum, relative to the sum of magnitudes

// How many expectations were checked and how many failed; the first failures are printed.
struct Tally {
  int64_t checked = 0, wrong = 0;

  template <class... Values>
  void expect(bool fine, const char* format, Values... values) {
    ++checked;
    if (fine) return;
    if (++wrong > 10) return;
    std::fprintf(stderr, "%s: ", lk_isa());
    std::fprintf(stderr, format, values...);
    std::fprintf(stderr, "\n");
  }
};

// The same numbers on every system, unlike the standard library's distributions.
class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}

  int64_t below(int64_t n) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(n)); }
  int64_t between(int64_t first, int64_t last) { return first + below(last - first + 1); }
  bool coin() { return below(2) == 1; }
  lk_dtype dtype() { return static_cast<lk_dtype>(below(3)); }
  double uniform() { return static_cast<double>(engine_()) / 4294967296.0; }
  // Close enough to normal: mean 0, variance 1.
  double normal() { return (uniform() + uniform() + uniform() + uniform() - 2) * std::sqrt(3.0); }

 private:
  std::mt19937 engine_;
};

// Dtypes ---------------------------------------------------------------------------------------

inline int64_t size_of(lk_dtype dtype) { return dtype == LK_FLOAT32 ? 4 : 2; }

inline int precision(lk_dtype dtype) {
  return dtype == LK_FLOAT32 ? 24 : dtype == LK_BFLOAT16 ? 8 : 11;
}

// To nearest, ties to even. Numbers that the dtype's range does not hold become infinite.
inline double round_to(double value, lk_dtype dtype) {
  if (dtype == LK_FLOAT32) return static_cast<double>(static_cast<float>(value));
  if (!std::isfinite(value) || value == 0) return value;
  int exponent;
  std::frexp(value, &exponent);
  const int smallest = dtype == LK_BFLOAT16 ? -125 : -13;  // exponent of normal numbers
  const double unit =
      std::ldexp(1.0, (exponent < smallest ? smallest : exponent) - precision(dtype));
  const double rounded = std::nearbyint(value / unit) * unit;
  const double limit = dtype == LK_BFLOAT16 ? std::ldexp(1.0, 128) : 65536.0;
  return std::fabs(rounded) >= limit ? std::copysign(HUGE_VAL, value) : rounded;
}

inline double decode(uint16_t half, lk_dtype dtype) {
  if (dtype == LK_BFLOAT16) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return static_cast<double>(value);
  }
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  double size =
      std::ldexp(exponent == 0 ? fraction : 1024 + fraction, exponent == 0 ? -24 : exponent - 25);
  if (exponent == 31) size = fraction == 0 ? HUGE_VAL : NAN;
  return half >> 15 != 0 ? -size : size;
}

// Of a finite number that the dtype holds.
inline uint16_t encode(double value, lk_dtype dtype) {
  if (dtype == LK_BFLOAT16) {
    const float narrow = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &narrow, sizeof bits);
    return static_cast<uint16_t>(bits >> 16);
  }
  const int sign = std::signbit(value) ? 0x8000 : 0;
  const double size = std::fabs(value);
  int exponent;
  std::frexp(size, &exponent);
  if (size < std::ldexp(1.0, -14)) return static_cast<uint16_t>(sign + std::ldexp(size, 24));
  // The implicit bit adds one to the exponent's field.
  return static_cast<uint16_t>(sign + ((exponent + 13) << 10) + std::ldexp(size, 11 - exponent));
}

// Numbers in memory as a kernel takes them, exactly as many as were asked for: a sanitizer sees
// what is read or written beyond.
class Array {
 public:
  // Not numbers at all.
  Array(lk_dtype dtype, int64_t count)
      : dtype_(dtype), bytes_(static_cast<size_t>(count * size_of(dtype)), 0xff) {}
  // Normally distributed.
  Array(lk_dtype dtype, int64_t count, Random& random, double deviation = 1) : Array(dtype, count) {
    for (int64_t i = 0; i < count; ++i) set(i, round_to(deviation * random.normal(), dtype));
  }

  lk_dtype dtype() const { return dtype_; }
  void* data() { return bytes_.data(); }
  const void* data() const { return bytes_.data(); }
  bool operator==(const Array& other) const { return bytes_ == other.bytes_; }

  double operator[](int64_t index) const {
    if (dtype_ == LK_FLOAT32) return static_cast<double>(read<float>(index));
    return decode(read<uint16_t>(index), dtype_);
  }
  // `value` must be finite and one that the dtype holds.
  void set(int64_t index, double value) {
    if (dtype_ == LK_FLOAT32) return write(index, static_cast<float>(value));
    write(index, encode(value, dtype_));
  }
  void set_bits(int64_t index, uint16_t half) { write(index, half); }
  // The NaN of most ones: rounded like a number, it would become a zero.
  void set_nan(int64_t index) {
    if (dtype_ == LK_FLOAT32) return write(index, uint32_t{0x7fffffff});
    write(index, uint16_t{0x7fff});
  }
  // Whether nothing was written there.
  bool untouched(int64_t index) const {
    const int64_t size = size_of(dtype_);
    for (int64_t i = 0; i < size; ++i) {
      if (bytes_[static_cast<size_t>(index * size + i)] != 0xff) return false;
    }
    return true;
  }

 private:
  template <class T>
  T read(int64_t index) const {
    T value;
    std::memcpy(&value, bytes_.data() + static_cast<size_t>(index) * sizeof value, sizeof value);
    return value;
  }
  template <class T>
  void write(int64_t index, T value) {
    std::memcpy(bytes_.data() + static_cast<size_t>(index) * sizeof value, &value, sizeof value);
  }

  lk_dtype dtype_;
  std::vector<unsigned char> bytes_;
};

// What rounding terms of a sum to bfloat16 may change in it, `size` being the sum of their
// magnitudes, where the variant in use multiplies pairs of bfloat16; else nothing.
inline double pairs_error(double size, lk_dtype dtype) {
  const bool pairs = dtype == LK_BFLOAT16 && std::strcmp(lk_isa(), "avx512_bf16") == 0;
  return pairs ? std::ldexp(size, -precision(LK_BFLOAT16)) : 0;
}

// Whether a result is as exact as its dtype and float32 sums over terms of this size allow, give or
// take what was lost on purpose.
inline bool close(double got, double exact, double size, lk_dtype dtype, double lost = 0) {
  double allowed = kClose * size + 1.02 * lost + 1.2e-38;  // float32's smallest normal number
  if (dtype != LK_FLOAT32) {
    allowed += std::ldexp(std::fabs(exact), -precision(dtype)) * 1.02;
    allowed += dtype == LK_FLOAT16 ? std::ldexp(1.0, -25) : 0;  // subnormal
  }
  return std::fabs(got - exact) <= allowed;
}

// NF4 ------------------------------------------------------------------------------------------

constexpr float kNF4[16] = {-1.0f,
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
                            1.0f};

// A random NF4 matrix; its scales lie between `scale` and about three times as much.
class Weight {
 public:
  Weight(int64_t rows, int64_t cols, int64_t blocksize, bool nested, Random& random,
         float scale = 0.5f)
      : offset_(scale) {
    const int64_t count = rows * cols, blocks = (count + blocksize - 1) / blocksize;
    packed_.resize(static_cast<size_t>((count + 1) / 2));
    for (auto& byte : packed_) byte = static_cast<uint8_t>(random.below(256));
    if (nested) {
      absmax_q8_.resize(static_cast<size_t>(blocks));
      nested_absmax_.resize(static_cast<size_t>((blocks + 255) / 256));
      for (auto& q8 : absmax_q8_) q8 = static_cast<uint8_t>(random.below(256));
      for (auto& absmax : nested_absmax_) {
        absmax = scale * (1 + static_cast<float>(random.uniform()));
      }
      for (int i = 0; i < 256; ++i) nested_code_.push_back(static_cast<float>(i) / 255.0f);
    } else {
      absmax_.resize(static_cast<size_t>(blocks));
      for (auto& absmax : absmax_) absmax = scale * (1 + 2 * static_cast<float>(random.uniform()));
    }
    matrix_.rows = rows;
    matrix_.cols = cols;
    matrix_.blocksize = blocksize;
  }

  // Valid as long as this object is where it is.
  lk_nf4_matrix matrix() const {
    lk_nf4_matrix matrix = matrix_;
    matrix.packed = packed_.data();
    if (absmax_q8_.empty()) {
      matrix.absmax = absmax_.data();
    } else {
      matrix.absmax_q8 = absmax_q8_.data();
      matrix.nested_absmax = nested_absmax_.data();
      matrix.nested_code = nested_code_.data();
      matrix.nested_offset = &offset_;
    }
    return matrix;
  }

  // All elements as numbers of a dtype.
  std::vector<double> dequantized(lk_dtype dtype) const {
    std::vector<double> values(static_cast<size_t>(matrix_.rows * matrix_.cols));
    double table[16] = {};
    for (size_t i = 0; i < values.size(); ++i) {
      const size_t blocksize = static_cast<size_t>(matrix_.blocksize);
      if (i % blocksize == 0) {
        const float scale = scale_of_block(i / blocksize);
        for (int c = 0; c < 16; ++c)
          table[c] = round_to(static_cast<double>(kNF4[c] * scale), dtype);
      }
      values[i] = table[i % 2 == 0 ? packed_[i / 2] >> 4 : packed_[i / 2] & 15];
    }
    return values;
  }

  // The centroid and the scale of an element of the flattened matrix.
  float code_of(int64_t element) const {
    const uint8_t byte = packed_[static_cast<size_t>(element / 2)];
    return kNF4[element % 2 == 0 ? byte >> 4 : byte & 15];
  }
  float scale_of(int64_t element) const {
    return scale_of_block(static_cast<size_t>(element / matrix_.blocksize));
  }

 private:
  float scale_of_block(size_t block) const {
    if (absmax_q8_.empty()) return absmax_[block];
    const float product = nested_code_[absmax_q8_[block]] * nested_absmax_[block / 256];
    return product + offset_;
  }

  std::vector<uint8_t> packed_, absmax_q8_;
  std::vector<float> absmax_, nested_absmax_, nested_code_;
  float offset_;
  lk_nf4_matrix matrix_{};
};

// Random sizes of a matrix's rows: whole blocks, as models have them, or anything.
inline int64_t random_width(Random& random, int64_t blocksize, int64_t most) {
  const int64_t blocks = most / blocksize;
  return blocks > 0 && random.coin() ? blocksize * random.between(1, blocks)
                                     : random.between(1, most);
}

// A sum and the size of its terms.
struct Sum {
  double value = 0, size = 0;

  void add(double term) {
    value += term;
    size += std::fabs(term);
  }
};

// One check of each kernel in the variant in use; `rounds` random calls and some chosen ones.
void check_nf4_linear(Tally& tally, int rounds);
void check_nf4_linear_int8(Tally& tally, int rounds);
void check_nf4_swiglu(Tally& tally, int rounds);
void check_linear_cross_entropy(Tally& tally, int rounds);
void check_low_rank(Tally& tally, int rounds);
void check_ranged_attention(Tally& tally, int rounds);
void check_callers(Tally& tally);   // several threads call at once
void check_refusals(Tally& tally);  // bad arguments, empty calls, names of variants
