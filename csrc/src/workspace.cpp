#include "workspace.h"

#include <cstdlib>
#include <new>

namespace lk {
namespace {

constexpr std::size_t kAlignment = 64;
constexpr std::size_t kPurposes = static_cast<std::size_t>(Scratch::count);

class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { release(); }

  void* get(std::size_t bytes) {
    if (bytes > size_) {
      release();
      data_ = ::operator new(bytes, std::align_val_t{kAlignment}, std::nothrow);
      size_ = data_ == nullptr ? 0 : bytes;
    }
    return data_;
  }

 private:
  void release() {
    ::operator delete(data_, std::align_val_t{kAlignment});
    data_ = nullptr;
    size_ = 0;
  }

  void* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace

void* scratch(Scratch purpose, std::size_t bytes) {
  thread_local Buffer buffers[kPurposes];
  return buffers[static_cast<std::size_t>(purpose)].get(bytes);
}

}  // namespace lk
