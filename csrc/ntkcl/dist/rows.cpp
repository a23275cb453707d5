#include "ntkcl/dist/rows.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <map>

#include "ntkcl/core/error.h"

namespace ntkcl::dist {

struct WholeFunction : torch::autograd::Function<WholeFunction> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& own,
                            const Rows& rows, int64_t dim) {
    context->saved_data["dim"] = dim;
    context->saved_data["first"] = rows.first_;
    context->saved_data["count"] = rows.count_;
    context->saved_data["size"] = rows.ranks_->size();
    return rows.gathered(own, dim);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    const auto saved = [&](const char* name) { return context->saved_data[name].toInt(); };
    const int64_t dim = saved("dim"), count = saved("count");
    const at::Tensor own =
        gradients[0].narrow(dim, saved("first"), count) * static_cast<double>(saved("size"));
    if (count > 0) {
      return {own, {}, {}};
    }
    auto sizes = own.sizes().vec();  // the copy that this rank has instead of rows
    sizes[static_cast<size_t>(dim)] = 1;
    return {own.new_zeros(sizes), {}, {}};
  }
};

Rows::Rows(std::shared_ptr<Communicator> ranks, int64_t total)
    : ranks_(ranks->size() > 1 ? std::move(ranks) : nullptr), count_(total), total_(total) {
  if (ranks_) {
    const int64_t rank = ranks_->rank(), size = ranks_->size();
    count_ = count_of(rank);
    first_ = rank * (total / size) + std::min(rank, total % size);
  }
}

int64_t Rows::count_of(int64_t rank) const {
  const int64_t size = ranks_->size();
  return total_ / size + (rank < total_ % size ? 1 : 0);
}

at::Tensor Rows::own(const at::Tensor& whole, int64_t dim) const {
  return ranks_ ? whole.narrow(dim, held_first(), held()) : whole;
}

at::Tensor Rows::whole(const at::Tensor& own, int64_t dim) const {
  return ranks_ ? WholeFunction::apply(own, *this, dim) : own;
}

at::Tensor Rows::gathered(const at::Tensor& own, int64_t dim) const {
  NTKCL_CHECK(own.size(dim) == held(), "ranks", "expected a row for each of ", held(),
              " images, got ", own.sizes());
  // Padded to one shape, and as bytes: not every backend knows every type.
  const at::Tensor rows = own.detach().movedim(dim, 0).narrow(0, 0, count_);
  auto sizes = rows.sizes().vec();
  sizes[0] = count_of(0);
  const at::Tensor padded = rows.new_zeros(sizes);
  padded.narrow(0, 0, count_).copy_(rows);
  const std::vector<at::Tensor> of_ranks = ranks_->gather(padded.view(at::kByte));
  std::vector<at::Tensor> parts;
  for (int64_t r = 0; r < ranks_->size(); ++r) {
    const at::Tensor part = of_ranks[static_cast<size_t>(r)].view(own.scalar_type());
    parts.push_back(part.narrow(0, 0, count_of(r)));
  }
  return at::cat(parts).movedim(0, dim).contiguous();
}

void average_(Communicator& ranks, const std::vector<at::Tensor>& tensors) {
  if (ranks.size() == 1) {
    return;
  }
  std::map<std::pair<at::ScalarType, at::DeviceType>, std::vector<at::Tensor>> of_kinds;
  for (const at::Tensor& tensor : tensors) {
    of_kinds[{tensor.scalar_type(), tensor.device().type()}].push_back(tensor);
  }
  for (const auto& [kind, of_type] : of_kinds) {
    std::vector<at::Tensor> flat;
    for (const at::Tensor& tensor : of_type) {
      flat.push_back(tensor.reshape({-1}));
    }
    at::Tensor message = at::cat(flat);
    ranks.sum_(message);
    message.div_(static_cast<double>(ranks.size()));
    int64_t first = 0;
    for (const at::Tensor& tensor : of_type) {
      tensor.copy_(message.narrow(0, first, tensor.numel()).view(tensor.sizes()));
      first += tensor.numel();
    }
  }
}

}  // namespace ntkcl::dist
