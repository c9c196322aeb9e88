// nf4_linear_int8 and nf4_swiglu_int8.
#include "support.h"

namespace {

struct Case {
  int64_t M, N, blocks, blocksize;
  lk_dtype dtype;
  int threads;
  double deviation;  // of x

  int64_t K() const { return blocks * blocksize; }
};

// What the kernels round x to: whole numbers, and for each the factor that turns it back.
struct Rounded {
  std::vector<float> q;
  std::vector<double> steps;

  Rounded(const Array& x, int64_t first, int64_t count, int64_t blocksize) {
    for (int64_t block = first; block < first + count; block += blocksize) {
      float most = 0;
      for (int64_t k = block; k < block + blocksize; ++k) {
        const float size = std::fabs(static_cast<float>(x[k]));
        if (size > most) most = size;
      }
      const float by = 127.0f / most;
      for (int64_t k = block; k < block + blocksize; ++k) {
        q.push_back(most > 0 ? std::nearbyint(static_cast<float>(x[k]) * by) : 0.0f);
        steps.push_back(static_cast<double>(most) / 127.0);
      }
    }
  }

  Sum times(const Weight& w, int64_t n) const {
    Sum sum;
    const int64_t count = static_cast<int64_t>(q.size());
    for (int64_t k = 0; k < count; ++k) {
      const float code = std::nearbyint(127.0f * w.code_of(n * count + k));
      sum.add(static_cast<double>(q[static_cast<size_t>(k)] * code) *
              steps[static_cast<size_t>(k)] * static_cast<double>(w.scale_of(n * count + k)) /
              127.0);
    }
    return sum;
  }
};

void check(Tally& tally, Random& random, const Case& c) {
  const int64_t K = c.K(), stride = K + random.below(3), more = c.N + random.below(3);
  const Weight w(c.N, K, c.blocksize, random.coin(), random);
  const Weight up(c.N, K, c.blocksize, random.coin(), random);
  const lk_nf4_matrix matrix = w.matrix(), up_matrix = up.matrix();
  Array x(c.dtype, c.M * stride, random, c.deviation);
  for (int64_t k = 0; k < K; ++k) x.set((c.M - 1) * stride + k, 0);  // a row of zeros
  const Array bias(c.dtype, c.N, random), residual(c.dtype, c.M * more, random);
  const bool with_bias = random.coin(), with_residual = random.coin();
  Array out(c.dtype, c.M * c.N), gated(c.dtype, c.M * c.N), again(out), gated_again(out);
  bool ok = true;
  for (int turn = 0; turn < 2; ++turn) {
    const int threads = turn == 0 ? c.threads : 1;
    ok = ok && lk_nf4_linear_int8(&matrix, c.dtype, c.M, x.data(), stride,
                                  with_bias ? bias.data() : nullptr,
                                  with_residual ? residual.data() : nullptr, more,
                                  (turn == 0 ? out : again).data(), threads) == LK_OK;
    ok = ok && lk_nf4_swiglu_int8(&matrix, &up_matrix, c.dtype, c.M, x.data(), stride,
                                  (turn == 0 ? gated : gated_again).data(), threads) == LK_OK;
  }
  tally.expect(ok && out == again && gated == gated_again,
               "int8 M=%d N=%d K=%d blocksize=%d dtype=%d: refused, or %d threads change bits",
               int(c.M), int(c.N), int(K), int(c.blocksize), int(c.dtype), c.threads);
  for (int probe = 0; probe < 40; ++probe) {
    const int64_t m = probe == 0 ? c.M - 1 : random.below(c.M), n = random.below(c.N);
    const Rounded rounded(x, m * stride, K, c.blocksize);
    const Sum gates = rounded.times(w, n), ups = rounded.times(up, n);
    Sum linear = gates;
    if (with_bias) linear.add(bias[n]);
    if (with_residual) linear.add(residual[m * more + n]);
    const double silu = gates.value / (1 + std::exp(-gates.value)), exact = silu * ups.value;
    // The slope of silu is below 1.1.
    const double size = 1.1 * gates.size * std::fabs(ups.value) + std::fabs(silu) * ups.size;
    tally.expect(close(out[m * c.N + n], linear.value, linear.size, c.dtype),
                 "nf4_linear_int8 M=%d N=%d K=%d blocksize=%d dtype=%d: [%d, %d] is %g, not %g",
                 int(c.M), int(c.N), int(K), int(c.blocksize), int(c.dtype), int(m), int(n),
                 out[m * c.N + n], linear.value);
    tally.expect(close(gated[m * c.N + n], exact, size, c.dtype),
                 "nf4_swiglu_int8 M=%d N=%d K=%d blocksize=%d dtype=%d: [%d, %d] is %g, not %g",
                 int(c.M), int(c.N), int(K), int(c.blocksize), int(c.dtype), int(m), int(n),
                 gated[m * c.N + n], exact);
  }
}

void check_nan(Tally& tally, Random& random, lk_dtype dtype, int64_t M) {
  constexpr int64_t N = 37, K = 96;
  const Weight weight(N, K, 32, true, random);
  const lk_nf4_matrix matrix = weight.matrix();
  Array x(dtype, M * K, random), out(dtype, M * N);
  x.set_nan(K + 5);
  const lk_status status =
      lk_nf4_linear_int8(&matrix, dtype, M, x.data(), K, nullptr, nullptr, 0, out.data(), 1);
  tally.expect(status == LK_OK, "nf4_linear_int8 of a NaN: status %d", int(status));
  for (int64_t i = 0; i < M * N; ++i) {
    tally.expect(std::isnan(out[i]) == (i / N == 1),
                 "nf4_linear_int8 M=%d dtype=%d of a NaN in row 1: [%d, %d] is %g", int(M),
                 int(dtype), int(i / N), int(i % N), out[i]);
  }
}

}  // namespace

void check_nf4_linear_int8(Tally& tally, int rounds) {
  Random random(5);
  for (int round = 0; round < rounds; ++round) {
    const int64_t blocksize = 32 << random.below(4);
    check(tally, random,
          {random.between(1, round % 2 == 0 ? 6 : 60), random.between(1, 90), random.between(1, 5),
           blocksize, random.dtype(), int(random.between(1, 4)), round % 5 == 0 ? 1e-3 : 1.0});
  }
  check(tally, random, {250, 70, 27, 64, LK_BFLOAT16, 2, 1.0});  // several slices of depth
  check(tally, random, {250, 70, 27, 64, LK_FLOAT32, 3, 1.0});   // which sum in the output
  check(tally, random, {20, 2100, 1, 64, LK_FLOAT32, 3, 1.0});   // several pieces
  check(tally, random, {3, 30, 2, 4096, LK_FLOAT16, 2, 1e-3});   // large blocks
  check(tally, random, {20, 30, 2, 4096, LK_FLOAT16, 2, 1e-3});
  check(tally, random, {2060, 20, 1, 32, LK_FLOAT32, 2, 1.0});  // several parts of x
  for (const int64_t M : {2, 30}) {
    for (const lk_dtype dtype : {LK_FLOAT32, LK_BFLOAT16, LK_FLOAT16}) {
      check_nan(tally, random, dtype, M);
    }
  }
}
