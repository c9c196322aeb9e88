// What this processor can do at most: multiply-adds a second, and bytes read a second.
#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <chrono>
#include <thread>
#include <vector>

namespace {

double seconds() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
typedef float Floats __attribute__((vector_size(kWidth * 4)));
typedef uint64_t Words __attribute__((vector_size(kWidth * 4), aligned(8)));

constexpr int kChains = 12;  // more than latency times throughput

// Keeps the compiler from folding steps into each other.
#if defined(__AVX512F__)
#define LK_KEEP(value) asm volatile("" : "+v"(value))
#elif defined(__x86_64__)
#define LK_KEEP(value) asm volatile("" : "+x"(value))
#else
#define LK_KEEP(value) asm volatile("" : "+w"(value))
#endif

// Each kind of multiply-add: what sums are, how many multiply-adds a step makes, and the step.

struct Float32 {
  typedef Floats Sum;
  static constexpr int kMultiplyAdds = kWidth;
  static Sum step(Sum sum, Sum factor) { return sum * factor + factor; }
};

// 16-bit floats in pairs, into float32.
#if defined(__AVX512BF16__)
#define LK_BFLOAT16 1
struct BFloat16 {
  typedef __m512 Sum;
  static constexpr int kMultiplyAdds = 32;
  static Sum step(Sum sum, Sum factor) {
    return _mm512_dpbf16_ps(sum, (__m512bh)factor, (__m512bh)factor);
  }
};
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define LK_BFLOAT16 1
struct BFloat16 {
  typedef float32x4_t Sum;
  static constexpr int kMultiplyAdds = 8;
  static Sum step(Sum sum, Sum factor) {
    const bfloat16x8_t pairs = vreinterpretq_bf16_f32(factor);
    return vbfdotq_f32(sum, pairs, pairs);
  }
};
#endif

// 8-bit whole numbers in fours, into int32.
#if defined(__AVX512VNNI__)
#define LK_INT8 1
struct Int8 {
  typedef __m512i Sum;
  static constexpr int kMultiplyAdds = 64;
  static Sum step(Sum sum, Sum factor) { return _mm512_dpbusd_epi32(sum, factor, factor); }
};
#elif defined(__AVXVNNI__)
#define LK_INT8 1
struct Int8 {
  typedef __m256i Sum;
  static constexpr int kMultiplyAdds = 32;
  static Sum step(Sum sum, Sum factor) { return _mm256_dpbusd_avx_epi32(sum, factor, factor); }
};
#elif defined(__AVX2__)
#define LK_INT8 1
struct Int8 {
  typedef __m256i Sum;
  static constexpr int kMultiplyAdds = 32;
  static Sum step(Sum sum, Sum factor) {
    __m256i pairs = _mm256_maddubs_epi16(factor, factor);
    LK_KEEP(pairs);  // a step of its own each time
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, factor));
  }
};
#elif defined(__ARM_FEATURE_DOTPROD)
#define LK_INT8 1
struct Int8 {
  typedef int32x4_t Sum;
  static constexpr int kMultiplyAdds = 16;
  static Sum step(Sum sum, Sum factor) {
    const int8x16_t fours = vreinterpretq_s8_s32(factor);
    return vdotq_s32(sum, fours, fours);
  }
};
#endif

template <class Kind>
double multiply_add(int64_t steps) {
  typename Kind::Sum sums[kChains];
  typename Kind::Sum factor = {};
  factor += 1;
  LK_KEEP(factor);
#pragma GCC unroll 12
  for (int c = 0; c < kChains; ++c) sums[c] = factor;
  for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) {
      sums[c] = Kind::step(sums[c], factor);
      LK_KEEP(sums[c]);
    }
  }
  double total = 0;
#pragma GCC unroll 12
  for (int c = 0; c < kChains; ++c) total += double(sums[c][0]);
  return total;
}

uint64_t read_thread(const char* begin, const char* end) {
  Words sums[4] = {};
  for (; end - begin >= 4 * kWidth * 4; begin += 4 * kWidth * 4) {
    for (int i = 0; i < 4; ++i) sums[i] ^= reinterpret_cast<const Words*>(begin)[i];
  }
  return (sums[0] ^ sums[1] ^ sums[2] ^ sums[3])[0];
}

template <class Work>
double best_of(int threads, int times, Work work) {
  double best = 1e30;
  for (int t = 0; t < times; ++t) {
    std::vector<std::thread> helpers;
    const double start = seconds();
    for (int i = 1; i < threads; ++i) helpers.emplace_back(work, i);
    work(0);
    for (auto& helper : helpers) helper.join();
    const double took = seconds() - start;
    if (took < best) best = took;
  }
  return best;
}

volatile double sink;

template <class Kind>
double rate(int threads) {
  const int64_t steps = 4'000'000;
  const double took = best_of(threads, 9, [&](int) { sink = multiply_add<Kind>(steps); });
  return 2.0 * Kind::kMultiplyAdds * kChains * steps * threads / took;
}

}  // namespace

// Operations (two for each multiply-add) a second, best of several tries; 0 where the processor has
// no instruction for it.
extern "C" double peak_float32(int threads) { return rate<Float32>(threads); }

extern "C" double peak_bfloat16(int threads) {
#if defined(LK_BFLOAT16)
  return rate<BFloat16>(threads);
#else
  return 0 * threads;
#endif
}

extern "C" double peak_int8(int threads) {
#if defined(LK_INT8)
  return rate<Int8>(threads);
#else
  return 0 * threads;
#endif
}

// Bytes read a second from `bytes` bytes at `data`, again and again, best of several tries. Each
// try reads `passes` times.
extern "C" double peak_read(const char* data, int64_t bytes, int64_t passes, int threads) {
  const double took = best_of(threads, 9, [&](int i) {
    uint64_t total = 0;
    for (int64_t p = 0; p < passes; ++p) {
      total ^= read_thread(data + bytes / threads * i, data + bytes / threads * (i + 1));
      asm volatile("" : "+r"(total) : : "memory");
    }
    sink = double(total);
  });
  return double(bytes) * double(passes) / took;
}
