#include "ntkcl/data/image_store.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#include <cerrno>
#include <cstring>

#include <ATen/ATen.h>

namespace ntkcl::data {
namespace {

// Closes what it holds.
struct Descriptor {
  explicit Descriptor(int opened) : value(opened) {}
  ~Descriptor() {
    if (value >= 0) {
      ::close(value);
    }
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;

  int value;
};

// An open file; reads at a position are safe from many threads.
class InputFile {
 public:
  explicit InputFile(std::string path)
      // A pipe without a writer would be waited for.
      : path_(std::move(path)),
        descriptor_(::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
    if (descriptor_.value < 0 && (errno == ENOENT || errno == ENOTDIR)) {
      NTKCL_FAIL(FileNotFound, "ImageStore", "expected a file, got nothing at ", path_);
    }
    struct stat status {};
    if (descriptor_.value < 0 || ::fstat(descriptor_.value, &status) != 0) {
      fail_errno();
    }
    if (!S_ISREG(status.st_mode)) {
      NTKCL_FAIL(FileError, "ImageStore", "expected a regular file, got ", path_);
    }
    size_ = status.st_size;
  }

  int64_t size() const { return size_; }

  // Fewer bytes than asked for only at the end of the file.
  std::vector<uint8_t> read(int64_t offset, int64_t count) const {
    std::vector<uint8_t> bytes(count);
    int64_t done = 0;
    while (done < count) {
      const ssize_t got =
          ::pread(descriptor_.value, bytes.data() + done, count - done, offset + done);
      if (got < 0 && errno == EINTR) {
        continue;
      }
      if (got < 0) {
        fail_errno();
      }
      if (got == 0) {
        break;
      }
      done += got;
    }
    bytes.resize(done);
    return bytes;
  }

 private:
  [[noreturn]] void fail_errno() const {
    NTKCL_FAIL(FileError, "ImageStore", "cannot read ", path_, ": ", std::strerror(errno));
  }

  std::string path_;
  Descriptor descriptor_;
  int64_t size_ = 0;
};

class FileStore final : public ImageStore {
 public:
  FileStore(std::vector<std::string> paths, std::vector<int64_t> labels)
      : ImageStore(std::move(labels)), paths_(std::move(paths)) {
    NTKCL_CHECK(static_cast<int64_t>(paths_.size()) == size(), "make_file_store",
                "expected one label per path, got ", paths_.size(), " paths and ", size(),
                " labels");
  }

 private:
  std::string do_name(int64_t index) const override { return paths_[index]; }

  Image do_load(int64_t index) const override {
    const InputFile file(paths_[index]);
    if (file.size() > kMaxEncodedBytes) {
      NTKCL_FAIL(data::CorruptImage, "ImageStore", paths_[index], ": expected an image of at most ",
                 kMaxEncodedBytes, " bytes, got ", file.size());
    }
    return decode_image(file.read(0, file.size()), paths_[index]);
  }

  std::vector<std::string> paths_;
};

constexpr int64_t kLocalHeader = 30;  // bytes before the name
constexpr int64_t kStored = 0;
constexpr int64_t kDeflate = 8;

std::vector<uint8_t> inflate_raw(const std::vector<uint8_t>& packed, int64_t size,
                                 const std::string& name) {
  std::vector<uint8_t> bytes(size);
  z_stream stream{};
  NTKCL_ASSERT(inflateInit2(&stream, -MAX_WBITS) == Z_OK);
  stream.next_in = const_cast<Bytef*>(packed.data());
  stream.avail_in = static_cast<uInt>(packed.size());
  stream.next_out = bytes.data();
  stream.avail_out = static_cast<uInt>(size);
  const int status = inflate(&stream, Z_FINISH);
  inflateEnd(&stream);
  if (status != Z_STREAM_END || stream.avail_out != 0) {
    NTKCL_FAIL(data::CorruptImage, "ImageStore", name, ": the compressed data is corrupt");
  }
  return bytes;
}

class ZipStore final : public ImageStore {
 public:
  ZipStore(std::string path, std::vector<ZipEntry> entries, std::vector<int64_t> labels)
      : ImageStore(std::move(labels)),
        path_(std::move(path)),
        file_(path_),
        entries_(std::move(entries)) {
    NTKCL_CHECK(static_cast<int64_t>(entries_.size()) == size(), "make_zip_store",
                "expected one label per entry, got ", entries_.size(), " entries and ", size(),
                " labels");
    for (size_t i = 0; i < entries_.size(); ++i) {
      check(entries_[i]);
    }
  }

 private:
  std::string do_name(int64_t index) const override { return path_ + ":" + entries_[index].name; }

  Image do_load(int64_t index) const override {
    const std::string name = do_name(index);
    return decode_image(read(entries_[index], name), name);
  }

  // Nothing is allocated for more than the archive can hold.
  void check(const ZipEntry& entry) const {
    const std::string where = "make_zip_store";
    const auto described = path_ + ":" + entry.name;
    NTKCL_CHECK(entry.method == kStored || entry.method == kDeflate, where, described,
                ": expected an entry stored or deflated (method 0 or 8), got method ",
                entry.method);
    NTKCL_CHECK(entry.offset >= 0 && entry.compressed_size >= 0 && entry.size >= 0 &&
                    entry.offset <= file_.size() - kLocalHeader &&
                    entry.compressed_size <= file_.size() - kLocalHeader - entry.offset,
                where, described, ": expected an entry inside the archive, got ",
                entry.compressed_size, " bytes at ", entry.offset, " of ", file_.size());
    const bool plausible = entry.method == kStored
                               ? entry.size == entry.compressed_size
                               : entry.size / kDeflateRatio <= entry.compressed_size;
    NTKCL_CHECK(plausible && entry.size <= kMaxEncodedBytes, where, described,
                ": expected a size that ", entry.compressed_size, " bytes can unpack to, got ",
                entry.size);
  }

  std::vector<uint8_t> read(const ZipEntry& entry, const std::string& name) const {
    const std::vector<uint8_t> header = file_.read(entry.offset, kLocalHeader);
    if (header.size() < kLocalHeader || std::memcmp(header.data(), "PK\3\4", 4) != 0) {
      NTKCL_FAIL(data::CorruptImage, "ImageStore", name, ": expected a zip entry, got other bytes");
    }
    if (header[6] & 1) {
      NTKCL_FAIL(data::CorruptImage, "ImageStore", name, ": the entry is encrypted");
    }
    const int64_t name_bytes = header[26] | (header[27] << 8);
    const int64_t extra_bytes = header[28] | (header[29] << 8);
    std::vector<uint8_t> bytes =
        file_.read(entry.offset + kLocalHeader + name_bytes + extra_bytes, entry.compressed_size);
    if (static_cast<int64_t>(bytes.size()) < entry.compressed_size) {
      NTKCL_FAIL(data::CorruptImage, "ImageStore", name, ": the archive is truncated");
    }
    if (entry.method == kDeflate) {
      bytes = inflate_raw(bytes, entry.size, name);
    }
    if (::crc32(0, bytes.data(), static_cast<uInt>(bytes.size())) != entry.crc32) {
      NTKCL_FAIL(data::CorruptImage, "ImageStore", name, ": the checksum differs");
    }
    return bytes;
  }

  std::string path_;
  InputFile file_;
  std::vector<ZipEntry> entries_;
};

class ArrayStore final : public ImageStore {
 public:
  ArrayStore(at::Tensor images, std::vector<int64_t> labels)
      : ImageStore(std::move(labels)), images_(std::move(images)) {
    NTKCL_CHECK(images_.scalar_type() == at::kByte && images_.dim() == 4 && images_.size(3) == 3 &&
                    images_.size(1) > 0 && images_.size(2) > 0 && images_.device().is_cpu(),
                "make_array_store", "expected uint8 images (n, height, width, 3) on the CPU, got ",
                images_.scalar_type(), " ", images_.sizes(), " on ", images_.device());
    NTKCL_CHECK(images_.size(0) == size(), "make_array_store", "expected one label per image, got ",
                images_.size(0), " images and ", size(), " labels");
    images_ = images_.contiguous();
  }

 private:
  std::string do_name(int64_t index) const override { return "image " + std::to_string(index); }

  Image do_load(int64_t index) const override {
    const int64_t bytes = images_.stride(0);
    const uint8_t* first = images_.const_data_ptr<uint8_t>() + index * bytes;
    return {images_.size(1), images_.size(2), std::vector<uint8_t>(first, first + bytes)};
  }

  at::Tensor images_;
};

}  // namespace

ImageStore::ImageStore(std::vector<int64_t> labels) : labels_(std::move(labels)) {
  for (const int64_t label : labels_) {
    NTKCL_CHECK(label >= 0, "ImageStore", "expected class indices from 0, got ", label);
  }
}

std::string ImageStore::name(int64_t index) const {
  check_index(index);
  return do_name(index);
}

Image ImageStore::load(int64_t index) const {
  check_index(index);
  return do_load(index);
}

void ImageStore::check_index(int64_t index) const {
  NTKCL_CHECK(index >= 0 && index < size(), "ImageStore", "expected an index in 0 .. ", size() - 1,
              ", got ", index);
}

std::shared_ptr<ImageStore> make_file_store(std::vector<std::string> paths,
                                            std::vector<int64_t> labels) {
  return std::make_shared<FileStore>(std::move(paths), std::move(labels));
}

std::shared_ptr<ImageStore> make_zip_store(std::string zip_path, std::vector<ZipEntry> entries,
                                           std::vector<int64_t> labels) {
  return std::make_shared<ZipStore>(std::move(zip_path), std::move(entries), std::move(labels));
}

std::shared_ptr<ImageStore> make_array_store(at::Tensor images, std::vector<int64_t> labels) {
  return std::make_shared<ArrayStore>(std::move(images), std::move(labels));
}

}  // namespace ntkcl::data
