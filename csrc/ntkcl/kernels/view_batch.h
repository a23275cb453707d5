#pragma once

#include <cstdint>

#include "ntkcl/kernels/resample_axis.h"

// Views of a batch of images, each resized, mirrored and made brighter on its own, in three steps
// of which every place is filled independently of the others, so that a GPU can do them:
//
//   weights   of both axes, for each output row and column
//   between   the image after its first axis, 8 bits, only what the second reads
//   out       planes (images, 3, size, size)
//
// Pixels are those of resample(), bit for bit. A place is filled by the functions below, on the
// host and on a device.
namespace ntkcl::kernels {

struct ViewJob {
  int64_t pixels = 0;                             // where its (height, width, 3) bytes begin
  int64_t height = 0, width = 0;                  // of the input
  int64_t resized_height = 0, resized_width = 0;  // of what the whole input is resized to
  int64_t top = 0, left = 0;                      // of the size x size window of that which is kept
  int64_t between = 0;                            // where its bytes between the axes begin
  Span read{};  // what the second axis reads of `between`: rows, or columns where rows come first
  Filter filter = Filter::kBilinear;
  bool rows_first = false;
  bool mirrored = false;
  float brightness = 1;  // a pixel's factor; what is above 255 is cut

  NTKCL_HOST_DEVICE AxisMap columns() const {
    return {0, static_cast<float>(width), width, resized_width, filter};
  }
  NTKCL_HOST_DEVICE AxisMap rows() const {
    return {0, static_cast<float>(height), height, resized_height, filter};
  }
  // Pixels between the axes.
  NTKCL_HOST_DEVICE int64_t between_pixels(int64_t size) const { return read.count * size; }
};

// Fills in what follows from the rest: rows_first and read.
void complete(ViewJob& job, int64_t size);

struct ViewBatch {
  int64_t images = 0;
  int64_t size = 0;
  int64_t taps = 0;                 // room for the weights of an output
  int64_t most_between = 0;         // most pixels between the axes of an image
  const uint8_t* pixels = nullptr;  // of all images
  const ViewJob* jobs = nullptr;    // (images)
  Span* spans = nullptr;            // (images, 2, size): of columns, of rows
  double* exact = nullptr;          // (images, 2, size, taps), on the way to the weights
  int32_t* weights = nullptr;       // (images, 2, size, taps)
  uint8_t* between = nullptr;
  uint8_t* out = nullptr;  // (images, 3, size, size)
};

// Axis 0: columns, 1: rows.
NTKCL_HOST_DEVICE inline void fill_weights(const ViewBatch& batch, int64_t image, int64_t axis,
                                           int64_t output) {
  const ViewJob& job = batch.jobs[image];
  const int64_t place = (2 * image + axis) * batch.size + output;
  batch.spans[place] = write_weights(
      axis == 0 ? job.columns() : job.rows(), (axis == 0 ? job.left : job.top) + output,
      batch.exact + place * batch.taps, batch.weights + place * batch.taps);
}

// A blend with black in single precision, cut to whole values, as Pillow's ImageEnhance.Brightness.
NTKCL_HOST_DEVICE inline uint8_t brighter(uint8_t value, float factor) {
  const float product = factor * static_cast<float>(value);
  return static_cast<uint8_t>(product < 255.0f ? product : 255.0f);
}

// A pixel (3) of what the span's inputs give; `input` is its first, the next is `step` bytes on.
NTKCL_HOST_DEVICE inline void weigh(const uint8_t* input, int64_t step, const int32_t* weights,
                                    int64_t count, uint8_t (&pixel)[3]) {
  int32_t sums[3] = {kHalf, kHalf, kHalf};
  for (int64_t k = 0; k < count; ++k) {
    for (int c = 0; c < 3; ++c) {
      sums[c] += input[k * step + c] * weights[k];
    }
  }
  for (int c = 0; c < 3; ++c) {
    pixel[c] = pixel_of(sums[c]);
  }
}

// Pixel i of what is between the axes: (rows read, size), or (size, columns read) with rows first.
NTKCL_HOST_DEVICE inline void fill_between(const ViewBatch& batch, int64_t image, int64_t i) {
  const ViewJob& job = batch.jobs[image];
  const int64_t width = job.rows_first ? job.read.count : batch.size;
  const int64_t y = i / width, x = i % width;
  const int64_t axis = job.rows_first ? 1 : 0, output = job.rows_first ? y : x;
  const int64_t place = (2 * image + axis) * batch.size + output;
  const Span span = batch.spans[place];
  const int64_t row = job.rows_first ? span.first : job.read.first + y;
  const int64_t column = job.rows_first ? job.read.first + x : span.first;
  uint8_t pixel[3];
  weigh(batch.pixels + job.pixels + 3 * (row * job.width + column),
        job.rows_first ? 3 * job.width : 3, batch.weights + place * batch.taps, span.count, pixel);
  for (int c = 0; c < 3; ++c) {
    batch.between[job.between + 3 * i + c] = pixel[c];
  }
}

NTKCL_HOST_DEVICE inline void fill_out(const ViewBatch& batch, int64_t image, int64_t i) {
  const ViewJob& job = batch.jobs[image];
  const int64_t y = i / batch.size, x = i % batch.size;
  const int64_t axis = job.rows_first ? 0 : 1, output = job.rows_first ? x : y;
  const int64_t place = (2 * image + axis) * batch.size + output;
  const Span span = batch.spans[place];
  const int64_t width = job.rows_first ? job.read.count : batch.size;
  const int64_t row = job.rows_first ? y : span.first - job.read.first;
  const int64_t column = job.rows_first ? span.first - job.read.first : x;
  uint8_t pixel[3];
  weigh(batch.between + job.between + 3 * (row * width + column), job.rows_first ? 3 : 3 * width,
        batch.weights + place * batch.taps, span.count, pixel);
  const int64_t plane = batch.size * batch.size;
  const int64_t target = y * batch.size + (job.mirrored ? batch.size - 1 - x : x);
  for (int c = 0; c < 3; ++c) {
    batch.out[(3 * image + c) * plane + target] = brighter(pixel[c], job.brightness);
  }
}

// All steps on the host.
void fill_views_cpu(const ViewBatch& batch);

}  // namespace ntkcl::kernels
