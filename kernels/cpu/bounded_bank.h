#pragma once
#include <cstddef>
#include <cstdint>

#include "int8_layout.h"

namespace zsad {

constexpr int kGroup = 3 * kPanel;  // vectors of a bank that lie near each other
constexpr int kBankCodes = 32;          // 16-bit codes of a vector
constexpr int kCoded = kBankCodes - 3;  // coordinates that have one

// Unit vectors by coordinates in an orthogonal basis: heads [n, kCoded] less a mean; terms [n] mean . u - |mean|^2 / 2;
// tails [n] squares of what heads leave.
struct Coordinates {
  const float *heads, *terms, *tails;
};

// What codes leave of the vectors of a bank: at most so long are their heads, and the errors of these.
struct CodedLengths {
  float heads, errors;
};

// codes: out, [groups, kBankCodes / 2, kGroup, 2], on a cache line; vectors: [groups * kGroup], group by group.
struct BankCoding {
  Coordinates vectors;
  int groups;
  std::int16_t* codes;
};

CodedLengths code_bank_portable(const BankCoding&);
CodedLengths code_bank_avx2(const BankCoding&);
CodedLengths code_bank_avx512vnni(const BankCoding&);

// The k nearest of a bank of vectors, which lies in groups of kGroup vectors each.
// queries: unit vectors [P, C]; coordinates: theirs; queue: [P] the order in which they come, best one in which those
// that follow each other are alike; codes, lengths: of the bank; squares: [P, groups] of distances from heads to the
// centres of groups; radii: [groups] of the spheres around these that hold the heads of groups; order: [groups, kGroup]
// the vectors of each group, -1 for none; halves: [groups, kGroup, C] the vectors of the groups where 16-bit floats are
// exactly these, with AVX-512 alone, or null; bank: [M, C], of these inverse lengths [M] or, where null, of 1; cosines,
// indices: [P, k] out, of equal cosines the lower index first; given_up: [P] out, whether more than most_taken products
// would have been taken.
struct BankSearch {
  const float* queries;
  Coordinates coordinates;
  const std::int32_t* queue;
  int patches, channels;
  const std::int16_t* codes;
  CodedLengths lengths;
  int groups;
  const float *squares, *radii;
  const std::int32_t* order;
  const std::uint16_t* halves;
  const float *bank, *inverse;
  int wanted, most_taken;
  float* cosines;
  std::int64_t* indices;
  bool* given_up;
};

// Return how many products were taken in full.
std::int64_t bounded_bank_portable(const BankSearch&);
std::int64_t bounded_bank_avx2(const BankSearch&);
std::int64_t bounded_bank_avx512vnni(const BankSearch&);

}  // namespace zsad
