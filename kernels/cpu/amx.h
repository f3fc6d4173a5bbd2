#pragma once
// What AMX kernels share: the system's permission to use tiles, and tiles for as long as a kernel runs.

#if defined(__x86_64__) && defined(__linux__)  // how to ask another system is not known
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace zsad {
namespace {  // compiled for several instruction sets, of which none may take another's place

// Whether the processor has tiles, int8 and bfloat16 products of them, and AVX-512 BF16, and Linux has given this
// process leave to use them, which it is asked for here: its threads, present and future, have it from then on.
inline bool may_use_amx() {
  constexpr unsigned kTiles = 13u << 22;  // AMX-BF16, AMX-TILE and AMX-INT8
  constexpr unsigned kBfloat16 = 1u << 5;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTiles) == kTiles &&
         __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kBfloat16) != 0 &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace
}  // namespace zsad
#endif

#if defined(__AMX_INT8__)
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "transpose.h"

namespace zsad {
namespace {

constexpr int kTileRows = 16;  // of 64 bytes

// The processor's tiles, all of 16 rows of 64 bytes, for as long as this lives.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t row_bytes[16] = {};
      std::uint8_t rows[16] = {};
    } shape;
    std::fill_n(shape.row_bytes, 8, std::uint16_t(64));
    std::fill_n(shape.rows, 8, std::uint8_t(16));
    _tile_loadconfig(&shape);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

}  // namespace
}  // namespace zsad
#endif
