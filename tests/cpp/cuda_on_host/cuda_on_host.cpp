#include "cuda_on_host.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
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
    std::for_each(begin(), end(), [](const auto& fiber) { fiber->state = State::kReady; });
    while (any(State::kReady)) {
      run_ready();
      release();
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
    const size_t self = current_, turn = pool[self]->exchanges++ % 2;
    pool[self]->given[turn] = value;
    wait(State::kAtWarp);
    return pool.at(self ^ static_cast<size_t>(mask))->given[turn];
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

  void run_ready() {
    for (size_t i = 0; i < size_; ++i) {
      current_ = order == Order::kAscending ? i : size_ - 1 - i;
      if (pool[current_]->state == State::kReady) {
        go_on(*pool[current_]);
      }
    }
  }

  // Lets those go on who have all arrived.
  void release() {
    for (size_t first = 0; first < size_; first += kWarp) {
      release(first, std::min(first + kWarp, size_), State::kAtWarp);
    }
    release(0, size_, State::kAtBlock);
  }

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
