// A pool of threads that outlives calls, for loops whose iterations are independent.
#pragma once

#include <cstdint>

namespace lk {

using Task = void (*)(void* context, int64_t index);

// Run task(context, i) for every i in [0, count), on at most `threads` threads, the caller among
// them; returns when all are done. Which thread runs which index is not fixed, so tasks must not
// depend on each other. A second caller that comes while the pool is busy runs its loop by itself.
// Safe after fork(): a child starts its own threads when it first needs them.
void parallel_for(int64_t count, int32_t threads, Task task, void* context);

using ParallelRegion = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// See lk_set_parallel_region.
void set_parallel_region(ParallelRegion region);

}  // namespace lk
