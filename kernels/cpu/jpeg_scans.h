#pragma once
#include <cstddef>
#include <cstdint>

namespace zsad {

// What a progressive JPEG's scans tell of damage.
enum class ScanDamage { kNone, kEndsEarly, kGoesOn, kPartMissing, kNoCode };

// Follows the Huffman codes of all scans of the first picture in a file, as a decoder does, to where they end; pixels
// are not made, and of the coefficients only a bit each is kept. Damaged bits still are codes, but mostly too few or
// too many.
//
// content: size bytes, from the start of the file. rows, columns: of the picture.
// kNone also where this is no progressive picture of this size, or none that is coded so; throws std::bad_alloc.
ScanDamage scan_damage(const std::uint8_t* content, std::size_t size, int rows, int columns);

}  // namespace zsad
