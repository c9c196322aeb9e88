// nf4_swiglu.
#include "support.h"

namespace {

struct Case {
  int64_t M, N, K, gate_blocksize, up_blocksize;
  lk_dtype dtype;
  int threads;
  double deviation;  // of x: large ones saturate the sigmoid
};

void check(Tally& tally, Random& random, const Case& c) {
  const Weight gate(c.N, c.K, c.gate_blocksize, random.coin(), random);
  const Weight up(c.N, c.K, c.up_blocksize, random.coin(), random);
  const lk_nf4_matrix gate_matrix = gate.matrix(), up_matrix = up.matrix();
  const std::vector<double> g = gate.dequantized(c.dtype), u = up.dequantized(c.dtype);
  const int64_t stride = c.K + random.below(3);
  const Array x(c.dtype, c.M * stride, random, c.deviation);
  Array out(c.dtype, c.M * c.N), again(c.dtype, c.M * c.N);
  const bool ok = lk_nf4_swiglu(&gate_matrix, &up_matrix, c.dtype, c.M, x.data(), stride,
                                out.data(), c.threads) == LK_OK &&
                  lk_nf4_swiglu(&gate_matrix, &up_matrix, c.dtype, c.M, x.data(), stride,
                                again.data(), 1) == LK_OK;
  tally.expect(ok && out == again,
               "nf4_swiglu M=%d N=%d K=%d dtype=%d: refused, or %d threads change bits", int(c.M),
               int(c.N), int(c.K), int(c.dtype), c.threads);
  for (int probe = 0; probe < 40; ++probe) {
    const int64_t m = random.below(c.M), n = random.below(c.N);
    Sum gates, ups;
    for (int64_t k = 0; k < c.K; ++k) {
      gates.add(x[m * stride + k] * g[static_cast<size_t>(n * c.K + k)]);
      ups.add(x[m * stride + k] * u[static_cast<size_t>(n * c.K + k)]);
    }
    const double silu = gates.value / (1 + std::exp(-gates.value)), exact = silu * ups.value;
    // The slope of silu is below 1.1.
    const double size = 1.1 * gates.size * std::fabs(ups.value) + std::fabs(silu) * ups.size;
    const double got = out[m * c.N + n];
    tally.expect(close(got, exact, size, c.dtype),
                 "nf4_swiglu M=%d N=%d K=%d blocksizes=%d,%d dtype=%d: [%d, %d] is %g, not %g",
                 int(c.M), int(c.N), int(c.K), int(c.gate_blocksize), int(c.up_blocksize),
                 int(c.dtype), int(m), int(n), got, exact);
  }
}

void check_nan(Tally& tally, Random& random, lk_dtype dtype, int64_t M) {
  constexpr int64_t N = 37, K = 64;
  const Weight weight(N, K, 64, true, random);
  const lk_nf4_matrix matrix = weight.matrix();
  Array x(dtype, M * K, random), out(dtype, M * N);
  x.set_nan(K + 5);
  const lk_status status = lk_nf4_swiglu(&matrix, &matrix, dtype, M, x.data(), K, out.data(), 1);
  tally.expect(status == LK_OK, "nf4_swiglu of a NaN: status %d", int(status));
  for (int64_t i = 0; i < M * N; ++i) {
    tally.expect(std::isnan(out[i]) == (i / N == 1),
                 "nf4_swiglu M=%d dtype=%d of a NaN in row 1: [%d, %d] is %g", int(M), int(dtype),
                 int(i / N), int(i % N), out[i]);
  }
}

}  // namespace

void check_nf4_swiglu(Tally& tally, int rounds) {
  Random random(2);
  for (int round = 0; round < rounds; ++round) {
    Case c;
    c.M = random.between(1, round % 3 == 0 ? 16 : 70);
    c.N = random.between(1, 80);
    c.gate_blocksize = 16 << random.below(4);
    c.up_blocksize = random.below(4) == 0 ? 16 << random.below(4) : c.gate_blocksize;
    c.K = random_width(random, c.gate_blocksize, 300);
    c.dtype = random.dtype();
    c.threads = static_cast<int>(random.between(1, 4));
    c.deviation = random.coin() ? 1.0 : 0.05;
    check(tally, random, c);
  }
  for (const lk_dtype dtype : {LK_FLOAT32, LK_BFLOAT16, LK_FLOAT16}) {
    check(tally, random, {30, 40, 1700, 64, 64, dtype, 2, 0.1});  // several slices of depth
    check(tally, random, {30, 1100, 64, 64, 64, dtype, 3, 1.0});  // several pieces
    check(tally, random, {20, 30, 300, 32, 32, dtype, 1, 10.0});  // sums in the hundreds
    check_nan(tally, random, dtype, 3);
    check_nan(tally, random, dtype, 20);
  }
}
