#pragma once
#include <cstddef>
#include <cstdint>

namespace zsad {

constexpr int kLzw = 5, kPackBits = 32773;  // as TIFF numbers its compressions

// Tells whether a strip or tile of a TIFF holds as many bytes as its pixels take, and nothing else. Damage still is
// codes, but of other lengths; a decoder stops once it has its bytes and looks no further.
//
// strip: size bytes. wanted: how many they become. True also for other compressions.
bool strip_is_whole(const std::uint8_t* strip, std::size_t size, int compression, std::size_t wanted);

}  // namespace zsad
