// Scratch memory that a thread keeps from call to call.
#pragma once

#include <cstddef>

namespace lk {

// What a thread may want scratch memory for; each purpose has its own buffer.
enum class Scratch {
  activations,
  weights,
  sums,
  rows,
  hidden,
  scores,
  result,
  parts,
  factors,
  channels,
  count
};

// At least `bytes` of this thread's memory for a purpose, aligned to 64 bytes, contents undefined;
// nullptr if there is none to be had. Valid until the thread's next request for the same purpose.
// A buffer grows to the largest request and is freed when its thread ends.
void* scratch(Scratch purpose, std::size_t bytes);

}  // namespace lk
