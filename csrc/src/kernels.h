// What each instruction set variant offers to the interface; one table a variant.
#pragma once

#include "ladder_kernels.h"

#define LK_NAME_(name) #name
#define LK_NAME(name) LK_NAME_(name)

namespace lk {

struct LinearCall {
  lk_nf4_matrix weight;
  lk_dtype dtype;
  int64_t M;
  const void* x;
  int64_t x_stride;
  const void* bias;
  const void* residual;
  int64_t residual_stride;
  void* out;
  int32_t threads;
};

struct TransposedCall {
  lk_nf4_matrix weight;
  const lk_nf4_matrix* below;  // nullptr: none
  lk_dtype dtype;
  int64_t M;
  const void* x;
  int64_t x_stride;
  void* out;
  int32_t threads;
};

struct SwiGLUCall {
  lk_nf4_matrix gate, up;
  lk_dtype dtype;
  int64_t M;
  const void* x;
  int64_t x_stride;
  void* out;
  int32_t threads;
};

struct CrossEntropyCall {
  const lk_nf4_matrix* nf4_head;  // one of the two heads is set
  const lk_dense_matrix* dense_head;
  lk_dtype dtype;
  const void* hidden;
  int64_t hidden_stride;
  const int64_t* tokens;
  const int64_t* labels;
  int64_t count;
  float softcap, logit_scale;
  float* loss;
  float* lse;
  void* grad;
  int64_t grad_stride;
  int32_t threads;
};

struct AttentionInputs {
  lk_dtype dtype;
  int64_t batch, heads, key_heads, S, T, head_dim;
  const void* q;
  lk_strides q_strides;
  const void* k;
  lk_strides k_strides;
  const void* v;
  lk_strides v_strides;
  const int64_t* first;
  float scale;
};

struct AttentionCall : AttentionInputs {
  void* out;
  float* lse;  // or nullptr
  int32_t threads;
};

struct AttentionBackwardCall : AttentionInputs {
  const void* grad;
  const void* out;
  const float* lse;
  float *dq, *dk, *dv;
  int32_t threads;
};

struct QuantizeCall {
  lk_dtype dtype;
  const void* weight;
  int64_t count, blocksize;
  uint8_t* packed;
  float* absmax;
  int32_t threads;
};

struct QuantizeAbsmaxCall {
  const float* absmax;
  int64_t blocks;
  float offset;
  const uint8_t* nearest;
  uint8_t* absmax_q8;
  float* nested_absmax;
  int32_t threads;
};

struct DequantizeCall {
  lk_nf4_matrix weight;
  lk_dtype dtype;
  int64_t first, count;
  void* out;
  int32_t threads;
};

struct RMSNormCall {
  lk_dtype dtype;
  int64_t rows, cols;
  const void* x;
  int64_t x_stride;
  const void* residual;
  int64_t residual_stride;
  const void* weight;
  float eps;
  void* total;
  void* out;
  int32_t threads;
};

struct RMSNormBackwardCall {
  lk_dtype dtype;
  int64_t rows, cols;
  const void* grad;
  int64_t grad_stride;
  const void* x;
  int64_t x_stride;
  const void* weight;
  float eps;
  void* dx;
  void* dweight;
  int32_t threads;
};

struct RotaryCall {
  lk_dtype dtype;
  int64_t batch, length, heads, half;
  void* x;
  lk_strides strides;
  const void* cos;
  const void* sin;
  lk_strides table_strides;
  int32_t threads;
};

struct RungMergeCall {
  lk_dtype dtype;
  int64_t T, d;
  const void* side;
  int64_t side_stride;
  const lk_rung_tap* taps;
  int64_t count;
  const void* gate;  // [gates], or nullptr to add
  int64_t gates;     // 1 or d
  float eps;
  void* out;
  int32_t threads;
};

struct RungMergeBackwardCall {
  lk_dtype dtype;
  int64_t T, d;
  const void* grad;
  int64_t grad_stride;
  const void* side;
  int64_t side_stride;
  const lk_rung_tap* taps;
  int64_t count;
  const void* gate;
  int64_t gates;
  float eps;
  void* dside;
  void* dgate;
  int32_t threads;
};

// Of the three products: each takes what it reads, see low_rank.inc.
struct LowRankCall {
  lk_dtype dtype;  // of what is wide: x, or the output of low_rank_widen
  int64_t rows, cols, rank;
  const void* x;
  int64_t x_stride;
  const float* narrow;
  const float* p;
  bool add;
  void* out;
  int32_t threads;
};

struct SwiGLUJoinCall {
  lk_dtype dtype;
  int64_t count;
  void* a;
  const void* b;
  int32_t threads;
};

struct SwiGLUJoinBackwardCall {
  lk_dtype dtype;
  int64_t count;
  void *a, *b, *f;
  int32_t threads;
};

struct Kernels {
  const char* isa;
  lk_status (*nf4_linear)(const LinearCall&);
  lk_status (*nf4_linear_transposed)(const TransposedCall&);
  lk_status (*nf4_swiglu)(const SwiGLUCall&);
  lk_status (*nf4_linear_int8)(const LinearCall&);
  lk_status (*nf4_swiglu_int8)(const SwiGLUCall&);
  lk_status (*linear_cross_entropy)(const CrossEntropyCall&);
  lk_status (*ranged_attention)(const AttentionCall&);
  lk_status (*ranged_attention_backward)(const AttentionBackwardCall&);
  lk_status (*nf4_quantize)(const QuantizeCall&);
  lk_status (*nf4_quantize_absmax)(const QuantizeAbsmaxCall&);
  lk_status (*nf4_dequantize)(const DequantizeCall&);
  lk_status (*rms_norm)(const RMSNormCall&);
  lk_status (*rms_norm_backward)(const RMSNormBackwardCall&);
  lk_status (*rotary)(const RotaryCall&);
  lk_status (*rung_merge)(const RungMergeCall&);
  lk_status (*rung_merge_backward)(const RungMergeBackwardCall&);
  lk_status (*low_rank_narrow)(const LowRankCall&);
  lk_status (*low_rank_widen)(const LowRankCall&);
  lk_status (*low_rank_gradient)(const LowRankCall&);
  lk_status (*swiglu)(const SwiGLUJoinCall&);
  lk_status (*swiglu_backward)(const SwiGLUJoinBackwardCall&);
};

namespace baseline {
extern const Kernels kernels;
}
#if defined(LK_HAVE_AVX2)
namespace avx2 {
extern const Kernels kernels;
}
#endif
#if defined(LK_HAVE_AVX2_VNNI)
namespace avx2_vnni {
Kernels over(Kernels base);  // base with this variant's products of bytes
}
#endif
#if defined(LK_HAVE_AVX512)
namespace avx512 {
extern const Kernels kernels;
}
#endif
#if defined(LK_HAVE_AVX512_VNNI)
namespace avx512_vnni {
Kernels over(Kernels base);
}
#endif
#if defined(LK_HAVE_AVX512_BF16)
namespace avx512_bf16 {
extern const Kernels kernels;
}
#endif
#if defined(LK_HAVE_NEON)
namespace neon {
extern const Kernels kernels;
}
#endif
#if defined(LK_HAVE_NEON_DOTPROD)
namespace neon_dotprod {
Kernels over(Kernels base);
}
#endif

}  // namespace lk
