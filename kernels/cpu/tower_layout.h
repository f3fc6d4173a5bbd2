#pragma once
// An image tower as it lies in memory, and the parts that its time goes to.
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

// What the threads of a tower spend their time on. Activations count with the layer whose outputs they are of; layout
// is whatever brings values into the order and the codes or parts that products want them in.
enum class Part { kLinear, kAttention, kSoftmax, kNormalisation, kLayout, kOther, kWaiting };
constexpr int kTowerParts = int(Part::kWaiting) + 1;

}  // namespace zsad
