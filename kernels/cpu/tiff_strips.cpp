// See tiff_strips.h. TIFF 6.0, sections 9 and 13.
#include "tiff_strips.h"

#include <array>

namespace zsad {
namespace {

constexpr std::size_t kSpareBytes = 4;  // behind the last code, which some writers put there
constexpr int kClear = 256, kEnd = 257, kCodes = 4096;

bool lzw_is_whole(const std::uint8_t* strip, std::size_t size, std::size_t wanted) {
  if (size >= 2 && strip[0] == 0 && (strip[1] & 1)) return true;  // bits the other way round, as before TIFF 6.0
  std::array<std::uint32_t, kCodes> lengths;
  lengths.fill(1);
  std::size_t at = 0, bytes = 0;
  std::uint32_t buffer = 0, before = 0;  // before: length of the last code, 0: none since the table was cleared
  int held = 0, next = kEnd + 1, width = 9;
  while (bytes < wanted) {
    while (held < width && at < size) {
      buffer = buffer << 8 | strip[at++];
      held += 8;
    }
    if (held < width) return false;
    held -= width;
    const int code = int(buffer >> held & ((1u << width) - 1));
    if (code == kEnd) return false;
    if (code == kClear) {
      next = kEnd + 1;
      width = 9;
      before = 0;
      continue;
    }
    if (before && next < kCodes) lengths[next++] = before + 1;
    if (code >= next || (!before && code > 255)) return false;
    before = lengths[code];
    bytes += before;
    if (next >= (1 << width) - 1 && width < 12) ++width;  // one code early
  }
  return bytes == wanted && size - at <= kSpareBytes;
}

bool pack_bits_is_whole(const std::uint8_t* strip, std::size_t size, std::size_t wanted) {
  std::size_t at = 0, bytes = 0;
  while (bytes < wanted && at < size) {
    const int count = std::int8_t(strip[at]);
    if (count == -128) {
      ++at;
      continue;
    }
    bytes += count < 0 ? 1 - count : count + 1;
    at += count < 0 ? 2 : count + 2;
  }
  return bytes == wanted && at <= size && size - at <= kSpareBytes;
}

}  // namespace

bool strip_is_whole(const std::uint8_t* strip, std::size_t size, int compression, std::size_t wanted) {
  if (compression == kLzw) return lzw_is_whole(strip, size, wanted);
  return compression != kPackBits || pack_bits_is_whole(strip, size, wanted);
}

}  // namespace zsad
