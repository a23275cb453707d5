#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "ntkcl/data/image.h"

namespace ntkcl::data {

// A fixed list of labelled images. All queries may be called from many threads at once.
class ImageStore {
 public:
  virtual ~ImageStore() = default;

  int64_t size() const { return static_cast<int64_t>(labels_.size()); }
  // The class index of each image.
  const std::vector<int64_t>& labels() const { return labels_; }
  // What a message calls the image: a path, or the archive and the entry.
  std::string name(int64_t index) const;
  // Reads and decodes. CorruptImage when the content is bad; FileNotFound or FileError when it
  // cannot be read; ValueError when index is not in 0 .. size()-1.
  Image load(int64_t index) const;

 protected:
  explicit ImageStore(std::vector<int64_t> labels);

 private:
  virtual std::string do_name(int64_t index) const = 0;
  virtual Image do_load(int64_t index) const = 0;
  void check_index(int64_t index) const;

  std::vector<int64_t> labels_;
};

// One encoded file per image; paths and labels have the same length.
std::shared_ptr<ImageStore> make_file_store(std::vector<std::string> paths,
                                            std::vector<int64_t> labels);

// An entry as the archive's central directory describes it.
struct ZipEntry {
  std::string name;
  int64_t offset = 0;  // of the local header
  int64_t compressed_size = 0;
  int64_t size = 0;
  int64_t method = 0;  // 0 stored, 8 deflate
  uint32_t crc32 = 0;
};

// Entries are read from the archive when asked for. Their fields are not trusted: sizes are checked
// against the archive and against deflate's largest ratio before anything is allocated, and the
// checksum after.
std::shared_ptr<ImageStore> make_zip_store(std::string zip_path, std::vector<ZipEntry> entries,
                                           std::vector<int64_t> labels);

// Images in memory: uint8 (n, height, width, 3) on the CPU.
std::shared_ptr<ImageStore> make_array_store(at::Tensor images, std::vector<int64_t> labels);

}  // namespace ntkcl::data
