// The products of low-rank adapters.
#include "support.h"

namespace {

struct Case {
  int64_t rows, cols, rank;
  lk_dtype dtype;
  int threads;

  void say(Tally& tally, bool fine, const char* kernel) const {
    tally.expect(fine, "%s rows=%d cols=%d rank=%d dtype=%d: refused, or %d threads change bits",
                 kernel, int(rows), int(cols), int(rank), int(dtype), threads);
  }
};

// Whether element `at` of what a kernel made is the sum, which is rounded to the array's dtype.
void expect_sum(Tally& tally, const Case& c, const char* kernel, const Array& made, int64_t at,
                const Sum& sum) {
  tally.expect(close(made[at], sum.value, sum.size, made.dtype()),
               "%s rows=%d cols=%d rank=%d dtype=%d: element %d is %g, not %g", kernel, int(c.rows),
               int(c.cols), int(c.rank), int(c.dtype), int(at), made[at], sum.value);
}

const float* floats(const Array& array) { return static_cast<const float*>(array.data()); }
float* floats(Array& array) { return static_cast<float*>(array.data()); }

void check_narrow(Tally& tally, Random& random, const Case& c) {
  const int64_t stride = c.cols + random.below(3);
  const Array x(c.dtype, (c.rows - 1) * stride + c.cols, random);
  const Array p(LK_FLOAT32, c.rank * c.cols, random);
  Array out(LK_FLOAT32, c.rows * c.rank), again(LK_FLOAT32, c.rows * c.rank);
  const auto call = [&](Array& to, int threads) {
    return lk_low_rank_narrow(c.dtype, c.rows, c.cols, c.rank, x.data(), stride, floats(p),
                              floats(to), threads) == LK_OK;
  };
  c.say(tally, call(out, c.threads) && call(again, 1) && out == again, "low_rank_narrow");
  for (int probe = 0; probe < 30; ++probe) {
    const int64_t m = random.below(c.rows), j = random.below(c.rank);
    Sum sum;
    for (int64_t k = 0; k < c.cols; ++k) sum.add(x[m * stride + k] * p[j * c.cols + k]);
    expect_sum(tally, c, "low_rank_narrow", out, m * c.rank + j, sum);
  }
}

void check_widen(Tally& tally, Random& random, const Case& c, bool add) {
  const Array narrow(LK_FLOAT32, c.rows * c.rank, random), p(LK_FLOAT32, c.rank * c.cols, random);
  const Array before(c.dtype, c.rows * c.cols, random);
  Array out = add ? before : Array(c.dtype, c.rows * c.cols), again = out;
  const auto call = [&](Array& to, int threads) {
    return lk_low_rank_widen(c.dtype, c.rows, c.cols, c.rank, floats(narrow), floats(p), add,
                             to.data(), threads) == LK_OK;
  };
  c.say(tally, call(out, c.threads) && call(again, 1) && out == again, "low_rank_widen");
  for (int probe = 0; probe < 30; ++probe) {
    const int64_t m = random.below(c.rows), k = random.below(c.cols);
    Sum sum;
    for (int64_t j = 0; j < c.rank; ++j) sum.add(narrow[m * c.rank + j] * p[j * c.cols + k]);
    if (add) sum.add(before[m * c.cols + k]);
    expect_sum(tally, c, "low_rank_widen", out, m * c.cols + k, sum);
  }
}

void check_gradient(Tally& tally, Random& random, const Case& c) {
  const int64_t stride = c.cols + random.below(3);
  const Array x(c.dtype, (c.rows - 1) * stride + c.cols, random);
  const Array narrow(LK_FLOAT32, c.rows * c.rank, random);
  Array out(LK_FLOAT32, c.rank * c.cols), again(LK_FLOAT32, c.rank * c.cols);
  const auto call = [&](Array& to, int threads) {
    return lk_low_rank_gradient(c.dtype, c.rows, c.cols, c.rank, floats(narrow), x.data(), stride,
                                floats(to), threads) == LK_OK;
  };
  c.say(tally, call(out, c.threads) && call(again, 1) && out == again, "low_rank_gradient");
  for (int probe = 0; probe < 30; ++probe) {
    const int64_t j = random.below(c.rank), k = random.below(c.cols);
    Sum sum;
    for (int64_t m = 0; m < c.rows; ++m) sum.add(narrow[m * c.rank + j] * x[m * stride + k]);
    expect_sum(tally, c, "low_rank_gradient", out, j * c.cols + k, sum);
  }
}

void check(Tally& tally, Random& random, const Case& c) {
  check_narrow(tally, random, c);
  check_widen(tally, random, c, false);
  check_widen(tally, random, c, true);
  check_gradient(tally, random, c);
}

}  // namespace

void check_low_rank(Tally& tally, int rounds) {
  Random random(7);
  for (int round = 0; round < rounds; ++round) {
    Case c;
    c.rows = random.between(1, round % 3 == 0 ? 5 : 90);
    c.cols = random.between(1, 150);
    c.rank = random.between(1, round % 2 == 0 ? 9 : 64);
    c.dtype = random.dtype();
    c.threads = static_cast<int>(random.between(1, 4));
    check(tally, random, c);
  }
  for (const lk_dtype dtype : {LK_FLOAT32, LK_BFLOAT16, LK_FLOAT16}) {
    check(tally, random, {40, 1100, 11, dtype, 2});  // several slices of depth
    check(tally, random, {600, 70, 8, dtype, 3});    // several slices of tokens
  }
}
