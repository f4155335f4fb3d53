// Shared memory in huge pages: a file or memfd mapped where the kernel can back it by 2 MiB pages.
#include <sys/mman.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstring>

#include "bind/module.h"
#include "bind/tensor.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // Linux 6.1
#endif

namespace sps::bind {
namespace {

constexpr size_t kHuge = size_t{2} << 20;

[[noreturn]] void os_error(const char* what) {
  value_error(std::string(what) + ": " + std::strerror(errno));
}

struct Mapping {
  void* at;
  size_t bytes;
};

// Reserves address space with room to align, then maps the file over the aligned part of it.
Mapping map_aligned(int fd, size_t bytes, bool writable) {
  const size_t reserved = bytes + kHuge;
  char* base = static_cast<char*>(
      mmap(nullptr, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (base == MAP_FAILED) os_error("cannot reserve address space");
  const size_t skip = (kHuge - reinterpret_cast<uintptr_t>(base) % kHuge) % kHuge;
  char* at = base + skip;
  const int protection = PROT_READ | (writable ? PROT_WRITE : 0);
  if (mmap(at, bytes, protection, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) {
    const int error = errno;
    munmap(base, reserved);
    errno = error;
    os_error("cannot map");
  }
  const size_t used = (bytes + 4095) / 4096 * 4096;
  if (skip > 0) munmap(base, skip);
  if (reserved > skip + used) munmap(at + used, reserved - skip - used);
  return {at, bytes};
}

nb::object map_shared(int fd, int64_t bytes, bool writable) {
  struct stat status;
  if (fstat(fd, &status) != 0) os_error("cannot map");
  if (bytes < 1 || bytes > status.st_size) value_error("nbytes must be in [1, size of the file]");
  auto* mapping = new Mapping(map_aligned(fd, static_cast<size_t>(bytes), writable));
  nb::capsule owner(mapping, [](void* p) noexcept {
    auto* m = static_cast<Mapping*>(p);
    munmap(m->at, m->bytes);
    delete m;
  });
  const size_t shape[1] = {mapping->bytes};
  if (writable)
    return nb::cast(nb::ndarray<nb::numpy, uint8_t>(mapping->at, 1, shape, owner));
  return nb::cast(nb::ndarray<nb::numpy, const uint8_t>(mapping->at, 1, shape, owner));
}

// Pages that lie whole inside of the array.
bool use_huge_pages(nb::handle array_) {
  const Tensor array(array_, "array");
  array.need_contiguous();
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(array.data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end =
      (reinterpret_cast<uintptr_t>(array.data) + array.size() * array.item_bytes()) / kHuge * kHuge;
  if (begin >= end) return false;
  void* at = reinterpret_cast<void*>(begin);
  nb::gil_scoped_release release;
  madvise(at, end - begin, MADV_HUGEPAGE);  // for pages that are not there yet
  return madvise(at, end - begin, MADV_COLLAPSE) == 0;
}

}  // namespace

void bind_memory(nb::module_& m) {
  m.def("map_shared", &map_shared);
  m.def("use_huge_pages", &use_huge_pages);
}

}  // namespace sps::bind
