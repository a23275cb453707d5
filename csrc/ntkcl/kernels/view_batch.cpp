#include "ntkcl/kernels/view_batch.h"

namespace ntkcl::kernels {

void complete(ViewJob& job, int64_t size) {
  job.rows_first = rows_come_first(job.height, job.width, job.resized_height, job.resized_width);
  const AxisMap second = job.rows_first ? job.columns() : job.rows();
  const int64_t first = job.rows_first ? job.left : job.top;
  const Span low = span_of(second, first), high = span_of(second, first + size - 1);
  job.read = {low.first, high.first + high.count - low.first};
}

void fill_views_cpu(const ViewBatch& batch) {
  for (int64_t image = 0; image < batch.images; ++image) {
    for (int64_t output = 0; output < batch.size; ++output) {
      fill_weights(batch, image, 0, output);
      fill_weights(batch, image, 1, output);
    }
    const int64_t between = batch.jobs[image].between_pixels(batch.size);
    for (int64_t i = 0; i < between; ++i) {
      fill_between(batch, image, i);
    }
    for (int64_t i = 0; i < batch.size * batch.size; ++i) {
      fill_out(batch, image, i);
    }
  }
}

}  // namespace ntkcl::kernels
