// What the interface refuses, what it takes for nothing to do, and callers at the same time.
#include <string>
#include <thread>

#include "support.h"

namespace {

// Arguments of every function that are fine; each test spoils one.
struct Arguments {
  static constexpr int64_t M = 3, N = 4, K = 32;

  Random random{5};
  Weight weight{N, K, 32, false, random}, nested_weight{N, K, 32, true, random};
  Array x{LK_FLOAT32, M * K, random}, dense{LK_FLOAT32, N * K, random};
  Array out{LK_FLOAT32, M * N}, back{LK_FLOAT32, M * K}, loss{LK_FLOAT32, M}, lse{LK_FLOAT32, M};
  Array attended{LK_FLOAT32, M * K}, attended_lse{LK_FLOAT32, 2 * M, random};
  Array dq{LK_FLOAT32, M * K, random}, dk{LK_FLOAT32, M * K, random}, dv{LK_FLOAT32, M * K, random};
  std::vector<int64_t> tokens{0, 1, 2}, labels{0, 1, 2};

  lk_nf4_matrix w = weight.matrix(), up = weight.matrix();
  const lk_nf4_matrix* w_at = &w;
  const lk_nf4_matrix* below = nullptr;
  lk_dtype dtype = LK_FLOAT32;
  int64_t rows = M, stride = K, residual_stride = N, grad_stride = N, count = M;
  const void* x_at = x.data();
  const void* residual = x.data();
  void* out_at = out.data();
  int32_t threads = 1;
  lk_dense_matrix head{dense.data(), LK_FLOAT32, N, K, K};
  const lk_nf4_matrix* nf4_head = nullptr;
  const lk_dense_matrix* dense_head = &head;
  const int64_t* tokens_at = tokens.data();
  const int64_t* labels_at = labels.data();
  float softcap = 0.0f;
  float* loss_at = static_cast<float*>(loss.data());
  float* lse_at = static_cast<float*>(lse.data());
  int64_t batch = 1, heads = 2, key_heads = 1, S = 3, T = 3, width = 16;
  lk_strides strides{0, 0, 16};
  const lk_strides* q_strides = &strides;
  const lk_strides* k_strides = &strides;
  const lk_strides* v_strides = &strides;
  const void *grad_at = x.data(), *attended_at = x.data();
  const float* attended_lse_at = static_cast<const float*>(attended_lse.data());
  int64_t cols = K, rank = 2;
  const float* p_at = static_cast<const float*>(dense.data());
  float *dq_at = static_cast<float*>(dq.data()), *dk_at = static_cast<float*>(dk.data()),
        *dv_at = static_cast<float*>(dv.data());

  lk_status linear() {
    return lk_nf4_linear(w_at, dtype, rows, x_at, stride, nullptr, residual, residual_stride,
                         out_at, threads);
  }
  lk_status transposed() {
    return lk_nf4_linear_transposed(w_at, below, dtype, rows, x_at, grad_stride,
                                    out_at == nullptr ? nullptr : back.data(), threads);
  }
  lk_status swiglu() {
    return lk_nf4_swiglu(w_at, &up, dtype, rows, x_at, stride, out_at, threads);
  }
  lk_status linear_int8() {
    return lk_nf4_linear_int8(w_at, dtype, rows, x_at, stride, nullptr, residual, residual_stride,
                              out_at, threads);
  }
  lk_status swiglu_int8() {
    return lk_nf4_swiglu_int8(w_at, &up, dtype, rows, x_at, stride, out_at, threads);
  }
  lk_status cross_entropy() {
    return lk_linear_cross_entropy(nf4_head, dense_head, dtype, x_at, stride, tokens_at, labels_at,
                                   count, softcap, 1.0f, loss_at, lse_at, nullptr, grad_stride,
                                   threads);
  }
  lk_status attention() {
    return lk_ranged_attention(dtype, batch, heads, key_heads, S, T, width, x_at, q_strides, x_at,
                               k_strides, x_at, v_strides, nullptr, 1.0f,
                               out_at == nullptr ? nullptr : attended.data(), nullptr, threads);
  }
  lk_status attention_backward() {
    return lk_ranged_attention_backward(dtype, batch, heads, key_heads, S, T, width, x_at,
                                        q_strides, x_at, k_strides, x_at, v_strides, nullptr, 1.0f,
                                        grad_at, attended_at, attended_lse_at, dq_at, dk_at,
                                        out_at == nullptr ? nullptr : dv_at, threads);
  }
  lk_status narrow() {
    return lk_low_rank_narrow(dtype, rows, cols, rank, x_at, stride, p_at,
                              static_cast<float*>(out_at), threads);
  }
  lk_status widen() {
    return lk_low_rank_widen(dtype, rows, cols, rank, static_cast<const float*>(x_at), p_at, 0,
                             out_at == nullptr ? nullptr : back.data(), threads);
  }
  lk_status gradient() {
    return lk_low_rank_gradient(dtype, rows, cols, rank, p_at, x_at, stride,
                                out_at == nullptr ? nullptr : dq_at, threads);
  }
};

using Call = lk_status (Arguments::*)();

struct Kernel {
  const char* name;
  Call call;
};

constexpr Kernel kLinear{"nf4_linear", &Arguments::linear};
constexpr Kernel kTransposed{"nf4_linear_transposed", &Arguments::transposed};
constexpr Kernel kSwiGLU{"nf4_swiglu", &Arguments::swiglu};
constexpr Kernel kLinearInt8{"nf4_linear_int8", &Arguments::linear_int8};
constexpr Kernel kSwiGLUInt8{"nf4_swiglu_int8", &Arguments::swiglu_int8};
constexpr Kernel kCrossEntropy{"linear_cross_entropy", &Arguments::cross_entropy};
constexpr Kernel kAttention{"ranged_attention", &Arguments::attention};
constexpr Kernel kAttentionBackward{"ranged_attention_backward", &Arguments::attention_backward};

constexpr Kernel kNarrow{"low_rank_narrow", &Arguments::narrow};
constexpr Kernel kWiden{"low_rank_widen", &Arguments::widen};
constexpr Kernel kGradient{"low_rank_gradient", &Arguments::gradient};

using Spoil = void (*)(Arguments&);

void check_call(Tally& tally, const Kernel& kernel, const char* what, Spoil spoil,
                lk_status wanted) {
  Arguments arguments;
  spoil(arguments);
  const lk_status status = (arguments.*kernel.call)();
  tally.expect(status == wanted, "%s with %s: status %d, not %d", kernel.name, what, int(status),
               int(wanted));
}

struct Refusal {
  const char* what;
  Spoil spoil;
};

// What an NF4 matrix may not be.
const Refusal kMatrices[] = {
    {"no matrix", [](Arguments& a) { a.w_at = nullptr; }},
    {"negative rows", [](Arguments& a) { a.w.rows = -1; }},
    {"negative columns", [](Arguments& a) { a.w.cols = -1; }},
    {"blocksize 8", [](Arguments& a) { a.w.blocksize = 8; }},
    {"blocksize 48", [](Arguments& a) { a.w.blocksize = 48; }},
    {"blocksize 0", [](Arguments& a) { a.w.blocksize = 0; }},
    {"no packed bytes", [](Arguments& a) { a.w.packed = nullptr; }},
    {"no scales", [](Arguments& a) { a.w.absmax = nullptr; }},
    {"scales of both kinds",
     [](Arguments& a) {
       const float* absmax = a.w.absmax;
       a.w = a.nested_weight.matrix();
       a.w.absmax = absmax;
     }},
    {"nested scales without their map",
     [](Arguments& a) {
       a.w = a.nested_weight.matrix();
       a.w.nested_code = nullptr;
     }},
};

const Refusal kEverywhere[] = {
    {"dtype 3", [](Arguments& a) { a.dtype = static_cast<lk_dtype>(3); }},
    {"no threads", [](Arguments& a) { a.threads = 0; }},
    {"no input", [](Arguments& a) { a.x_at = nullptr; }},
    {"no output", [](Arguments& a) { a.out_at = a.loss_at = nullptr; }},
};

struct KernelRefusal {
  Kernel kernel;
  Refusal refusal;
};

// What attention may not be asked for, nor its gradients.
const Refusal kAttentions[] = {
    {"batch -1", [](Arguments& a) { a.batch = -1; }},
    {"S -1", [](Arguments& a) { a.S = -1; }},
    {"fewer keys than queries", [](Arguments& a) { a.T = 2; }},
    {"no heads", [](Arguments& a) { a.heads = 0; }},
    {"no heads of keys", [](Arguments& a) { a.key_heads = 0; }},
    {"heads that do not share alike",
     [](Arguments& a) {
       a.heads = 3;
       a.key_heads = 2;
     }},
    {"513 heads to one of keys", [](Arguments& a) { a.heads = 513; }},
    {"head_dim 0", [](Arguments& a) { a.width = 0; }},
    {"no strides of q", [](Arguments& a) { a.q_strides = nullptr; }},
    {"no strides of k", [](Arguments& a) { a.k_strides = nullptr; }},
    {"no strides of v", [](Arguments& a) { a.v_strides = nullptr; }},
};

const KernelRefusal kOwn[] = {
    {kLinear, {"M -1", [](Arguments& a) { a.rows = -1; }}},
    {kLinear, {"overlapping rows of x", [](Arguments& a) { a.stride = 31; }}},
    {kLinear, {"overlapping rows of residual", [](Arguments& a) { a.residual_stride = 3; }}},
    {kTransposed, {"M -1", [](Arguments& a) { a.rows = -1; }}},
    {kTransposed, {"overlapping rows of grad", [](Arguments& a) { a.grad_stride = 3; }}},
    {kTransposed, {"rows of grad for one of two", [](Arguments& a) { a.below = &a.up; }}},
    {kTransposed,
     {"other columns below",
      [](Arguments& a) {
        a.below = &a.up;
        a.up.cols = 16;
        a.grad_stride = 8;
      }}},
    {kTransposed,
     {"no scales below",
      [](Arguments& a) {
        a.below = &a.up;
        a.up.absmax = nullptr;
        a.grad_stride = 8;
      }}},
    {kSwiGLU, {"M -1", [](Arguments& a) { a.rows = -1; }}},
    {kSwiGLU, {"overlapping rows of x", [](Arguments& a) { a.stride = 31; }}},
    {kSwiGLU, {"an up of other rows", [](Arguments& a) { a.up.rows = 3; }}},
    {kSwiGLU, {"an up of other columns", [](Arguments& a) { a.up.cols = 16; }}},
    {kSwiGLU, {"an up without scales", [](Arguments& a) { a.up.absmax = nullptr; }}},
    {kLinearInt8, {"M -1", [](Arguments& a) { a.rows = -1; }}},
    {kLinearInt8, {"overlapping rows of x", [](Arguments& a) { a.stride = 31; }}},
    {kLinearInt8, {"overlapping rows of residual", [](Arguments& a) { a.residual_stride = 3; }}},
    {kLinearInt8, {"blocksize 16", [](Arguments& a) { a.w.blocksize = 16; }}},
    {kLinearInt8, {"half a block a row", [](Arguments& a) { a.w.blocksize = 64; }}},
    {kSwiGLUInt8, {"M -1", [](Arguments& a) { a.rows = -1; }}},
    {kSwiGLUInt8, {"overlapping rows of x", [](Arguments& a) { a.stride = 31; }}},
    {kSwiGLUInt8, {"an up of other rows", [](Arguments& a) { a.up.rows = 3; }}},
    {kSwiGLUInt8, {"an up of another blocksize", [](Arguments& a) { a.up.blocksize = 16; }}},
    {kSwiGLUInt8,
     {"half a block a row", [](Arguments& a) { a.w.blocksize = a.up.blocksize = 64; }}},
    {kCrossEntropy, {"no head", [](Arguments& a) { a.dense_head = nullptr; }}},
    {kCrossEntropy, {"two heads", [](Arguments& a) { a.nf4_head = &a.w; }}},
    {kCrossEntropy,
     {"head dtype 3", [](Arguments& a) { a.head.dtype = static_cast<lk_dtype>(3); }}},
    {kCrossEntropy, {"overlapping rows of the head", [](Arguments& a) { a.head.stride = 31; }}},
    {kCrossEntropy, {"a head without data", [](Arguments& a) { a.head.data = nullptr; }}},
    {kCrossEntropy, {"a head without rows", [](Arguments& a) { a.head.rows = 0; }}},
    {kCrossEntropy, {"count -1", [](Arguments& a) { a.count = -1; }}},
    {kCrossEntropy, {"no tokens", [](Arguments& a) { a.tokens_at = nullptr; }}},
    {kCrossEntropy, {"no labels", [](Arguments& a) { a.labels_at = nullptr; }}},
    {kCrossEntropy, {"no lse", [](Arguments& a) { a.lse_at = nullptr; }}},
    {kCrossEntropy, {"softcap -1", [](Arguments& a) { a.softcap = -1.0f; }}},
    {kCrossEntropy, {"softcap NaN", [](Arguments& a) { a.softcap = NAN; }}},
    {kCrossEntropy, {"a negative stride", [](Arguments& a) { a.stride = -1; }}},
    {kCrossEntropy, {"a negative stride of grad", [](Arguments& a) { a.grad_stride = -1; }}},
    {kAttentionBackward, {"no gradient", [](Arguments& a) { a.grad_at = nullptr; }}},
    {kAttentionBackward, {"no out", [](Arguments& a) { a.attended_at = nullptr; }}},
    {kAttentionBackward, {"no lse", [](Arguments& a) { a.attended_lse_at = nullptr; }}},
    {kAttentionBackward, {"no dq", [](Arguments& a) { a.dq_at = nullptr; }}},
    {kAttentionBackward, {"no dk", [](Arguments& a) { a.dk_at = nullptr; }}},
    {kAttentionBackward, {"no dv", [](Arguments& a) { a.dv_at = nullptr; }}},
    {kNarrow, {"overlapping rows of x", [](Arguments& a) { a.stride = 31; }}},
    {kGradient, {"overlapping rows of x", [](Arguments& a) { a.stride = 31; }}},
};

// What the products of low-rank adapters may not be asked for.
const Refusal kLowRanks[] = {
    {"rows -1", [](Arguments& a) { a.rows = -1; }},
    {"cols -1", [](Arguments& a) { a.cols = -1; }},
    {"rank -1", [](Arguments& a) { a.rank = -1; }},
    {"no matrix of few rows", [](Arguments& a) { a.p_at = nullptr; }},
};

// Nothing to do: fine, whatever the pointers.
void clear(Arguments& a) {
  a.x_at = a.residual = nullptr;
  a.out_at = nullptr;
  a.tokens_at = a.labels_at = nullptr;
  a.loss_at = a.lse_at = nullptr;
}

const KernelRefusal kEmpty[] = {
    {kLinear,
     {"M 0",
      [](Arguments& a) {
        clear(a);
        a.rows = 0;
      }}},
    {kLinear,
     {"N 0",
      [](Arguments& a) {
        clear(a);
        a.w.rows = 0;
        a.w.packed = nullptr;
      }}},
    {kTransposed,
     {"M 0",
      [](Arguments& a) {
        clear(a);
        a.rows = 0;
      }}},
    {kTransposed,
     {"K 0",
      [](Arguments& a) {
        clear(a);
        a.w.cols = 0;
        a.w.packed = nullptr;
      }}},
    {kSwiGLU,
     {"M 0",
      [](Arguments& a) {
        clear(a);
        a.rows = 0;
      }}},
    {kSwiGLU,
     {"N 0",
      [](Arguments& a) {
        clear(a);
        a.w.rows = a.up.rows = 0;
      }}},
    {kLinearInt8,
     {"M 0",
      [](Arguments& a) {
        clear(a);
        a.rows = 0;
      }}},
    {kSwiGLUInt8,
     {"N 0",
      [](Arguments& a) {
        clear(a);
        a.w.rows = a.up.rows = 0;
      }}},
    {kCrossEntropy,
     {"count 0",
      [](Arguments& a) {
        clear(a);
        a.count = 0;
      }}},
    {kAttention,
     {"batch 0",
      [](Arguments& a) {
        clear(a);
        a.batch = 0;
      }}},
    {kAttention,
     {"S 0",
      [](Arguments& a) {
        clear(a);
        a.S = 0;
      }}},
    {kAttentionBackward,
     {"batch 0",
      [](Arguments& a) {
        clear(a);
        a.batch = 0;
      }}},
    {kAttentionBackward,
     {"S 0",
      [](Arguments& a) {
        clear(a);
        a.S = 0;
      }}},
    {kNarrow,
     {"no rows",
      [](Arguments& a) {
        clear(a);
        a.rows = 0;
      }}},
    {kWiden,
     {"no columns",
      [](Arguments& a) {
        clear(a);
        a.cols = 0;
      }}},
    {kGradient,
     {"rank 0",
      [](Arguments& a) {
        clear(a);
        a.rank = 0;
      }}},
};

// A sum over no terms is zero.
void check_no_terms(Tally& tally) {
  Arguments linear, transposed, swiglu, int8;
  linear.w.cols = transposed.w.rows = swiglu.w.cols = swiglu.up.cols = int8.w.cols = 0;
  linear.residual = int8.residual = nullptr;
  const bool ok = linear.linear() == LK_OK && transposed.transposed() == LK_OK &&
                  swiglu.swiglu() == LK_OK && int8.linear_int8() == LK_OK;
  tally.expect(ok, "sums of no terms are %s", "refused");
  for (int64_t i = 0; i < Arguments::M * Arguments::N; ++i) {
    tally.expect(linear.out[i] == 0 && swiglu.out[i] == 0 && transposed.back[i] == 0,
                 "sums of no terms: %g, %g, %g", linear.out[i], swiglu.out[i], transposed.back[i]);
    tally.expect(int8.out[i] == 0, "sums of no rounded terms: %g", int8.out[i]);
  }
  Arguments narrow, widen, gradient;
  narrow.cols = widen.rank = gradient.rows = 0;
  tally.expect(narrow.narrow() == LK_OK && widen.widen() == LK_OK && gradient.gradient() == LK_OK,
               "low-rank sums of no terms are %s", "refused");
  for (int64_t i = 0; i < Arguments::M * 2; ++i) {
    tally.expect(narrow.out[i] == 0, "low_rank_narrow of no terms: %g", narrow.out[i]);
  }
  for (int64_t i = 0; i < 2 * Arguments::K; ++i) {
    tally.expect(widen.back[i] == 0 && gradient.dq[i] == 0, "low-rank sums of no terms: %g, %g",
                 widen.back[i], gradient.dq[i]);
  }
}

}  // namespace

void check_refusals(Tally& tally) {
  for (const Kernel& kernel :
       {kLinear, kTransposed, kSwiGLU, kLinearInt8, kSwiGLUInt8, kCrossEntropy, kAttention,
        kAttentionBackward, kNarrow, kWiden, kGradient}) {
    check_call(tally, kernel, "nothing amiss", [](Arguments&) {}, LK_OK);
    for (const Refusal& refusal : kEverywhere) {
      check_call(tally, kernel, refusal.what, refusal.spoil, LK_BAD_ARGUMENT);
    }
  }
  for (const Refusal& refusal : kMatrices) {
    for (const Kernel& kernel : {kLinear, kTransposed, kSwiGLU, kLinearInt8, kSwiGLUInt8}) {
      check_call(tally, kernel, refusal.what, refusal.spoil, LK_BAD_ARGUMENT);
    }
    Arguments arguments;
    refusal.spoil(arguments);
    arguments.nf4_head = arguments.w_at;
    arguments.dense_head = nullptr;
    const lk_status status = arguments.cross_entropy();
    tally.expect(status == LK_BAD_ARGUMENT, "linear_cross_entropy with %s: status %d", refusal.what,
                 int(status));
  }
  for (const Refusal& refusal : kAttentions) {
    for (const Kernel& kernel : {kAttention, kAttentionBackward}) {
      check_call(tally, kernel, refusal.what, refusal.spoil, LK_BAD_ARGUMENT);
    }
  }
  for (const Refusal& refusal : kLowRanks) {
    check_call(tally, kNarrow, refusal.what, refusal.spoil, LK_BAD_ARGUMENT);
    check_call(tally, kWiden, refusal.what, refusal.spoil, LK_BAD_ARGUMENT);
    check_call(tally, kGradient, refusal.what, refusal.spoil, LK_BAD_ARGUMENT);
  }
  for (const KernelRefusal& own : kOwn) {
    check_call(tally, own.kernel, own.refusal.what, own.refusal.spoil, LK_BAD_ARGUMENT);
  }
  for (const KernelRefusal& empty : kEmpty) {
    check_call(tally, empty.kernel, empty.refusal.what, empty.refusal.spoil, LK_OK);
  }
  check_no_terms(tally);

  const std::string isa = lk_isa();
  tally.expect(lk_set_isa(nullptr) == LK_BAD_ARGUMENT, "lk_set_isa takes %s", "NULL");
  for (const char* name : {"", "avx3", "baseline "}) {
    tally.expect(lk_set_isa(name) == LK_UNKNOWN_ISA, "lk_set_isa takes '%s'", name);
  }
  tally.expect(isa == lk_isa(), "refused names change the variant to %s", lk_isa());
  tally.expect(lk_abi_version() == LK_ABI_VERSION, "interface %d", int(lk_abi_version()));
}

// Each with its own results, while the pool of threads is one.
void check_callers(Tally& tally) {
  constexpr int64_t M = 40, N = 150, K = 320;
  Random random(6);
  const Weight weight(N, K, 64, true, random);
  const lk_nf4_matrix w = weight.matrix();
  const Array x(LK_FLOAT32, M * K, random);
  const auto call = [&](int kernel, int threads) {
    Array out(LK_FLOAT32, M * N);
    if (kernel == 2) {
      lk_nf4_linear_int8(&w, LK_FLOAT32, M, x.data(), K, nullptr, nullptr, 0, out.data(), threads);
    } else if (kernel == 1) {
      lk_nf4_swiglu(&w, &w, LK_FLOAT32, M, x.data(), K, out.data(), threads);
    } else {
      lk_nf4_linear(&w, LK_FLOAT32, M, x.data(), K, nullptr, nullptr, 0, out.data(), threads);
    }
    return out;
  };
  const Array wanted[3] = {call(0, 1), call(1, 1), call(2, 1)};
  std::vector<int> wrong(4, 0);
  std::vector<std::thread> callers;
  for (size_t c = 0; c < wrong.size(); ++c) {
    callers.emplace_back([&, c] {
      for (int round = 0; round < 10; ++round) {
        const int kernel = (static_cast<int>(c) + round) % 3;
        wrong[c] += !(call(kernel, 1 + static_cast<int>(c)) == wanted[kernel]);
      }
    });
  }
  for (auto& caller : callers) caller.join();
  for (size_t c = 0; c < wrong.size(); ++c) {
    tally.expect(wrong[c] == 0, "caller %d of 4 at once: %d results differ", int(c), wrong[c]);
  }
}
