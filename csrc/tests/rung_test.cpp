// Runs RMS norm, rotary embedding, SwiGLU and rung merge of every variant over many shapes, against
// double, from one thread and from several at once. For sanitizer builds above all: `make
// sanitize`.
#include <cstdio>
#include <sstream>
#include <string>
#include <thread>

#include "random_floats.h"

namespace {

using Bytes = std::vector<unsigned char>;

// A matrix whose rows are a little further apart than they are long.
struct Matrix {
  int64_t rows, cols, stride;
  Floats floats;

  Matrix(int64_t n, int64_t m) : Matrix(n, m, m + below(3)) {}
  Matrix(int64_t n, int64_t m, int64_t apart)
      : rows(n), cols(m), stride(apart), floats(n == 0 ? 0 : (n - 1) * apart + m) {}

  double at(int64_t row, int64_t col) const {
    return static_cast<double>(floats.wide[static_cast<size_t>(row * stride + col)]);
  }
  double inverse_rms(int64_t row, double eps) const {
    double sum = 0;
    for (int64_t i = 0; i < cols; ++i) sum += at(row, i) * at(row, i);
    return 1 / std::sqrt(sum / static_cast<double>(cols) + eps);
  }
  lk_dense_matrix dense(lk_dtype dtype) const {
    return {floats.as(dtype), dtype, rows, cols, stride};
  }
};

// Exactly as large as needed: a sanitizer sees a byte beyond.
Bytes bytes(int64_t count, lk_dtype dtype) {
  return Bytes(static_cast<size_t>(count * (dtype == LK_FLOAT32 ? 4 : 2)), 0xff);
}

constexpr double kEps = 1e-5;
const float eps = static_cast<float>(kEps);

int check_norm(int64_t rows, int64_t cols, lk_dtype dtype, int threads) {
  const Matrix x(rows, cols), grad(rows, cols);
  const Floats weight(cols);
  Bytes out = bytes(rows * cols, dtype), dx = out, dweight = bytes(cols, dtype);
  int wrong = 0;
  wrong += lk_rms_norm(dtype, rows, cols, x.floats.as(dtype), x.stride, nullptr, 0,
                       weight.as(dtype), eps, nullptr, out.data(), threads) != LK_OK;
  wrong += lk_rms_norm_backward(dtype, rows, cols, grad.floats.as(dtype), grad.stride,
                                x.floats.as(dtype), x.stride, weight.as(dtype), eps, dx.data(),
                                dweight.data(), threads) != LK_OK;
  std::vector<double> sums(static_cast<size_t>(cols)), sizes(static_cast<size_t>(cols), 1.0);
  for (int64_t m = 0; m < rows; ++m) {
    const double r = x.inverse_rms(m, kEps);
    double shared = 0;
    for (int64_t i = 0; i < cols; ++i) {
      const size_t at = static_cast<size_t>(i);
      const double w = static_cast<double>(weight.wide[at]), h = x.at(m, i) * r;
      // The rounding before the weight is one more than `close` allows for.
      wrong += !close(out, m * cols + i, dtype, w * h, dtype == LK_FLOAT32 ? 10 : 4000);
      shared += grad.at(m, i) * w * h / static_cast<double>(cols);
      sums[at] += grad.at(m, i) * h;
      sizes[at] += std::fabs(grad.at(m, i) * h);
    }
    for (int64_t i = 0; i < cols; ++i) {
      const double w = static_cast<double>(weight.wide[static_cast<size_t>(i)]);
      const double h = x.at(m, i) * r, along = grad.at(m, i) * w;
      wrong += !close(dx, m * cols + i, dtype, r * (along - h * shared), 50 * (1 + r));
    }
  }
  for (int64_t i = 0; i < cols; ++i) {
    const size_t at = static_cast<size_t>(i);
    wrong += !close(dweight, i, dtype, sums[at], sizes[at]);
  }
  return wrong;
}

int check_residual(int64_t rows, int64_t cols, int threads) {
  const Matrix x(rows, cols), residual(rows, cols);
  Bytes out = bytes(rows * cols, LK_FLOAT32), total = out;
  int wrong = lk_rms_norm(LK_FLOAT32, rows, cols, x.floats.wide.data(), x.stride,
                          residual.floats.wide.data(), residual.stride, nullptr, eps, total.data(),
                          out.data(), threads) != LK_OK;
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t i = 0; i < cols; ++i) {
      wrong += !close(total, m * cols + i, LK_FLOAT32, x.at(m, i) + residual.at(m, i), 1);
    }
  }
  return wrong;
}

int check_rotary(int64_t tokens, int64_t heads, int64_t half, int threads) {
  Matrix x(tokens, heads * 2 * half, heads * 2 * half);
  const Matrix before = x, cos(tokens, half, half), sin(tokens, half, half);
  const lk_strides strides{0, 2 * half, heads * 2 * half}, tables{0, 0, half};
  int wrong = lk_rotary(LK_FLOAT32, 1, tokens, heads, half, x.floats.wide.data(), &strides,
                        cos.floats.wide.data(), sin.floats.wide.data(), &tables, threads) != LK_OK;
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t i = 0; i < heads * 2 * half; ++i) {
      const int64_t pair = i % half;
      const bool low = i / half % 2 == 0;
      const double other = low ? -before.at(t, i + half) : before.at(t, i - half);
      const double exact = before.at(t, i) * cos.at(t, pair) + other * sin.at(t, pair);
      wrong += !(std::fabs(x.at(t, i) - exact) <= 1e-4);
    }
  }
  return wrong;
}

// The only row of a matrix.
Bytes copied(const Matrix& row, lk_dtype dtype) {
  Bytes out = bytes(row.cols, dtype);
  std::memcpy(out.data(), row.floats.as(dtype), out.size());
  return out;
}

int check_swiglu(int64_t count, lk_dtype dtype, int threads) {
  const Matrix a(1, count), b(1, count), f(1, count);
  Bytes joined = copied(a, dtype), da = joined, db = copied(b, dtype), again = copied(f, dtype);
  int wrong = 0;
  wrong += lk_swiglu(dtype, count, joined.data(), b.floats.as(dtype), threads) != LK_OK;
  wrong += lk_swiglu_backward(dtype, count, da.data(), db.data(), again.data(), threads) != LK_OK;
  for (int64_t i = 0; i < count; ++i) {
    const double x = a.at(0, i), y = b.at(0, i), e = f.at(0, i), s = 1 / (1 + std::exp(-x));
    wrong += !close(joined, i, dtype, x * s * y, 4);
    wrong += !close(again, i, dtype, x * s * y, 4);
    wrong += !close(da, i, dtype, e * y * s * (1 + x * (1 - s)), 8);
    wrong += !close(db, i, dtype, e * x * s, 4);
  }
  return wrong;
}

int check_rung(int64_t T, int64_t d, std::vector<int64_t> widths, int64_t gates, lk_dtype dtype,
               int threads) {
  const Matrix side(T, d), grad(T, d);
  const Floats gate(gates);
  std::vector<Matrix> read, downs;
  std::vector<lk_rung_tap> taps;
  std::vector<Bytes> ddowns;
  for (const int64_t width : widths) {
    read.emplace_back(T, width);
    downs.emplace_back(d, width);
    ddowns.push_back(bytes(d * width, dtype));
  }
  for (size_t j = 0; j < read.size(); ++j) {
    const lk_dtype tap_dtype = below(2) == 0 ? LK_FLOAT32 : LK_BFLOAT16;
    taps.push_back({read[j].dense(tap_dtype), downs[j].dense(dtype), ddowns[j].data()});
  }
  const int64_t count = static_cast<int64_t>(taps.size());
  const void* g = gates == 0 ? nullptr : gate.as(dtype);
  Bytes out = bytes(T * d, dtype), dside = out, dgate = bytes(gates, dtype);
  int wrong = 0;
  wrong += lk_rung_merge(dtype, T, d, side.floats.as(dtype), side.stride, taps.data(), count, g,
                         gates, eps, out.data(), threads) != LK_OK;
  wrong +=
      lk_rung_merge_backward(dtype, T, d, grad.floats.as(dtype), grad.stride, side.floats.as(dtype),
                             side.stride, taps.data(), count, g, gates, eps, dside.data(),
                             gates == 0 ? nullptr : dgate.data(), threads) != LK_OK;
  const auto gate_of = [&](int64_t c) {
    return static_cast<double>(gate.wide[static_cast<size_t>(gates == 1 ? 0 : c)]);
  };
  for (int probe = 0; probe < 40; ++probe) {
    const int64_t t = below(static_cast<int>(T)), c = below(static_cast<int>(d));
    const double e = grad.at(t, c), kept = gates == 0 ? e : e * gate_of(c);
    double z = 0, size = 1;
    for (size_t j = 0; j < read.size(); ++j) {
      const double r = read[j].inverse_rms(t, kEps);
      for (int64_t i = 0; i < widths[j]; ++i) {
        const double term = r * read[j].at(t, i) * downs[j].at(c, i);
        z += term;
        size += std::fabs(term);
      }
      const int64_t k = below(static_cast<int>(widths[j]));
      double sum = 0, size_of_sum = 1;
      for (int64_t s = 0; s < T; ++s) {
        const double term = grad.at(s, c) * read[j].inverse_rms(s, kEps) * read[j].at(s, k);
        sum += term;
        size_of_sum += std::fabs(term);
      }
      const double rest = gates == 0 ? 1 : 1 - gate_of(c);
      wrong += !close(ddowns[j], c * widths[j] + k, dtype, rest * sum, size_of_sum * 4);
    }
    const double s = side.at(t, c);
    const double exact = gates == 0 ? s + z : gate_of(c) * s + (1 - gate_of(c)) * z;
    wrong += !close(out, t * d + c, dtype, exact, size * 4);
    wrong += !close(dside, t * d + c, dtype, kept, std::fabs(kept) + 1);
  }
  return wrong;
}

// Several callers at once, while the pool is one.
int check_callers() {
  std::vector<int> wrong(4, 0);
  std::vector<std::thread> callers;
  const Matrix x(600, 200, 200);
  const Floats weight(200);
  const auto norm = [&](int threads) {
    std::vector<float> out(600 * 200), dweight(200);
    lk_rms_norm_backward(LK_FLOAT32, 600, 200, x.floats.wide.data(), 200, x.floats.wide.data(), 200,
                         weight.wide.data(), eps, out.data(), dweight.data(), threads);
    out.insert(out.end(), dweight.begin(), dweight.end());
    return out;
  };
  const std::vector<float> wanted = norm(1);
  for (size_t c = 0; c < wrong.size(); ++c) {
    callers.emplace_back([&, c] {
      for (int round = 0; round < 20; ++round) wrong[c] += norm(1 + static_cast<int>(c)) != wanted;
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
    for (int round = 0; round < 100; ++round, ++calls) {
      const lk_dtype dtype = below(2) == 0 ? LK_FLOAT32 : LK_BFLOAT16;
      const int threads = 1 + below(4);
      const int64_t T = 1 + below(round % 3 == 0 ? 10 : 80), d = 1 + below(60);
      std::vector<int64_t> widths(static_cast<size_t>(1 + below(2)));
      for (auto& width : widths) width = 1 + below(150);
      const int64_t gates[3] = {0, 1, d};
      wrong += check_norm(1 + below(60), 1 + below(200), dtype, threads);
      wrong += check_residual(1 + below(20), 1 + below(100), threads);
      wrong += check_rotary(1 + below(20), 1 + below(4), 1 + below(40), threads);
      wrong += check_swiglu(1 + below(300), dtype, threads);
      wrong += check_rung(T, d, widths, gates[below(3)], dtype, threads);
    }
    wrong += check_norm(900, 150, LK_BFLOAT16, 3);               // several tasks
    wrong += check_rotary(400, 3, 64, 2);                        // the same
    wrong += check_swiglu(70000, LK_BFLOAT16, 3);                // the same
    wrong += check_rung(420, 30, {800}, 30, LK_BFLOAT16, 2);     // several slices, both ways
    wrong += check_rung(50, 1030, {40, 400}, 1, LK_FLOAT32, 3);  // several pieces
    wrong += check_callers();
    std::printf("%s: %d wrong after %d calls\n", isa.c_str(), wrong, calls);
  }
  return wrong == 0 ? 0 : 1;
}
