#undef _FORTIFY_SOURCE  // its longjmp stays on one stack

#include "cuda_on_host.h"

#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace cuda_on_host {
namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = size_t{64} << 10;

enum class State { kReady, kAtWarp, kAtBlock, kDone };

struct Fiber {
  ucontext_t start{};
  jmp_buf place{};
  bool started = false;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::kReady;
  uint64_t given[2] = {};  // to the exchanges of its warp, by turns
  size_t exchanges = 0;
  Index index;
};

// Fills the shared memory of all kernels with 0xFF: thread-local variables of the program are
// nothing else.
void poison_shared_memory() {
  const auto poison = [](dl_phdr_info* program, size_t, void*) {
    for (int i = 0; i < program->dlpi_phnum; ++i) {
      if (program->dlpi_phdr[i].p_type == PT_TLS && program->dlpi_tls_data) {
        std::memset(program->dlpi_tls_data, 0xFF, program->dlpi_phdr[i].p_memsz);
      }
    }
    return 1;  // the first is the program itself
  };
  dl_iterate_phdr(poison, nullptr);
}

// Used by one launch after another. They begin by a context, and go on by long jumps, which make no
// system call.
std::vector<std::unique_ptr<Fiber>> pool;

// Runs one block at a time.
class Block {
 public:
  Block(dim3 block, const std::function<void()>& thread)
      : thread_(thread), size_(size_t{block.x} * block.y * block.z) {
    while (pool.size() < size_) {
      pool.push_back(std::make_unique<Fiber>());
    }
    for (unsigned i = 0; i < size_; ++i) {
      pool[i]->index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
      pool[i]->exchanges = 0;
    }
  }

  void run() {
    poison_shared_memory();
    std::for_each(begin(), end(), [](const auto& fiber) { fiber->state = State::kReady; });
    while (any(State::kReady)) {
      const size_t warps = (size_ + kWarp - 1) / kWarp;
      for (size_t i = 0; i < warps; ++i) {
        run_warp(kWarp * turn(i, warps));
      }
      release(0, size_, State::kAtBlock);
    }
    if (!wrong_.empty()) {
      throw std::logic_error(wrong_);
    }
    if (any(State::kAtWarp) || any(State::kAtBlock)) {
      pool.clear();  // they stand in the middle of the kernel
      throw std::logic_error("threads of a block wait for others that have ended");
    }
  }

  void wait(State state) {
    Fiber& self = *pool[current_];
    self.state = state;
    if (_setjmp(self.place) == 0) {
      _longjmp(scheduler_, 1);
    }
  }

  // A lane gives to the next exchange only when all have come there, and have read what this one
  // gave.
  uint64_t exchange(uint64_t value, int mask) {
    const size_t self = current_, place = pool[self]->exchanges++ % 2;
    pool[self]->given[place] = value;
    wait(State::kAtWarp);
    const size_t other = self ^ static_cast<size_t>(mask);
    if (other / kWarp != self / kWarp || other >= size_) {
      wrong_ = "a shuffle from a lane that the warp does not have";
      return value;
    }
    return pool[other]->given[place];
  }

 private:
  static void enter();

  void go_on(Fiber& fiber) {
    threadIdx = fiber.index;
    if (_setjmp(scheduler_) != 0) {
      return;
    }
    if (fiber.started) {
      _longjmp(fiber.place, 1);
    }
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    makecontext(&fiber.start, &Block::enter, 0);
    setcontext(&fiber.start);
  }

  static size_t turn(size_t i, size_t count) {
    return order == Order::kAscending ? i : count - 1 - i;
  }

  // A warp goes as far as it can before another one does anything.
  void run_warp(size_t first) {
    const size_t lanes = std::min(size_t{kWarp}, size_ - first);
    const auto is_ready = [](const auto& fiber) { return fiber->state == State::kReady; };
    const auto warp = begin() + static_cast<std::ptrdiff_t>(first);
    while (std::any_of(warp, warp + static_cast<std::ptrdiff_t>(lanes), is_ready)) {
      for (size_t i = 0; i < lanes; ++i) {
        current_ = first + turn(i, lanes);
        if (is_ready(pool[current_])) {
          go_on(*pool[current_]);
        }
      }
      release(first, first + lanes, State::kAtWarp);
    }
  }

  // Lets those go on who have all arrived.
  void release(size_t first, size_t last, State waiting) {
    const auto begin = this->begin() + static_cast<std::ptrdiff_t>(first),
               end = this->begin() + static_cast<std::ptrdiff_t>(last);
    if (std::all_of(begin, end, [&](const auto& fiber) { return fiber->state == waiting; })) {
      std::for_each(begin, end, [](const auto& fiber) { fiber->state = State::kReady; });
    }
  }

  bool any(State state) const {
    return std::any_of(begin(), end(), [&](const auto& fiber) { return fiber->state == state; });
  }

  using Place = std::vector<std::unique_ptr<Fiber>>::iterator;
  Place begin() const { return pool.begin(); }
  Place end() const { return pool.begin() + static_cast<std::ptrdiff_t>(size_); }

  const std::function<void()>& thread_;
  size_t size_;
  std::string wrong_;
  jmp_buf scheduler_{};
  size_t current_ = 0;
};

Block* running = nullptr;

void Block::enter() {
  for (;;) {
    running->thread_();
    running->wait(State::kDone);  // until the next block
  }
}

}  // namespace

void run(dim3 grid, dim3 block, const std::function<void()>& thread) {
  gridDim = grid;
  blockDim = block;
  const auto threads = std::make_unique<Block>(block, thread);
  running = threads.get();
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        threads->run();
      }
    }
  }
}

void block_barrier() {
  running->wait(State::kAtBlock);
}

uint64_t exchange(uint64_t value, int mask) {
  return running->exchange(value, mask);
}

}  // namespace cuda_on_host
