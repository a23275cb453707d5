#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <initializer_list>
#include <vector>

// Lists of parameters and what belongs to them, for operators that sweep over all of them.
namespace ntkcl::ops {

// At least one tensor; contiguous float32 or float64 tensors, all of one type on one device.
// ValueError, TypeError.
void check_parameters(const char* op, at::TensorList parameters);

// Tensor `index` of a list, of its parameter's shape, type and device, contiguous where `dense`.
// ValueError, TypeError.
void check_item(const char* op, const char* list, size_t index, const at::Tensor& tensor,
                const at::Tensor& parameter, bool dense = false);

// A list of as many tensors as parameters, each as check_item wants it. ValueError, TypeError.
void check_beside(const char* op, const char* name, at::TensorList list, at::TensorList parameters,
                  bool dense = false);

// ValueError if two of the tensors that an operator changes share memory. Not for Meta.
void check_apart(const char* op, std::initializer_list<at::TensorList> changed);

// Calls function(T{}) with T = float or double, the type of parameters that passed their check.
template <class Function>
auto with_parameter_type(const at::Tensor& parameter, Function&& function) {
  return parameter.scalar_type() == at::kDouble ? function(double{}) : function(float{});
}

std::vector<at::Tensor> contiguous(at::TensorList list);

// Elements [first, last) of row `row` of a tensor that stacks so many rows.
struct Part {
  size_t tensor = 0;
  int64_t row = 0;
  int64_t first = 0, last = 0;
};

// All elements of a list, none in two rows; rows: how many each tensor stacks. Parts do not depend
// on the number of threads, so that sums over them do not either.
std::vector<Part> parts_of(at::TensorList list, at::IntArrayRef rows);
std::vector<Part> parts_of(at::TensorList list);

// Calls run(part, index) for each, from several threads.
template <class Run>
void for_each_part(const std::vector<Part>& parts, const Run& run) {
  at::parallel_for(0, static_cast<int64_t>(parts.size()), 1, [&](int64_t begin, int64_t end) {
    for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i) {
      run(parts[i], i);
    }
  });
}

// Blocks of a GPU for each row: no more than the longest row can use.
int64_t blocks_of(at::TensorList list, at::IntArrayRef rows);
int64_t blocks_of(at::TensorList list);

}  // namespace ntkcl::ops
