#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace zsad {

constexpr int kColumns = 16;  // outputs of a layer that lie side by side in memory
constexpr int kCodes = 4;     // inputs that one int8 dot-product instruction adds up
constexpr int kMaxHead = 128;  // channels
constexpr int kFill = 64;     // inputs of an int8 layer are filled up with zeros to a multiple of this many

// A linear layer. Outputs are filled up with zeros to whole panels of kColumns; either weights or codes are null.
struct Linear {
  int inputs, outputs;        // outputs: a multiple of kColumns
  const float* weights;       // panels [outputs / 16, inputs, 16]
  const std::int8_t* codes;   // panels [outputs / 16, filled inputs / 4, 16, 4]; weight = code * scale of its output
  const float* scales;        // [outputs]
  const float* sums;          // [outputs], of each output's weights as the codes have them
  const float* bias;          // [outputs]
};

struct Norm {
  const float *weight, *bias;
};

struct TowerBlock {
  Norm norm1, norm2;
  Linear qkv, proj, fc1, fc2;
};

enum class Activation { kGelu, kQuickGelu, kSwiGlu };

struct Tower {
  int width, heads, patch, grid, front;  // front: class token and registers
  float eps;
  Activation activation;
  bool int8;               // of the attention's products
  Linear patches;          // [3 * patch * patch -> width], fp32
  const float* positions;  // [front + grid * grid, width], with the patches' bias, class token and registers
  Norm pre_norm;           // null where there is none
  Norm norm;
  const float *cosine, *sine;  // rotary positions [tokens, width / heads / 2]; null where there are none
  std::vector<TowerBlock> blocks;
};

// What is wanted behind a block: all patches, through the final norm or as they are.
struct Tap {
  int block;
  bool normed;
  float* out;              // [patches, width] of the first image
  std::size_t image;       // floats from one image to the next
};

// Windows of an image's patches, and of each the class token behind the tower's last block, as that of an image that
// has no other patches.
struct Windows {
  int count, length;           // of an image; tokens of each, the class token first
  const std::int32_t* tokens;  // [count, length], numbers of the image's
  float* out;                  // [batch, count, width]
};

// What the threads of a tower spend their time on. Activations count with the layer whose outputs they are of; layout
// is whatever brings values into the order and the codes or parts that products want them in.
enum class Part { kLinear, kAttention, kSoftmax, kNormalisation, kLayout, kOther, kWaiting };
constexpr int kTowerParts = int(Part::kWaiting) + 1;

struct TowerRun {
  const float* images;  // [batch, 3, side, side]
  int batch, depth, threads;
  std::vector<Tap> taps;
  float* classes;   // [batch, width], class tokens behind the last of `depth` blocks; may be null
  bool only_first;  // of the last block nothing else is wanted
  std::vector<Windows> windows;
  double* seconds;  // [kTowerParts], which what a thread spends in the mean is added to; null where nobody asks
};

void image_tower_portable(const Tower& tower, const TowerRun& run);
void image_tower_avx2(const Tower&, const TowerRun&);
void image_tower_avx512vnni(const Tower&, const TowerRun&);
void image_tower_avx512amx(const Tower&, const TowerRun&);

}  // namespace zsad
