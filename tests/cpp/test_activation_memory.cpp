#include <ATen/ATen.h>
#include <c10/core/CPUAllocator.h>

#include <thread>

#include "ntkcl/nn/frozen_linear.h"
#include "ntkcl/train/activation_memory.h"
#include "testing.h"

namespace ntkcl::train {
namespace {

constexpr int64_t kLarge = 1 << 20;

TEST_CASE("a large tensor's memory is kept for the next one of its size", "[memory]") {
  const ActivationMemory memory;
  const void* first = at::empty({kLarge}).data_ptr();
  at::Tensor between = at::empty({3 * kLarge});
  CHECK(at::empty({kLarge}).data_ptr() == first);
  CHECK(at::empty({kLarge - 1}).data_ptr() == first);  // like sizes share
  CHECK(at::empty({2 * kLarge}).data_ptr() != first);
  const at::Tensor in_use = at::empty({kLarge});
  CHECK(at::empty({kLarge}).data_ptr() != in_use.data_ptr());
}

TEST_CASE("every size can be allocated, aligned, resized and cloned", "[memory]") {
  const ActivationMemory memory;
  for (const int64_t bytes : {0, 1, 63, 64, 65535, 65536, 65537, 2097088, 2097152, 5000001}) {
    at::Tensor t = at::empty({bytes}, at::kByte);
    CHECK(reinterpret_cast<uintptr_t>(t.data_ptr()) % 64 == 0);
    t.fill_(7);
    const at::Tensor copy = t.clone();
    t.resize_({2 * bytes + 100000});
    CHECK(t.narrow(0, 0, bytes).equal(copy));
  }
}

TEST_CASE("tensors outlive the memory they came from", "[memory]") {
  at::Tensor inside;
  const c10::Allocator* before = c10::GetCPUAllocator();
  {
    const ActivationMemory memory;
    inside = at::full({kLarge}, 3.0F);
    const at::Tensor small = at::ones({4});
    CHECK(c10::GetCPUAllocator() != before);
  }
  CHECK(c10::GetCPUAllocator() == before);
  CHECK(inside.eq(3).all().item<bool>());
  inside.reset();
  at::Tensor outside = at::ones({kLarge});  // made before, freed within
  const ActivationMemory memory;
  outside.reset();
}

TEST_CASE("memory in use twice ends with the last user", "[memory]") {
  const c10::Allocator* before = c10::GetCPUAllocator();
  auto first = std::make_unique<ActivationMemory>();
  const c10::Allocator* kept = c10::GetCPUAllocator();
  const ActivationMemory second;
  first.reset();
  CHECK(c10::GetCPUAllocator() == kept);
  CHECK(kept != before);
}

TEST_CASE("raw memory of before is freed within, as oneDNN does", "[memory]") {
  void* const before = c10::GetCPUAllocator()->raw_allocate(kLarge);
  const ActivationMemory memory;
  c10::GetCPUAllocator()->raw_deallocate(before);
  c10::GetCPUAllocator()->raw_deallocate(c10::GetCPUAllocator()->raw_allocate(kLarge));
  CHECK(at::ones({kLarge}).sum().item<float>() == kLarge);
}

TEST_CASE("packed weights made within are freed after, and the other way round", "[memory]") {
  const nn::FrozenLinear linear{.weight = at::rand({256, 256}), .bias = at::rand({256})};
  const at::Tensor x = at::rand({4, 256});
  nn::FrozenLinear outside = linear.pack(4), inside;
  {
    const ActivationMemory memory;
    inside = linear.pack(4);
    CHECK(outside(x).allclose(inside(x)));
    outside = {};
  }
  CHECK(inside(x).allclose(linear(x), 1e-4, 1e-4));
}

TEST_CASE("threads allocate at once and leave their tensors to another", "[memory]") {
  const ActivationMemory memory;
  std::vector<at::Tensor> made(4);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < made.size(); ++i) {
    threads.emplace_back([&made, i] {
      for (int64_t n = 1; n <= 50; ++n) {
        made[i] = at::full({kLarge + n}, static_cast<float>(i));
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  for (size_t i = 0; i < made.size(); ++i) {
    CHECK(made[i].eq(static_cast<float>(i)).all().item<bool>());
  }
}

}  // namespace
}  // namespace ntkcl::train
