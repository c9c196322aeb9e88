// ranged_attention and its gradients: shared keys, ranges, strides.
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

// Attention's results and gradients at given places, in double, and the sizes of their terms.
class Exact {
 public:
  Exact(const Case& c, const Heads& q, const Heads& k, const Heads& v, const Array& grad,
        const std::vector<int64_t>& first, double scale)
      : c_(c), q_(q), k_(k), v_(v), grad_(grad), first_(first), scale_(scale) {}

  // What query s of head h weighs its keys with, and the gradients of its scores.
  struct Row {
    int64_t begin;
    double lse, size;  // of the scores
    std::vector<double> weights, slopes, slope_sizes;
  };

  Row row(int64_t b, int64_t h, int64_t s) const {
    const int64_t last = c_.T - c_.S + s;
    Row row{c_.with_first ? first_[static_cast<size_t>(b * c_.S + s)] : 0, 0, 1, {}, {}, {}};
    double largest = -HUGE_VAL, total = 0;
    for (int64_t t = row.begin; t <= last; ++t) {
      Sum sum;
      for (int64_t d = 0; d < c_.width; ++d) {
        sum.add(q_.at(b, h, s, d) * k_.at(b, h / c_.group, t, d));
      }
      row.weights.push_back(scale_ * sum.value);
      largest = std::fmax(largest, scale_ * sum.value);
      row.size = std::fmax(row.size, scale_ * sum.size);
    }
    for (double& weight : row.weights) total += weight = std::exp(weight - largest);
    row.lse = largest + std::log(total);
    Sum delta;
    std::vector<Sum> products;
    for (int64_t t = row.begin; t <= last; ++t) {
      double& weight = row.weights[static_cast<size_t>(t - row.begin)];
      weight /= total;
      Sum product;
      for (int64_t d = 0; d < c_.width; ++d) {
        product.add(grad(b, h, s, d) * v_.at(b, h / c_.group, t, d));
      }
      products.push_back(product);
      delta.value += weight * product.value;
      delta.size += weight * product.size;
    }
    for (size_t i = 0; i < products.size(); ++i) {
      const double weight = scale_ * row.weights[i];
      row.slopes.push_back(weight * (products[i].value - delta.value));
      row.slope_sizes.push_back(weight * (products[i].size + delta.size));
    }
    return row;
  }

  double grad(int64_t b, int64_t h, int64_t s, int64_t d) const {
    return grad_[((b * c_.S + s) * c_.key_heads * c_.group + h) * c_.width + d];
  }

 private:
  const Case& c_;
  const Heads &q_, &k_, &v_;
  const Array& grad_;
  const std::vector<int64_t>& first_;
  double scale_;
};

// Whether a gradient is as exact as its inputs' dtype allows, where `size` is that of its terms:
// weights, their gradients and the result are rounded to it on the way.
bool close_gradient(double got, double exact, double size, double scores, lk_dtype dtype) {
  const double allowed = dtype == LK_FLOAT32 ? 0 : std::ldexp(size, 2 - precision(dtype));
  return std::fabs(got - exact) <= kClose * size * (1 + scores) + allowed + 1e-30;
}

void check(Tally& tally, Random& random, const Case& c) {
  const int64_t heads = c.key_heads * c.group, past = c.T - c.S;
  const Heads q(c.dtype, c.batch, heads, c.S, c.width, random);
  const Heads k(c.dtype, c.batch, c.key_heads, c.T, c.width, random);
  const Heads v(c.dtype, c.batch, c.key_heads, c.T, c.width, random);
  const Array grad(c.dtype, c.batch * c.S * heads * c.width, random);
  std::vector<int64_t> first;
  for (int64_t i = 0; i < c.batch * c.S; ++i) first.push_back(random.below(past + i % c.S + 1));
  const double scale = 1 / std::sqrt(static_cast<double>(c.width));
  struct Results {
    Array out, lse, dq, dk, dv;
    bool operator==(const Results& other) const {
      return out == other.out && lse == other.lse && dq == other.dq && dk == other.dk &&
             dv == other.dv;
    }
  };
  const auto call = [&](Results& r, bool with_lse, int threads) {
    return lk_ranged_attention(
               c.dtype, c.batch, heads, c.key_heads, c.S, c.T, c.width, q.values.data(), &q.strides,
               k.values.data(), &k.strides, v.values.data(), &v.strides,
               c.with_first ? first.data() : nullptr, static_cast<float>(scale), r.out.data(),
               with_lse ? static_cast<float*>(r.lse.data()) : nullptr, threads) == LK_OK;
  };
  const auto call_backward = [&](Results& r, int threads) {
    return lk_ranged_attention_backward(
               c.dtype, c.batch, heads, c.key_heads, c.S, c.T, c.width, q.values.data(), &q.strides,
               k.values.data(), &k.strides, v.values.data(), &v.strides,
               c.with_first ? first.data() : nullptr, static_cast<float>(scale), grad.data(),
               r.out.data(), static_cast<const float*>(r.lse.data()),
               static_cast<float*>(r.dq.data()), static_cast<float*>(r.dk.data()),
               static_cast<float*>(r.dv.data()), threads) == LK_OK;
  };
  const int64_t queries = c.batch * c.S * heads, keys = c.batch * c.T * c.key_heads;
  const auto zeros = [](int64_t count) {
    Array array(LK_FLOAT32, count);
    for (int64_t i = 0; i < count; ++i) array.set(i, 0);
    return array;
  };
  Results results{Array(c.dtype, queries * c.width), Array(LK_FLOAT32, queries),
                  zeros(queries * c.width), zeros(keys * c.width), zeros(keys * c.width)};
  Results again = results, without = results;
  const bool ok = call(results, true, c.threads) && call_backward(results, c.threads) &&
                  call(again, true, 1) && call_backward(again, 1) && call(without, false, 1);
  tally.expect(ok && results == again && results.out == without.out,
               "ranged_attention S=%d T=%d dtype=%d: refused, or %d threads change bits", int(c.S),
               int(c.T), int(c.dtype), c.threads);

  const Exact exact(c, q, k, v, grad, first, scale);
  const auto expect = [&](bool fine, const char* what, int64_t token, int64_t d, double got,
                          double wanted) {
    tally.expect(fine,
                 "ranged_attention batch=%d heads=%d/%d S=%d T=%d head_dim=%d dtype=%d: "
                 "%s[%d, %d] is %g, not %g",
                 int(c.batch), int(heads), int(c.key_heads), int(c.S), int(c.T), int(c.width),
                 int(c.dtype), what, int(token), int(d), got, wanted);
  };
  for (int probe = 0; probe < 6; ++probe) {
    const int64_t b = random.below(c.batch), h = random.below(heads), s = random.below(c.S);
    const int64_t at = (b * c.S + s) * heads + h, key_head = h / c.group;
    const Exact::Row row = exact.row(b, h, s);
    const double lse = results.lse[(b * heads + h) * c.S + s];
    expect(close(lse, row.lse, row.size + std::fabs(row.lse), LK_FLOAT32), "lse", s, 0, lse,
           row.lse);
    for (int64_t d = 0; d < c.width; ++d) {
      Sum out, dq;
      for (size_t i = 0; i < row.weights.size(); ++i) {
        const int64_t t = row.begin + static_cast<int64_t>(i);
        out.add(row.weights[i] * v.at(b, key_head, t, d));
        dq.value += row.slopes[i] * k.at(b, key_head, t, d);
        dq.size += row.slope_sizes[i] * std::fabs(k.at(b, key_head, t, d));
      }
      const double got = results.out[at * c.width + d], got_dq = results.dq[at * c.width + d];
      expect(
          close(got, out.value, out.size * (1 + row.size), c.dtype, pairs_error(out.size, c.dtype)),
          "out", s, d, got, out.value);
      expect(close_gradient(got_dq, dq.value, dq.size, row.size, c.dtype), "dq", s, d, got_dq,
             dq.value);
    }
  }
  const int64_t b = random.below(c.batch), key_head = random.below(c.key_heads);
  const int64_t t = random.below(c.T), d = random.below(c.width);
  Sum dk, dv;
  double size = 1;
  for (int64_t h = key_head * c.group; h < (key_head + 1) * c.group; ++h) {
    for (int64_t s = t > past ? t - past : 0; s < c.S; ++s) {
      const Exact::Row row = exact.row(b, h, s);
      if (t < row.begin) continue;
      const size_t i = static_cast<size_t>(t - row.begin);
      dv.add(row.weights[i] * exact.grad(b, h, s, d));
      dk.value += row.slopes[i] * q.at(b, h, s, d);
      dk.size += row.slope_sizes[i] * std::fabs(q.at(b, h, s, d));
      size = std::fmax(size, row.size);
    }
  }
  const int64_t at = ((b * c.T + t) * c.key_heads + key_head) * c.width + d;
  expect(close_gradient(results.dk[at], dk.value, dk.size, size, c.dtype), "dk", t, d,
         results.dk[at], dk.value);
  expect(close_gradient(results.dv[at], dv.value, dv.size, size, c.dtype), "dv", t, d,
         results.dv[at], dv.value);
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
