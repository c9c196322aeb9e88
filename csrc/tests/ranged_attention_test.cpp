// ranged_attention: shared keys, ranges, strides.
#include "support.h"

namespace {

struct Case {
  int64_t batch, key_heads, group, S, T, width;
  bool with_first;
  lk_dtype dtype;
  int threads;
};

// An array [batch, heads, tokens, width] whose heads lie side by side in a token, with a gap.
struct Heads {
  lk_strides strides;
  Array values;

  Heads(lk_dtype dtype, int64_t batch, int64_t heads, int64_t tokens, int64_t width, Random& random)
      : strides{0, width, heads * width + random.below(3)},
        values(dtype, batch * tokens * strides.token, random) {
    strides.batch = tokens * strides.token;
  }
  double at(int64_t b, int64_t h, int64_t t, int64_t d) const {
    return values[b * strides.batch + h * strides.head + t * strides.token + d];
  }
};

void check(Tally& tally, Random& random, const Case& c) {
  const int64_t heads = c.key_heads * c.group, past = c.T - c.S;
  const Heads q(c.dtype, c.batch, heads, c.S, c.width, random);
  const Heads k(c.dtype, c.batch, c.key_heads, c.T, c.width, random);
  const Heads v(c.dtype, c.batch, c.key_heads, c.T, c.width, random);
  std::vector<int64_t> first;
  for (int64_t i = 0; i < c.batch * c.S; ++i) first.push_back(random.below(past + i % c.S + 1));
  const double scale = 1 / std::sqrt(static_cast<double>(c.width));
  const auto call = [&](Array& out, int threads) {
    return lk_ranged_attention(c.dtype, c.batch, heads, c.key_heads, c.S, c.T, c.width,
                               q.values.data(), &q.strides, k.values.data(), &k.strides,
                               v.values.data(), &v.strides, c.with_first ? first.data() : nullptr,
                               static_cast<float>(scale), out.data(), threads) == LK_OK;
  };
  Array out(c.dtype, c.batch * c.S * heads * c.width), again = out;
  const bool ok = call(out, c.threads) && call(again, 1);
  tally.expect(ok && out == again,
               "ranged_attention S=%d T=%d dtype=%d: refused, or %d threads change bits", int(c.S),
               int(c.T), int(c.dtype), c.threads);
  for (int probe = 0; probe < 6; ++probe) {
    const int64_t b = random.below(c.batch), h = random.below(heads), s = random.below(c.S);
    const int64_t begin = c.with_first ? first[static_cast<size_t>(b * c.S + s)] : 0;
    std::vector<double> scores;
    double largest = -HUGE_VAL, size = 1, total = 0;
    for (int64_t t = begin; t <= past + s; ++t) {
      Sum sum;
      for (int64_t d = 0; d < c.width; ++d) sum.add(q.at(b, h, s, d) * k.at(b, h / c.group, t, d));
      scores.push_back(scale * sum.value);
      largest = std::fmax(largest, scale * sum.value);
      size = std::fmax(size, scale * sum.size);
    }
    for (double& score : scores) total += score = std::exp(score - largest);
    for (int64_t d = 0; d < c.width; ++d) {
      Sum sum;
      for (int64_t t = begin; t <= past + s; ++t) {
        sum.add(scores[static_cast<size_t>(t - begin)] / total * v.at(b, h / c.group, t, d));
      }
      const double got = out[((b * c.S + s) * heads + h) * c.width + d];
      tally.expect(
          close(got, sum.value, sum.size * (1 + size), c.dtype, pairs_error(sum.size, c.dtype)),
          "ranged_attention batch=%d heads=%d/%d S=%d T=%d head_dim=%d dtype=%d: "
          "[%d, %d, %d, %d] is %g, not %g",
          int(c.batch), int(heads), int(c.key_heads), int(c.S), int(c.T), int(c.width),
          int(c.dtype), int(b), int(s), int(h), int(d), got, sum.value);
    }
  }
}

}  // namespace

void check_ranged_attention(Tally& tally, int rounds) {
  Random random(4);
  for (int round = 0; round < rounds; ++round) {
    Case c;
    c.batch = random.between(1, 2);
    c.key_heads = random.between(1, 2);
    c.group = random.between(1, 3);
    c.S = random.between(1, round % 4 == 0 ? 200 : 30);
    c.T = c.S + (random.coin() ? 0 : random.below(200));
    c.width = random.between(1, 70);
    c.with_first = random.coin();
    c.dtype = random.dtype();
    c.threads = static_cast<int>(random.between(1, 4));
    check(tally, random, c);
  }
}
