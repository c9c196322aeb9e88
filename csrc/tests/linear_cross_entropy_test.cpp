// linear_cross_entropy: dense and NF4 heads, loss and gradient.
#include <algorithm>

#include "support.h"

namespace {

struct Case {
  int64_t T, V, D, blocksize;
  bool nf4;
  lk_dtype dtype, head_dtype;  // a dense head may have a dtype of its own
  double softcap, scale;
  bool with_gradient, likely;  // likely: the label is what the logits favour, the loss near zero
  int threads;
};

void check(Tally& tally, Random& random, const Case& c) {
  const double deviation = 2 / std::sqrt(static_cast<double>(c.D));
  const int64_t stride = c.D + random.below(3), grad_stride = c.D + random.below(3);
  const Array hidden(c.dtype, c.T * stride, random, c.likely ? 40.0 : 1.0);

  const Weight weight(c.V, c.D, c.blocksize, random.coin(), random, static_cast<float>(deviation));
  const int64_t head_stride = c.D + random.below(3);
  const Array dense(c.head_dtype, c.V * head_stride, random, deviation);
  const lk_nf4_matrix nf4_matrix = weight.matrix();
  const lk_dense_matrix dense_matrix{dense.data(), c.head_dtype, c.V, c.D, head_stride};
  std::vector<double> head;
  if (c.nf4) {
    head = weight.dequantized(c.dtype);
  } else {
    for (int64_t v = 0; v < c.V; ++v) {
      for (int64_t d = 0; d < c.D; ++d) head.push_back(dense[v * head_stride + d]);
    }
  }

  double size = 1;  // of a logit's terms
  const auto logits_of = [&](int64_t t) {
    std::vector<double> logits;
    for (int64_t v = 0; v < c.V; ++v) {
      Sum sum;
      for (int64_t d = 0; d < c.D; ++d) {
        sum.add(hidden[t * stride + d] * head[static_cast<size_t>(v * c.D + d)]);
      }
      const double z = c.scale * sum.value;
      logits.push_back(c.softcap > 0 ? c.softcap * std::tanh(z / c.softcap) : z);
      size = std::fmax(size, c.scale * sum.size);
    }
    return logits;
  };
  std::vector<int64_t> tokens, labels;
  for (int64_t t = 0; t < c.T; ++t) {
    const bool counts = t == 0 || random.below(4) != 0;
    if (counts) tokens.push_back(t);
    labels.push_back(counts ? random.below(c.V) : -100);  // not to be looked at
    if (!counts || !c.likely) continue;
    const std::vector<double> logits = logits_of(t);
    labels.back() = std::max_element(logits.begin(), logits.end()) - logits.begin();
  }
  const int64_t count = static_cast<int64_t>(tokens.size());

  const auto call = [&](Array& loss, Array& lse, Array& grad, int threads) {
    return lk_linear_cross_entropy(
               c.nf4 ? &nf4_matrix : nullptr, c.nf4 ? nullptr : &dense_matrix, c.dtype,
               hidden.data(), stride, tokens.data(), labels.data(), count,
               static_cast<float>(c.softcap), static_cast<float>(c.scale),
               static_cast<float*>(loss.data()), static_cast<float*>(lse.data()),
               c.with_gradient ? grad.data() : nullptr, grad_stride, threads) == LK_OK;
  };
  Array loss(LK_FLOAT32, c.T), lse(LK_FLOAT32, c.T), grad(c.dtype, c.T * grad_stride);
  Array loss_again(LK_FLOAT32, c.T), lse_again(LK_FLOAT32, c.T);
  Array grad_again(c.dtype, c.T * grad_stride);
  const bool ok = call(loss, lse, grad, c.threads) && call(loss_again, lse_again, grad_again, 1);
  tally.expect(ok && loss == loss_again && lse == lse_again && grad == grad_again,
               "linear_cross_entropy T=%d V=%d D=%d dtype=%d: refused, or %d threads change bits",
               int(c.T), int(c.V), int(c.D), int(c.dtype), c.threads);

  // Rows that do not count, and what lies between rows, are nobody's.
  size_t next = 0;
  for (int64_t t = 0; t < c.T; ++t) {
    const bool counts = next < tokens.size() && tokens[next] == t;
    next += counts;
    bool kept = counts || (loss.untouched(t) && lse.untouched(t));
    for (int64_t d = counts && c.with_gradient ? c.D : 0; d < grad_stride; ++d) {
      kept = kept && grad.untouched(t * grad_stride + d);
    }
    tally.expect(kept, "linear_cross_entropy T=%d V=%d D=%d: wrote where token %d has nothing",
                 int(c.T), int(c.V), int(c.D), int(t));
  }

  for (int probe = 0; probe < 3; ++probe) {
    const int64_t t = tokens[static_cast<size_t>(random.below(count))];
    const size_t label = static_cast<size_t>(labels[static_cast<size_t>(t)]);
    size = 1;
    const std::vector<double> logits = logits_of(t);
    double others = 0;  // beside the label's 1
    for (size_t v = 0; v < logits.size(); ++v) {
      if (v != label) others += std::exp(logits[v] - logits[label]);
    }
    const double exact_loss = std::log1p(others), exact_lse = exact_loss + logits[label];
    // What an error of the logits does to the loss shrinks with the others' share.
    const double share = others / (1 + others);
    tally.expect(close(lse[t], exact_lse, size, LK_FLOAT32) &&
                     close(loss[t], exact_loss, 2 * size * share + exact_loss, LK_FLOAT32),
                 "linear_cross_entropy T=%d V=%d D=%d nf4=%d dtype=%d softcap=%g: token %d has "
                 "loss %g, not %g",
                 int(c.T), int(c.V), int(c.D), int(c.nf4), int(c.dtype), c.softcap, int(t), loss[t],
                 exact_loss);
    if (!c.with_gradient) continue;
    for (int64_t d = 0; d < c.D; ++d) {
      Sum sum;
      double rounded = 0;  // the terms of all rows but the label's
      for (size_t v = 0; v < logits.size(); ++v) {
        const double l = logits[v];
        const double weight_of_row = v == label ? -share : std::exp(l - exact_lse);
        const double slope = c.softcap > 0 ? 1 - l * l / (c.softcap * c.softcap) : 1.0;
        const double row =
            c.scale * weight_of_row * head[v * static_cast<size_t>(c.D) + static_cast<size_t>(d)];
        sum.value += row * slope;
        sum.size += std::fabs(row);  // slopes have an error relative to 1
        if (v != label) rounded += std::fabs(row * slope);
      }
      const double got = grad[t * grad_stride + d];
      const lk_dtype products = c.nf4 || c.head_dtype == c.dtype ? c.dtype : LK_FLOAT32;
      tally.expect(
          close(got, sum.value, sum.size * (1 + size), c.dtype, pairs_error(rounded, products)),
          "linear_cross_entropy T=%d V=%d D=%d nf4=%d dtype=%d softcap=%g: gradient "
          "[%d, %d] is %g, not %g",
          int(c.T), int(c.V), int(c.D), int(c.nf4), int(c.dtype), c.softcap, int(t), int(d), got,
          sum.value);
    }
  }
}

// A NaN in the hidden states is its token's matter, one in the head everybody's.
void check_nan(Tally& tally, Random& random, lk_dtype dtype, bool in_head) {
  constexpr int64_t T = 20, V = 50, D = 24;
  Array head(LK_FLOAT32, V * D, random);
  const lk_dense_matrix matrix{head.data(), LK_FLOAT32, V, D, D};
  Array hidden(dtype, T * D, random), grad(dtype, T * D), loss(LK_FLOAT32, T), lse(LK_FLOAT32, T);
  if (in_head) {
    head.set_nan(7 * D + 5);
  } else {
    hidden.set_nan(7 * D + 5);
  }
  std::vector<int64_t> tokens, labels(T, 3);
  for (int64_t t = 0; t < T; ++t) {
    tokens.push_back(t);
    for (int64_t d = 0; d < D; ++d) grad.set(t * D + d, 0);
  }
  const lk_status status = lk_linear_cross_entropy(
      nullptr, &matrix, dtype, hidden.data(), D, tokens.data(), labels.data(), T, 0.0f, 1.0f,
      static_cast<float*>(loss.data()), static_cast<float*>(lse.data()), grad.data(), D, 1);
  tally.expect(status == LK_OK, "linear_cross_entropy of a NaN: status %d", int(status));
  for (int64_t t = 0; t < T; ++t) {
    const bool wanted = in_head || t == 7;
    tally.expect(std::isnan(loss[t]) == wanted && std::isnan(grad[t * D + 5]) == wanted,
                 "linear_cross_entropy dtype=%d of a NaN in row 7 of %s: token %d has loss %g, "
                 "gradient %g",
                 int(dtype), in_head ? "the head" : "hidden", int(t), loss[t], grad[t * D + 5]);
  }
}

}  // namespace

void check_linear_cross_entropy(Tally& tally, int rounds) {
  Random random(3);
  for (int round = 0; round < rounds; ++round) {
    Case c;
    c.T = random.between(1, 40);
    c.V = random.between(1, round % 4 == 0 ? 900 : 100);  // the large ones are several blocks
    c.blocksize = 16 << random.below(3);
    c.D = random_width(random, c.blocksize, 100);
    c.nf4 = random.coin();
    c.dtype = random.dtype();
    c.head_dtype = random.coin() ? c.dtype : random.dtype();
    c.likely = random.below(4) == 0;
    c.softcap = c.likely || random.coin() ? 0.0 : 5.0 + 10 * random.uniform();
    c.scale = c.likely || random.coin() ? 1.0 : 0.25;
    c.with_gradient = random.below(3) != 0;
    c.threads = static_cast<int>(random.between(1, 4));
    check(tally, random, c);
  }
  for (const lk_dtype dtype : {LK_FLOAT32, LK_BFLOAT16, LK_FLOAT16}) {
    // Several slices of depth.
    check(tally, random, {10, 40, 900, 64, true, dtype, dtype, 0.0, 1.0, true, false, 2});
    check_nan(tally, random, dtype, false);
    check_nan(tally, random, dtype, true);
  }
}
