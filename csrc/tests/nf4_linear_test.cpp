// nf4_linear and its transposed product.
#include "support.h"

namespace {

struct Case {
  int64_t M, N, K, blocksize;
  bool nested;
  lk_dtype dtype;
  int threads;
};

void check(Tally& tally, Random& random, const Case& c) {
  const Weight weight(c.N, c.K, c.blocksize, c.nested, random);
  const lk_nf4_matrix matrix = weight.matrix();
  std::vector<double> w = weight.dequantized(c.dtype);
  const int64_t rows_below = random.between(1, 60);
  const Weight below(rows_below, c.K, 16 << random.below(5), random.coin(), random);
  const lk_nf4_matrix matrix_below = below.matrix();
  const bool two = random.coin();  // matrices in the transposed product
  const int64_t depth = c.N + (two ? rows_below : 0);
  const int64_t x_stride = c.K + random.below(3), grad_stride = depth + random.below(3);
  const int64_t residual_stride = c.N + random.below(3);
  const Array x(c.dtype, c.M * x_stride, random), grad(c.dtype, c.M * grad_stride, random);
  const Array bias(c.dtype, c.N, random), residual(c.dtype, c.M * residual_stride, random);
  const bool with_bias = random.coin(), with_residual = random.coin();

  const auto forward = [&](Array& out, int threads) {
    return lk_nf4_linear(&matrix, c.dtype, c.M, x.data(), x_stride,
                         with_bias ? bias.data() : nullptr,
                         with_residual ? residual.data() : nullptr, residual_stride, out.data(),
                         threads) == LK_OK;
  };
  const auto backward = [&](Array& out, int threads) {
    return lk_nf4_linear_transposed(&matrix, two ? &matrix_below : nullptr, c.dtype, c.M,
                                    grad.data(), grad_stride, out.data(), threads) == LK_OK;
  };
  Array out(c.dtype, c.M * c.N), out_again(c.dtype, c.M * c.N);
  Array back(c.dtype, c.M * c.K), back_again(c.dtype, c.M * c.K);
  const bool ok = forward(out, c.threads) && forward(out_again, 1) && backward(back, c.threads) &&
                  backward(back_again, 1);
  tally.expect(ok && out == out_again && back == back_again,
               "nf4_linear M=%d N=%d K=%d dtype=%d: refused, or %d threads change bits", int(c.M),
               int(c.N), int(c.K), int(c.dtype), c.threads);

  const std::vector<double> w_below = below.dequantized(c.dtype);
  w.insert(w.end(), w_below.begin(), w_below.end());
  for (int probe = 0; probe < 40; ++probe) {
    const int64_t m = random.below(c.M), n = random.below(c.N), k = random.below(c.K);
    Sum sum, sum_back;
    for (int64_t i = 0; i < c.K; ++i) {
      sum.add(x[m * x_stride + i] * w[static_cast<size_t>(n * c.K + i)]);
    }
    if (with_bias) sum.add(bias[n]);
    if (with_residual) sum.add(residual[m * residual_stride + n]);
    for (int64_t i = 0; i < depth; ++i) {
      sum_back.add(grad[m * grad_stride + i] * w[static_cast<size_t>(i * c.K + k)]);
    }
    const double got = out[m * c.N + n], got_back = back[m * c.K + k];
    tally.expect(close(got, sum.value, sum.size, c.dtype),
                 "nf4_linear M=%d N=%d K=%d blocksize=%d dtype=%d: [%d, %d] is %g, not %g",
                 int(c.M), int(c.N), int(c.K), int(c.blocksize), int(c.dtype), int(m), int(n), got,
                 sum.value);
    tally.expect(close(got_back, sum_back.value, sum_back.size, c.dtype),
                 "transposed M=%d N=%d K=%d blocksize=%d dtype=%d: [%d, %d] is %g, not %g",
                 int(c.M), int(depth), int(c.K), int(c.blocksize), int(c.dtype), int(m), int(k),
                 got_back, sum_back.value);
  }
}

// Every number that 16 bits hold comes through a sum with `x` unharmed, or rounded as it should be.
void check_halves(Tally& tally, lk_dtype dtype, double x_value) {
  constexpr int64_t M = 4096, N = 16;
  const uint8_t packed[N / 2] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff};  // ones
  const float absmax[1] = {1.0f};
  lk_nf4_matrix ones{};
  ones.packed = packed;
  ones.absmax = absmax;
  ones.rows = N;
  ones.cols = 1;
  ones.blocksize = N;
  Array x(dtype, M), residual(dtype, M * N), out(dtype, M * N);
  for (int64_t m = 0; m < M; ++m) x.set(m, x_value);
  for (int64_t i = 0; i < M * N; ++i) residual.set_bits(i, static_cast<uint16_t>(i));
  const lk_status status =
      lk_nf4_linear(&ones, dtype, M, x.data(), 1, nullptr, residual.data(), N, out.data(), 1);
  tally.expect(status == LK_OK, "nf4_linear of every half: status %d", int(status));
  for (int64_t i = 0; i < M * N; ++i) {
    const double exact =
        round_to(static_cast<double>(static_cast<float>(x_value + residual[i])), dtype);
    const bool fine = std::isnan(exact) ? std::isnan(out[i]) : out[i] == exact;
    tally.expect(fine, "dtype=%d: %g + %g is %g", int(dtype), x_value, residual[i], out[i]);
  }
}

// A row with a NaN or an infinity is that row's matter.
void check_not_finite(Tally& tally, Random& random, lk_dtype dtype, int64_t M) {
  constexpr int64_t N = 37, K = 128;
  const Weight weight(N, K, 64, true, random);
  const lk_nf4_matrix matrix = weight.matrix();
  Array x(dtype, M * K, random);
  Array clean(dtype, M * N), out(dtype, M * N);
  bool ok =
      lk_nf4_linear(&matrix, dtype, M, x.data(), K, nullptr, nullptr, 0, clean.data(), 1) == LK_OK;
  x.set_nan(K + 5);
  ok = ok &&
       lk_nf4_linear(&matrix, dtype, M, x.data(), K, nullptr, nullptr, 0, out.data(), 1) == LK_OK;
  tally.expect(ok, "nf4_linear of a NaN: %s", "refused");
  for (int64_t i = 0; i < M * N; ++i) {
    tally.expect(i / N == 1 ? std::isnan(out[i]) : out[i] == clean[i],
                 "nf4_linear M=%d dtype=%d of a NaN in row 1: [%d, %d] is %g", int(M), int(dtype),
                 int(i / N), int(i % N), out[i]);
  }
}

}  // namespace

void check_nf4_linear(Tally& tally, int rounds) {
  Random random(1);
  for (int round = 0; round < rounds; ++round) {
    Case c;
    c.M = random.between(1, round % 3 == 0 ? 16 : 90);
    c.N = random.between(1, 100);
    c.blocksize = 16 << random.below(5);
    c.K = random_width(random, c.blocksize, 500);
    c.nested = random.coin();
    c.dtype = random.dtype();
    c.threads = static_cast<int>(random.between(1, 4));
    check(tally, random, c);
  }
  for (const lk_dtype dtype : {LK_FLOAT32, LK_BFLOAT16, LK_FLOAT16}) {
    check(tally, random, {30, 40, 1700, 64, true, dtype, 2});  // several slices of depth
    check(tally, random, {30, 2100, 64, 64, true, dtype, 3});  // several pieces
    check_not_finite(tally, random, dtype, 3);
    check_not_finite(tally, random, dtype, 20);
    if (dtype == LK_FLOAT32) continue;
    for (const double x : {0.0, 0x1p-8}) check_halves(tally, dtype, x);
  }
}
