#pragma once

#include <algorithm>

#include "ntkcl/dist/communicator.h"

// Which rows of a batch each rank computes, and the way from these to the whole batch and back.
//
// Note: the network runs on a rank's own rows; all that follows whole() - heads, losses,
// statistics, scores - every rank computes for the whole batch. So a loss may look at all images
// of a batch together, and nothing but class features and gradients travels.
namespace ntkcl::dist {

class Rows {
 public:
  Rows() = default;  // of one rank: all of them
  // A rank's part of `total` rows; the first ranks have one more where they cannot be equal.
  Rows(std::shared_ptr<Communicator> ranks, int64_t total);

  int64_t count() const { return count_; }
  int64_t total() const { return total_; }
  bool shared() const { return ranks_ != nullptr; }
  // What a rank computes: its rows, or the first one where it has none, since networks do not like
  // empty batches; whole() leaves that out.
  int64_t held_first() const { return count_ > 0 ? first_ : 0; }
  int64_t held() const { return count_ > 0 ? count_ : 1; }

  // The rows that a rank computes, of all along `dim`.
  at::Tensor own(const at::Tensor& whole, int64_t dim = 0) const;
  // The rows of all ranks. Its backward pass gives a rank its rows' gradient times the number of
  // ranks, so that the mean of a parameter's gradients over the ranks is their sum where it acts
  // before whole(), and the gradient itself where it acts after it.
  at::Tensor whole(const at::Tensor& own, int64_t dim = 0) const;

 private:
  friend struct WholeFunction;
  at::Tensor gathered(const at::Tensor& own, int64_t dim) const;
  int64_t count_of(int64_t rank) const;

  std::shared_ptr<Communicator> ranks_;
  int64_t first_ = 0, count_ = 0, total_ = 0;
};

// The mean over the ranks, in place: one message a type and device. All are defined, and the same
// ones on each rank.
void average_(Communicator& ranks, const std::vector<at::Tensor>& tensors);

}  // namespace ntkcl::dist
