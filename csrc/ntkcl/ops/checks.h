#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

// Errors of operators. They are c10's, since torch's own entry from Python makes ValueError and
// TypeError of no others.
#define NTKCL_OP_CHECK(condition, op, ...) TORCH_CHECK_VALUE(condition, "[", op, "] ", __VA_ARGS__)
#define NTKCL_OP_CHECK_TYPE(condition, op, ...) \
  TORCH_CHECK_TYPE(condition, "[", op, "] ", __VA_ARGS__)

// Checks that several operators make of their arguments. They hold for symbolic sizes as well.
namespace ntkcl::ops {

// TypeError unless float32, float64 or bfloat16.
void check_floating(const char* op, std::string_view name, const at::Tensor& tensor);

// TypeError unless of other's element type; ValueError unless on its device.
void check_like(const char* op, std::string_view name, const at::Tensor& tensor,
                std::string_view other_name, const at::Tensor& other);

// ValueError unless of other's shape.
void check_same_shape(const char* op, std::string_view name, const at::Tensor& tensor,
                      std::string_view other_name, const at::Tensor& other);

// ValueError unless of this shape.
void check_shape(const char* op, std::string_view name, const at::Tensor& tensor,
                 c10::SymIntArrayRef expected);

// ValueError unless value >= 0 and finite; unless 0 <= value < 1.
void check_not_negative(const char* op, const char* name, double value);
void check_fraction(const char* op, const char* name, double value);

// ValueError unless 0 <= p < 1.
void check_dropout_probability(const char* op, double p);

// Dropout of something of shape `shape` on `device`, "x's": a mask of that shape, uint8 or bool; or
// a key, on the CPU or there; not both. TypeError, ValueError.
void check_dropout(const char* op, const std::optional<at::Tensor>& mask,
                   const std::optional<at::Tensor>& key, double p, std::string_view whose,
                   c10::SymIntArrayRef shape, at::Device device);

// A Philox key: one int64. TypeError, ValueError.
void check_key(const char* op, const at::Tensor& key);

}  // namespace ntkcl::ops
