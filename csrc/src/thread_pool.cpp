#include "thread_pool.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace lk {
namespace {

struct Loop {
  Task task;
  void* context;
  int64_t count;
  std::atomic<int64_t> next{0};

  // Run what no other thread has taken.
  void drain() {
    for (;;) {
      const int64_t index = next.fetch_add(1, std::memory_order_relaxed);
      if (index >= count) return;
      task(context, index);
    }
  }
};

class Pool {
 public:
  // Returns false if another caller holds the pool.
  bool run(Loop& loop, int32_t threads) {
    std::unique_lock<std::mutex> owner(busy_, std::try_to_lock);
    if (!owner.owns_lock()) return false;
    const int32_t helpers =
        start(static_cast<int32_t>(loop.count < threads ? loop.count : threads) - 1);
    if (helpers == 0) return false;
    {
      std::lock_guard<std::mutex> guard(state_);
      loop_ = &loop;
      wanted_ = helpers;
      working_ = helpers;
      ++generation_;
    }
    wake_.notify_all();
    loop.drain();
    std::unique_lock<std::mutex> guard(state_);
    done_.wait(guard, [this] { return working_ == 0; });
    return true;
  }

 private:
  // Bring the pool to `wanted` helpers and say how many there are: fewer if the system refuses.
  int32_t start(int32_t wanted) {
    while (static_cast<int32_t>(helpers_.size()) < wanted) {
      const int32_t rank = static_cast<int32_t>(helpers_.size());
      try {
        helpers_.emplace_back([this, rank, seen = generation_] { work(rank, seen); });
      } catch (const std::exception&) {
        break;
      }
    }
    const int32_t have = static_cast<int32_t>(helpers_.size());
    return have < wanted ? have : wanted;
  }

  void work(int32_t rank, uint64_t seen) {
    for (;;) {
      std::unique_lock<std::mutex> guard(state_);
      wake_.wait(guard, [&] { return generation_ != seen; });
      seen = generation_;
      if (rank >= wanted_) continue;
      Loop* const loop = loop_;
      guard.unlock();
      loop->drain();
      guard.lock();
      if (--working_ == 0) done_.notify_one();
    }
  }

  std::mutex busy_;   // held by the caller whose loop is running
  std::mutex state_;  // guards what follows
  std::condition_variable wake_, done_;
  std::vector<std::thread> helpers_;
  uint64_t generation_ = 0;
  int32_t wanted_ = 0, working_ = 0;
  Loop* loop_ = nullptr;
};

// Never destroyed: helpers wait in it when the process ends. A child of fork() gets a fresh one,
// since the helpers did not come along and a mutex may have been held.
std::atomic<Pool*> current{nullptr};
std::atomic<ParallelRegion> host{nullptr};

void renew() {
  host.store(nullptr, std::memory_order_release);
  current.store(new Pool, std::memory_order_release);
}

void prepare() {
  static std::once_flag once;
  std::call_once(once, [] {
    renew();
#if !defined(_WIN32)
    pthread_atfork(nullptr, nullptr, renew);
#endif
  });
}

}  // namespace

void parallel_for(int64_t count, int32_t threads, Task task, void* context) {
  Loop loop{task, context, count};
  if (count > 1 && threads > 1) {
    prepare();
    if (const ParallelRegion region = host.load(std::memory_order_acquire)) {
      // As many threads as the host's own regions have, even if fewer would do: OpenMP ends those
      // that a region leaves out, and their workspaces with them.
      region([](void* data) { static_cast<Loop*>(data)->drain(); }, &loop,
             static_cast<unsigned>(threads), 0);
      return;
    }
    if (current.load(std::memory_order_acquire)->run(loop, threads)) return;
  }
  loop.drain();
}

void wait_for(const int64_t& counter, int64_t value) {
  while (__atomic_load_n(&counter, __ATOMIC_ACQUIRE) < value) std::this_thread::yield();
}

void announce(int64_t& counter, int64_t value) {
  __atomic_store_n(&counter, value, __ATOMIC_RELEASE);
}

void set_parallel_region(ParallelRegion region) {
  prepare();
  host.store(region, std::memory_order_release);
}

}  // namespace lk
