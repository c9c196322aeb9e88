// A pool of threads that outlives calls, for loops whose iterations are independent.
#pragma once

#include <cstdint>

namespace lk {

using Task = void (*)(void* context, int64_t index);

// Run task(context, i) for every i in [0, count), on at most `threads` threads, the caller among
// them; returns when all are done. Indices are taken in rising order, which thread runs which is
// not fixed: a task may wait for one of a lower index (see wait_for), and for no other. A second
// caller that comes while the pool is busy runs its loop by itself. Safe after fork(): a child
// starts its own threads when it first needs them.
void parallel_for(int64_t count, int32_t threads, Task task, void* context);

// Wait until another thread has announced that a counter has reached `value`, and see what it wrote
// before.
void wait_for(const int64_t& counter, int64_t value);
void announce(int64_t& counter, int64_t value);

using ParallelRegion = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// See lk_set_parallel_region.
void set_parallel_region(ParallelRegion region);

}  // namespace lk
