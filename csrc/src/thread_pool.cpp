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

class Pool {
 public:
  // Returns false if another caller holds the pool.
  bool run(int64_t count, int32_t threads, Task task, void* context) {
    std::unique_lock<std::mutex> owner(busy_, std::try_to_lock);
    if (!owner.owns_lock()) return false;
    const int32_t helpers = start(static_cast<int32_t>(count < threads ? count : threads) - 1);
    if (helpers == 0) return false;
    {
      std::lock_guard<std::mutex> guard(state_);
      task_ = task;
      context_ = context;
      count_ = count;
      next_.store(0, std::memory_order_relaxed);
      wanted_ = helpers;
      working_ = helpers;
      ++generation_;
    }
    wake_.notify_all();
    drain(count, task, context);
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

  void drain(int64_t count, Task task, void* context) {
    for (;;) {
      const int64_t index = next_.fetch_add(1, std::memory_order_relaxed);
      if (index >= count) return;
      task(context, index);
    }
  }

  void work(int32_t rank, uint64_t seen) {
    for (;;) {
      std::unique_lock<std::mutex> guard(state_);
      wake_.wait(guard, [&] { return generation_ != seen; });
      seen = generation_;
      if (rank >= wanted_) continue;
      const int64_t count = count_;
      const Task task = task_;
      void* const context = context_;
      guard.unlock();
      drain(count, task, context);
      guard.lock();
      if (--working_ == 0) done_.notify_one();
    }
  }

  std::mutex busy_;   // held by the caller whose loop is running
  std::mutex state_;  // guards what follows, except next_
  std::condition_variable wake_, done_;
  std::vector<std::thread> helpers_;
  std::atomic<int64_t> next_{0};
  uint64_t generation_ = 0;
  int32_t wanted_ = 0, working_ = 0;
  int64_t count_ = 0;
  Task task_ = nullptr;
  void* context_ = nullptr;
};

// Never destroyed: helpers wait in it when the process ends. A child of fork() gets a fresh one,
// since the helpers did not come along and a mutex may have been held.
std::atomic<Pool*> current{nullptr};

void renew() { current.store(new Pool, std::memory_order_release); }

Pool& pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    renew();
#if !defined(_WIN32)
    pthread_atfork(nullptr, nullptr, renew);
#endif
  });
  return *current.load(std::memory_order_acquire);
}

}  // namespace

void parallel_for(int64_t count, int32_t threads, Task task, void* context) {
  if (count > 1 && threads > 1 && pool().run(count, threads, task, context)) return;
  for (int64_t index = 0; index < count; ++index) task(context, index);
}

}  // namespace lk
