#pragma once
#include <cstddef>
#include <cstdint>

namespace zsad {

constexpr int kPanel = 16;  // patches that lie side by side in memory
constexpr int kQuad = 4;    // channels that one int8 dot-product instruction adds up
constexpr std::size_t kHeaderBytes = 2 * sizeof(float) + sizeof(std::int32_t);  // of a patch

// Where the parts of one quantised image [P, C] lie in its buffer, in bytes. Patches and channels are filled up with
// zeros to whole panels and quads.
struct Int8Layout {
  int patches, channels;
  int panels, quads;
  std::size_t mean_terms, offsets, codes, bytes;

  Int8Layout(int P, int C)
      : patches(P), channels(C), panels((P + kPanel - 1) / kPanel), quads((C + kQuad - 1) / kQuad) {
    const std::size_t padded = std::size_t(panels) * kPanel;
    mean_terms = sizeof(float) * padded;              // float scales [panels, 16] come first
    offsets = mean_terms + sizeof(float) * padded;    // float mean terms [panels, 16]: mean . x[p] - |mean|^2 / 2
    codes = offsets + sizeof(std::int32_t) * padded;  // int32 offsets [panels, 16]: -128 * sum of the codes
    bytes = codes + panel_bytes() * panels;           // int8 codes [panels, quads, 16, 4]
  }
  std::size_t panel_bytes() const { return std::size_t(quads) * kPanel * kQuad; }
};

// A quantised image as products take it.
struct Int8Image {
  const unsigned char* data;
  Int8Layout layout;
};

}  // namespace zsad
