// Quantises and dequantises in every variant, against a search of all centroids in double. For
// sanitizers above all: `make sanitize`.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "ladder_kernels.h"
#include "random_floats.h"

namespace {

const float kCode[16] = {-1.0f,
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

struct Weight {
  std::vector<uint8_t> packed, scales8;
  std::vector<float> scales, nested, code;
  float offset = 0.75f;
  lk_nf4_matrix matrix{};

  Weight(int64_t rows, int64_t cols, int64_t blocksize, bool twice) {
    const int64_t count = rows * cols, blocks = (count + blocksize - 1) / blocksize;
    packed.resize(static_cast<size_t>((count + 1) / 2));
    for (auto& byte : packed) byte = static_cast<uint8_t>(below(256));
    matrix.packed = packed.data();
    matrix.rows = rows;
    matrix.cols = cols;
    matrix.blocksize = blocksize;
    if (twice) {
      scales8.resize(static_cast<size_t>(blocks));
      nested.resize(static_cast<size_t>((blocks + 255) / 256));
      code.resize(256);
      for (auto& scale : scales8) scale = static_cast<uint8_t>(below(256));
      for (auto& scale : nested) scale = 0.1f + 0.01f * static_cast<float>(below(10));
      for (size_t i = 0; i < 256; ++i) code[i] = static_cast<float>(i) / 255.0f;
      matrix.absmax_q8 = scales8.data();
      matrix.nested_absmax = nested.data();
      matrix.nested_code = code.data();
      matrix.nested_offset = &offset;
    } else {
      scales.resize(static_cast<size_t>(blocks));
      for (auto& scale : scales) scale = 0.5f + 0.01f * static_cast<float>(below(100));
      matrix.absmax = scales.data();
    }
  }

  float at(int64_t row, int64_t col, lk_dtype dtype) const {
    const int64_t element = row * matrix.cols + col, block = element / matrix.blocksize;
    const uint8_t byte = packed[static_cast<size_t>(element / 2)];
    float scale;
    if (matrix.absmax != nullptr) {
      scale = matrix.absmax[block];
    } else {
      const float product = code[matrix.absmax_q8[block]] * matrix.nested_absmax[block / 256];
      scale = product + offset;
    }
    const float value = kCode[element % 2 == 0 ? byte >> 4 : byte & 15] * scale;
    return dtype == LK_BFLOAT16 ? from_bf16(to_bf16(value)) : value;
  }
};

// Quantise, and dequantise any range; returns how many numbers are not the nearest there are.
int check_format(int64_t count, int64_t blocksize, lk_dtype dtype, int threads) {
  const Floats x(count);
  Weight w(1, count, blocksize, false);
  std::vector<uint8_t> packed(w.packed.size(), 0xff), scales8(w.scales.size());
  std::vector<float> scales(w.scales.size()), nested((w.scales.size() + 255) / 256);
  int wrong = lk_nf4_quantize(dtype, x.as(dtype), count, blocksize, packed.data(), scales.data(),
                              threads) != LK_OK;
  w.packed = packed;
  w.scales = scales;
  w.matrix.packed = w.packed.data();
  w.matrix.absmax = w.scales.data();
  const int64_t first = below(static_cast<int>(count)), many = count - first - below(2);
  std::vector<unsigned char> out(static_cast<size_t>(many * (dtype == LK_FLOAT32 ? 4 : 2)));
  wrong += lk_nf4_dequantize(&w.matrix, dtype, first, many, out.data(), threads) != LK_OK;
  wrong += lk_nf4_dequantize(&w.matrix, dtype, first, count - first + 1, out.data(), threads) !=
           LK_BAD_ARGUMENT;
  for (int64_t i = 0; i < many; ++i) {
    const double number = static_cast<double>(x.wide[static_cast<size_t>(first + i)]);
    const double scale = static_cast<double>(scales[static_cast<size_t>((first + i) / blocksize)]);
    double nearest = 1e30;
    for (const float code : kCode) {
      const double value = static_cast<double>(code) * scale;
      if (std::fabs(value - number) < std::fabs(nearest - number)) nearest = value;
    }
    const double got = static_cast<double>(w.at(0, first + i, LK_FLOAT32));
    wrong += std::fabs(got - number) > std::fabs(nearest - number) + 1e-6 * scale;
    wrong += !close(out, i, dtype, got, scale);
  }
  const std::vector<uint8_t> points(65536, 7);
  wrong += lk_nf4_quantize_absmax(scales.data(), static_cast<int64_t>(scales.size()), 1.0f,
                                  points.data(), scales8.data(), nested.data(), threads) != LK_OK;
  for (const uint8_t index : scales8) wrong += index != 7;
  Floats bad = x;
  const size_t at = static_cast<size_t>(below(static_cast<int>(count)));
  bad.narrow[at] = 0x7f81;
  bad.wide[at] = from_bf16(bad.narrow[at]);
  wrong += lk_nf4_quantize(dtype, bad.as(dtype), count, blocksize, packed.data(), scales.data(),
                           threads) != LK_NOT_FINITE;
  return wrong;
}

// Tensors so large that several threads work on them: as one alone does.
int check_threads() {
  const int64_t count = (1 << 21) + 77;
  const Floats x(count);
  std::vector<uint8_t> points(65536), packed[2], scales8[2];
  for (auto& point : points) point = static_cast<uint8_t>(below(256));
  std::vector<float> scales[2], nested[2], values[2];
  int wrong = 0;
  for (int i = 0; i < 2; ++i) {
    const int threads = i == 0 ? 1 : 4;
    packed[i].resize(static_cast<size_t>((count + 1) / 2));
    scales[i].resize(static_cast<size_t>((count + 31) / 32));
    wrong += lk_nf4_quantize(LK_BFLOAT16, x.narrow.data(), count, 32, packed[i].data(),
                             scales[i].data(), threads) != LK_OK;
    scales8[i].resize(static_cast<size_t>(count));
    nested[i].resize(static_cast<size_t>((count + 255) / 256));
    wrong += lk_nf4_quantize_absmax(x.wide.data(), count, 0.5f, points.data(), scales8[i].data(),
                                    nested[i].data(), threads) != LK_OK;
    lk_nf4_matrix matrix{};
    matrix.packed = packed[i].data();
    matrix.absmax = scales[i].data();
    matrix.rows = 1;
    matrix.cols = count;
    matrix.blocksize = 32;
    values[i].resize(static_cast<size_t>(count - 5));
    wrong +=
        lk_nf4_dequantize(&matrix, LK_FLOAT32, 5, count - 5, values[i].data(), threads) != LK_OK;
  }
  wrong += packed[0] != packed[1] || scales[0] != scales[1] || values[0] != values[1];
  wrong += scales8[0] != scales8[1] || nested[0] != nested[1];
  return wrong;
}

}  // namespace

int main() {
  int wrong = 0, calls = 0;
  std::istringstream isas(lk_isas());
  for (std::string isa; isas >> isa;) {
    if (lk_set_isa(isa.c_str()) != LK_OK) return 1;
    for (int round = 0; round < 60; ++round, ++calls) {
      const lk_dtype dtype = below(2) == 0 ? LK_FLOAT32 : LK_BFLOAT16;
      const int64_t most = round % 10 == 0 ? 200000 : 3000;
      wrong += check_format(1 + below(static_cast<int>(most)), 32 << below(8), dtype, 1 + below(4));
    }
    wrong += check_threads();
    std::printf("%s: %d wrong after %d calls\n", isa.c_str(), wrong, calls);
  }
  return wrong == 0 ? 0 : 1;
}
