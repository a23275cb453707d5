#include "ntkcl/ops/checks.h"

#include <cmath>

namespace ntkcl::ops {

void check_floating(const char* op, std::string_view name, const at::Tensor& tensor) {
  const at::ScalarType type = tensor.scalar_type();
  NTKCL_OP_CHECK_TYPE(type == at::kFloat || type == at::kDouble || type == at::kBFloat16, op,
                      "expected ", name, " of float32, float64 or bfloat16, got ", type);
}

void check_like(const char* op, std::string_view name, const at::Tensor& tensor,
                std::string_view other_name, const at::Tensor& other) {
  NTKCL_OP_CHECK_TYPE(tensor.scalar_type() == other.scalar_type(), op, "expected ", name, " of ",
                      other_name, "'s type ", other.scalar_type(), ", got ", tensor.scalar_type());
  NTKCL_OP_CHECK(tensor.device() == other.device(), op, "expected ", name, " on ", other_name,
                 "'s device ", other.device(), ", got ", tensor.device());
}

void check_same_shape(const char* op, std::string_view name, const at::Tensor& tensor,
                      std::string_view other_name, const at::Tensor& other) {
  NTKCL_OP_CHECK(tensor.sym_sizes() == other.sym_sizes(), op, "expected ", name, " of ", other_name,
                 "'s shape ", other.sym_sizes(), ", got ", tensor.sym_sizes());
}

void check_shape(const char* op, std::string_view name, const at::Tensor& tensor,
                 c10::SymIntArrayRef expected) {
  NTKCL_OP_CHECK(tensor.sym_sizes() == expected, op, "expected ", name, " of shape ", expected,
                 ", got ", tensor.sym_sizes());
}

void check_not_negative(const char* op, const char* name, double value) {
  NTKCL_OP_CHECK(value >= 0 && std::isfinite(value), op, "expected a finite ", name, " >= 0, got ",
                 value);
}

void check_fraction(const char* op, const char* name, double value) {
  NTKCL_OP_CHECK(value >= 0 && value < 1, op, "expected 0 <= ", name, " < 1, got ", value);
}

void check_dropout_probability(const char* op, double p) {
  NTKCL_OP_CHECK(p >= 0 && p < 1, op, "expected a dropout probability 0 <= p < 1, got ", p);
}

void check_dropout(const char* op, const std::optional<at::Tensor>& mask,
                   const std::optional<at::Tensor>& key, double p, std::string_view whose,
                   c10::SymIntArrayRef shape, at::Device device) {
  check_dropout_probability(op, p);
  NTKCL_OP_CHECK(!(mask && key), op, "expected a mask or a key, got both");
  if (mask) {
    NTKCL_OP_CHECK_TYPE(mask->scalar_type() == at::kByte || mask->scalar_type() == at::kBool, op,
                        "expected mask of uint8 or bool, got ", mask->scalar_type());
    NTKCL_OP_CHECK(mask->sym_sizes() == shape, op, "expected mask of ", whose, " shape ", shape,
                   ", got ", mask->sym_sizes());
    NTKCL_OP_CHECK(mask->device() == device, op, "expected mask on ", whose, " device ", device,
                   ", got ", mask->device());
  }
  if (key) {
    check_key(op, *key);
    NTKCL_OP_CHECK(key->is_cpu() || key->device() == device, op, "expected key on the CPU or on ",
                   whose, " device ", device, ", got ", key->device());
  }
}

void check_key(const char* op, const at::Tensor& key) {
  NTKCL_OP_CHECK_TYPE(key.scalar_type() == at::kLong, op, "expected key of int64, got ",
                      key.scalar_type());
  NTKCL_OP_CHECK(key.sym_numel() == 1, op, "expected key with one element, got shape ",
                 key.sym_sizes());
}

}  // namespace ntkcl::ops
