#include "ntkcl/ops/tensor_lists.h"

#include <algorithm>
#include <string>
#include <utility>

#include "ntkcl/ops/checks.h"

namespace ntkcl::ops {
namespace {

constexpr int64_t kElementsOfPart = 16384;

std::string name_of(const char* list, size_t index) {
  return std::string(list) + "[" + std::to_string(index) + "]";
}

void check_contiguous(const char* op, const std::string& name, const at::Tensor& tensor) {
  NTKCL_OP_CHECK(tensor.is_contiguous(), op, "expected ", name, " contiguous, got strides ",
                 tensor.sym_strides());
}

int64_t width_of(const at::Tensor& tensor, int64_t rows) {
  return rows == 0 ? 0 : tensor.numel() / rows;
}

}  // namespace

void check_parameters(const char* op, at::TensorList parameters) {
  NTKCL_OP_CHECK(!parameters.empty(), op, "expected at least one parameter, got none");
  for (size_t i = 0; i < parameters.size(); ++i) {
    const at::Tensor& parameter = parameters[i];
    const at::ScalarType type = parameter.scalar_type();
    const std::string name = name_of("parameters", i);
    NTKCL_OP_CHECK_TYPE(type == at::kFloat || type == at::kDouble, op, "expected ", name,
                        " of float32 or float64, got ", type);
    check_like(op, name, parameter, "parameters[0]", parameters[0]);
    check_contiguous(op, name, parameter);
  }
}

void check_item(const char* op, const char* list, size_t index, const at::Tensor& tensor,
                const at::Tensor& parameter, bool dense) {
  const std::string name = name_of(list, index), parameter_name = name_of("parameters", index);
  check_like(op, name, tensor, parameter_name, parameter);
  check_same_shape(op, name, tensor, parameter_name, parameter);
  if (dense) {
    check_contiguous(op, name, tensor);
  }
}

void check_beside(const char* op, const char* name, at::TensorList list, at::TensorList parameters,
                  bool dense) {
  NTKCL_OP_CHECK(list.size() == parameters.size(), op, "expected ", parameters.size(),
                 " tensors in ", name, ", one for each parameter, got ", list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    check_item(op, name, i, list[i], parameters[i], dense);
  }
}

void check_apart(const char* op, std::initializer_list<at::TensorList> changed) {
  std::vector<std::pair<const char*, const char*>> places;
  for (const at::TensorList list : changed) {
    for (const at::Tensor& tensor : list) {
      if (tensor.numel() > 0) {
        const auto* begin = static_cast<const char*>(tensor.mutable_data_ptr());
        places.emplace_back(begin, begin + tensor.nbytes());
      }
    }
  }
  std::sort(places.begin(), places.end());
  for (size_t i = 1; i < places.size(); ++i) {
    NTKCL_OP_CHECK(places[i - 1].second <= places[i].first, op,
                   "expected to change tensors that share no memory, got two that do");
  }
}

std::vector<at::Tensor> contiguous(at::TensorList list) {
  std::vector<at::Tensor> dense;
  dense.reserve(list.size());
  for (const at::Tensor& tensor : list) {
    dense.push_back(tensor.contiguous());
  }
  return dense;
}

std::vector<Part> parts_of(at::TensorList list, at::IntArrayRef rows) {
  std::vector<Part> parts;
  for (size_t tensor = 0; tensor < list.size(); ++tensor) {
    const int64_t width = width_of(list[tensor], rows[tensor]);
    for (int64_t row = 0; row < rows[tensor]; ++row) {
      for (int64_t begin = 0; begin < width; begin += kElementsOfPart) {
        const int64_t end = std::min(begin + kElementsOfPart, width);
        parts.push_back({tensor, row, row * width + begin, row * width + end});
      }
    }
  }
  return parts;
}

std::vector<Part> parts_of(at::TensorList list) {
  return parts_of(list, std::vector<int64_t>(list.size(), 1));
}

int64_t blocks_of(at::TensorList list, at::IntArrayRef rows) {
  constexpr int64_t kElementsOfBlock = 1024, kMaxBlocks = 128;
  int64_t longest = 1;
  for (size_t i = 0; i < list.size(); ++i) {
    longest = std::max(longest, width_of(list[i], rows[i]));
  }
  return std::min((longest + kElementsOfBlock - 1) / kElementsOfBlock, kMaxBlocks);
}

int64_t blocks_of(at::TensorList list) {
  return blocks_of(list, std::vector<int64_t>(list.size(), 1));
}

}  // namespace ntkcl::ops
