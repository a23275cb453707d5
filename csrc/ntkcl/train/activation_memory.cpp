#include "ntkcl/train/activation_memory.h"

#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>
#include <sys/mman.h>

#include <bit>
#include <cstdlib>
#include <map>
#include <mutex>
#include <unordered_set>
#include <vector>

namespace ntkcl::train {
namespace {

constexpr size_t kHeader = 64;             // before the data, which stays aligned to it
constexpr size_t kKept = size_t{1} << 16;  // smaller blocks are malloc's
constexpr size_t kHugePage = size_t{1} << 21;

// What stands before the data of a block.
struct Header {
  size_t size;  // of the block; 0 for malloc's
};

// Up to the next of eight steps between powers of two, so that like sizes share blocks.
size_t rounded(size_t bytes) {
  const size_t step = std::bit_floor(bytes) / 8;
  return (bytes + step - 1) / step * step;
}

class Cache : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const size_t size = bytes < kKept ? 0 : rounded(bytes + kHeader);
    void* const block = size ? take(size) : std::aligned_alloc(kHeader, small_size(bytes));
    TORCH_CHECK(block, "[memory] cannot allocate ", bytes, " bytes");  // as torch's own does
    static_cast<Header*>(block)->size = size;
    void* const data = static_cast<char*>(block) + kHeader;
    {
      const std::lock_guard lock(mutex_);
      in_use_.insert(data);
    }
    return {data, data, &Cache::free, c10::Device(c10::kCPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &Cache::free; }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

  void begin() {
    const std::lock_guard lock(mutex_);
    if (users_++ == 0) {
      torchs_ = c10::GetCPUAllocator();
      c10::SetCPUAllocator(this, kPriority);
    }
  }

  void end() {
    const std::lock_guard lock(mutex_);
    if (--users_ > 0) {
      return;
    }
    c10::SetCPUAllocator(torchs_, kPriority);
    return_kept();
  }

 private:
  static constexpr uint8_t kPriority = 0;  // as torch's own, so that nothing is left behind

  static size_t small_size(size_t bytes) {
    return (bytes + kHeader + kHeader - 1) / kHeader * kHeader;
  }

  void* take(size_t size) {
    {
      const std::lock_guard lock(mutex_);
      const auto found = free_.find(size);
      if (found != free_.end() && !found->second.empty()) {
        void* const block = found->second.back();
        found->second.pop_back();
        return block;
      }
    }
    void* block = map(size);
    if (block == MAP_FAILED) {
      const std::lock_guard lock(mutex_);
      return_kept();
      block = map(size);
    }
    if (block == MAP_FAILED) {
      return nullptr;
    }
    if (size >= kHugePage) {
      madvise(block, size, MADV_HUGEPAGE);
    }
    return block;
  }

  static void* map(size_t size) {
    return mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  }

  // To the system. With the lock held.
  void return_kept() {
    for (const auto& [size, blocks] : free_) {
      for (void* block : blocks) {
        munmap(block, size);
      }
    }
    free_.clear();
  }

  static void free(void* data);

  std::mutex mutex_;
  std::map<size_t, std::vector<void*>> free_;  // by size
  // What we gave: oneDNN frees its tensors through the allocator of the day, also older ones.
  std::unordered_set<void*> in_use_;
  c10::Allocator* torchs_ = nullptr;
  int users_ = 0;
};

// Never destroyed: tensors may outlive all else.
Cache& cache() {
  static Cache* const instance = new Cache;
  return *instance;
}

void Cache::free(void* data) {
  if (!data) {
    return;
  }
  Cache& all = cache();
  const std::lock_guard lock(all.mutex_);
  if (all.in_use_.erase(data) == 0) {
    c10::GetDefaultCPUAllocator()->raw_deallocate(data);
    return;
  }
  void* const block = static_cast<char*>(data) - kHeader;
  const size_t size = static_cast<Header*>(block)->size;
  if (size == 0) {
    std::free(block);
  } else if (all.users_ > 0) {
    all.free_[size].push_back(block);
  } else {
    munmap(block, size);
  }
}

}  // namespace

ActivationMemory::ActivationMemory() {
  cache().begin();
}

ActivationMemory::~ActivationMemory() {
  cache().end();
}

}  // namespace ntkcl::train
