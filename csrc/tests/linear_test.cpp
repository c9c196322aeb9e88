// Runs every kernel of every variant over many shapes, against sums in double, from one thread and
// from several at once. For sanitizer builds above all: `make sanitize`.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

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

// One random call of each product; returns how many results are wrong.
int check_once(int64_t M, int64_t N, int64_t K, int64_t blocksize, bool twice, lk_dtype dtype,
               int threads) {
  const Weight w(N, K, blocksize, twice);
  const int64_t size = dtype == LK_FLOAT32 ? 4 : 2, stride = K + below(3);
  const Floats x(M * stride), bias(N), residual(M * N), grad(M * N);
  const bool with_bias = below(2) == 1, with_residual = below(2) == 1;
  // Exactly as large as needed: a sanitizer sees a byte beyond.
  std::vector<unsigned char> out(static_cast<size_t>(M * N * size), 0xff);
  std::vector<unsigned char> back(static_cast<size_t>(M * K * size), 0xff);
  int wrong = 0;
  wrong +=
      lk_nf4_linear(&w.matrix, dtype, M, x.as(dtype), stride, with_bias ? bias.as(dtype) : nullptr,
                    with_residual ? residual.as(dtype) : nullptr, N, out.data(), threads) != LK_OK;
  wrong += lk_nf4_linear_transposed(&w.matrix, dtype, M, grad.as(dtype), N, back.data(), threads) !=
           LK_OK;
  for (int probe = 0; probe < 40; ++probe) {
    const int64_t m = below(static_cast<int>(M)), n = below(static_cast<int>(N)),
                  k = below(static_cast<int>(K));
    double sum = 0, size_of_sum = 1, sum_back = 0, size_of_back = 1;
    for (int64_t i = 0; i < K; ++i) {
      const double term = static_cast<double>(x.wide[static_cast<size_t>(m * stride + i)]) *
                          static_cast<double>(w.at(n, i, dtype));
      sum += term;
      size_of_sum += std::fabs(term);
    }
    if (with_bias) sum += static_cast<double>(bias.wide[static_cast<size_t>(n)]);
    if (with_residual) sum += static_cast<double>(residual.wide[static_cast<size_t>(m * N + n)]);
    for (int64_t i = 0; i < N; ++i) {
      const double term = static_cast<double>(grad.wide[static_cast<size_t>(m * N + i)]) *
                          static_cast<double>(w.at(i, k, dtype));
      sum_back += term;
      size_of_back += std::fabs(term);
    }
    wrong += !close(out, m * N + n, dtype, sum, size_of_sum);
    wrong += !close(back, m * K + k, dtype, sum_back, size_of_back);
  }
  return wrong;
}

// Several callers at once, each with its own data, while the pool is one.
int check_callers() {
  const Weight w(150, 320, 64, true);
  std::vector<int> wrong(4, 0);
  std::vector<std::thread> callers;
  const Floats x(40 * 320);
  std::vector<float> wanted(40 * 150);
  lk_nf4_linear(&w.matrix, LK_FLOAT32, 40, x.wide.data(), 320, nullptr, nullptr, 0, wanted.data(),
                1);
  for (size_t c = 0; c < wrong.size(); ++c) {
    callers.emplace_back([&, c] {
      std::vector<float> out(40 * 150);
      for (int round = 0; round < 20; ++round) {
        lk_nf4_linear(&w.matrix, LK_FLOAT32, 40, x.wide.data(), 320, nullptr, nullptr, 0,
                      out.data(), 1 + static_cast<int>(c));
        wrong[c] += std::memcmp(out.data(), wanted.data(), sizeof(float) * out.size()) != 0;
      }
    });
  }
  for (auto& caller : callers) caller.join();
  return wrong[0] + wrong[1] + wrong[2] + wrong[3];
}

}  // namespace

int main() {
  int wrong = 0, calls = 0;
  std::istringstream isas(lk_isas());
  for (std::string isa; isas >> isa;) {
    if (lk_set_isa(isa.c_str()) != LK_OK) return 1;
    for (int round = 0; round < 150; ++round, ++calls) {
      const int64_t M = 1 + below(round % 3 == 0 ? 16 : 90), N = 1 + below(100);
      const int64_t blocksize = 32 << below(4);
      const int64_t K = below(2) == 0 ? blocksize * (1 + below(3)) : 1 + below(500);
      const lk_dtype dtype = below(2) == 0 ? LK_FLOAT32 : LK_BFLOAT16;
      wrong += check_once(M, N, K, blocksize, below(2) == 1, dtype, 1 + below(4));
    }
    wrong += check_once(30, 40, 1700, 64, true, LK_BFLOAT16, 2);  // several slices of depth
    wrong += check_once(30, 2100, 64, 64, true, LK_FLOAT32, 3);   // several pieces
    wrong += check_callers();
    std::printf("%s: %d wrong after %d calls\n", isa.c_str(), wrong, calls);
  }
  return wrong == 0 ? 0 : 1;
}
