// What this processor can do at most: fused multiply-adds a second, and bytes read a second.
#include <pthread.h>
#include <stdint.h>

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

double fma_thread(int64_t steps) {
  Floats sums[kChains];
  Floats factor = {};
  factor += 0.999f;
#pragma GCC unroll 12
  for (int c = 0; c < kChains; ++c) sums[c] = factor;
  for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) {
      sums[c] = sums[c] * factor + factor;
      LK_KEEP(sums[c]);
    }
  }
  float total = 0;
#pragma GCC unroll 12
  for (int c = 0; c < kChains; ++c) total += sums[c][0];
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

}  // namespace

// Floating point operations (two for each multiply-add) a second, best of several tries.
extern "C" double peak_flops(int threads) {
  const int64_t steps = 4'000'000;
  const double took = best_of(threads, 9, [&](int) { sink = fma_thread(steps); });
  return 2.0 * kWidth * kChains * steps * threads / took;
}

// Bytes read a second from `bytes` bytes at `data`, best of several tries.
extern "C" double peak_read(const char* data, int64_t bytes, int threads) {
  const double took = best_of(threads, 9, [&](int i) {
    sink = double(read_thread(data + bytes / threads * i, data + bytes / threads * (i + 1)));
  });
  return bytes / took;
}
