// The nearest of unit vectors in a bank by exact fp32 products, of which few are taken: bounds from short codes tell
// which.
//
//   u = mean + V (head, tail)   in an orthogonal basis V, whose first h directions carry most of the vectors
//   head = code + error         8 bits to a coordinate, after the transform of int8_product.cpp
//   u . w <= code . code' + term + term' + |code| |error'| + |error| |code'| + |rest| |rest'|,   rest = (error, tail)
//
// by Cauchy and Schwarz, where term = mean . u - |mean|^2 / 2. Patches of one product lie close to a few dozen
// directions, so that bounds are nearly as small as the products themselves, and leave few vectors that may be the
// nearest. Their products are taken in full, and what is nearest so far only rises, so that the results are maxima of
// exact products, whatever the bounds were.
//
// Shapes and types of the arguments: bounded_nearest.h; instruction sets (ZSAD_TARGET): int8_blocks.h.
#include "bounded_nearest.h"

#include "dot.h"
#include "int8_blocks.h"
#include "int8_product.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#define ZSAD_JOIN_(a, b) a##b
#define ZSAD_JOIN(a, b) ZSAD_JOIN_(a, b)

namespace zsad {
namespace {

constexpr float kSlack = 2e-5f;         // for the rounding of fp32 products and bounds
constexpr double kSquareSlack = 1e-6;   // of squared lengths
constexpr float kLowest = -std::numeric_limits<float>::max();  // also the term of what fills panels up

struct Bounds {
  const float *rests, *errors;
  float longest;

  Bounds(const unsigned char* of, const BoundsLayout& layout)
      : rests(reinterpret_cast<const float*>(of + layout.rests)),
        errors(reinterpret_cast<const float*>(of + layout.errors)) {
    std::memcpy(&longest, of + layout.longest, sizeof longest);
  }
};

// Finds the k nearest of queries, block by block of these: a block meets the groups of a bank that may have one of
// the nearest, those first that may come nearest.
class SearchRows {
 public:
  explicit SearchRows(const BankSearch& a)
      : a_(a),
        queries_(a.queries.bounds, a.queries.layout),
        codes_({a.queries.bounds, a.queries.layout.heads}),
        least_(a.queries.layout.heads.patches, kLowest),
        taken_(least_.size()),
        reach_(a.groups),
        columns_(a.groups) {
    std::fill_n(a.cosines, least_.size() * a.wanted, kLowest);
    std::fill_n(a.indices, least_.size() * a.wanted, std::numeric_limits<std::int64_t>::max());
    std::fill_n(a.given_up, least_.size(), false);
  }

  std::int64_t run() {
    const Int8Layout &heads = a_.queries.layout.heads, &group = a_.layout.heads;
    const std::size_t prepared = prepared_bytes(heads);
    const int panels = (heads.patches + kRows - 1) / kRows * kRows / kPanel + 1;
    std::int8_t* room = prepared_room(heads, panels + a_.groups * group.panels);
    rows_ = prepare_rows(codes_.codes, heads.panels, heads, room);
    for (int g = 0; g < a_.groups; ++g)
      columns_[g] = prepare_columns(Image({group_bounds(g), group}).codes, group.panels, group,
                                    room + (panels + g * group.panels) * prepared);
    const Tiles tiles;
    for (int p = 0; p < heads.patches; p += kRows) search(p, std::min(p + kRows, heads.patches));
    return std::accumulate(taken_.begin(), taken_.end(), std::int64_t(0));
  }

  template <int Vectors>
  void take(int row, int column, const Floats* products) {
    const Floats term = all(queries_.errors[row] * group_.longest + kSlack), rest = all(queries_.rests[row]);
    const Floats least = all(least_[row]), longest = all(queries_.longest);
    Floats bounds[Vectors];
    std::uint64_t found = 0;
    ZSAD_UNROLL
    for (int j = 0; j < Vectors; ++j) {
      const int q = column + j * kLanes;
      bounds[j] = add_product(add_product(sum(products[j], term), longest, load_floats(group_.errors + q)), rest,
                              load_floats(group_.rests + q));
      found |= larger(bounds[j], least) << j * kLanes;
    }
    if (found) take_those<Vectors>(row, column, bounds, found);
  }

 private:
  static constexpr int kFirst = 12;  // groups that come in the order of their reach

  // Let the queries from p up to `end`, at most kRows, meet the groups that may have one of their nearest.
  void search(int p, int end) {
    for (int g = 0; g < a_.groups; ++g) reach_[g] = reach_of(p)[g];
    for (int row = p + 1; row < end; ++row) {
      const float* reach = reach_of(row);
      for (int g = 0; g < a_.groups; ++g) reach_[g] = std::max(reach_[g], reach[g]);
    }
    for (int first = 0; first < std::min(kFirst, a_.groups); ++first) {
      float furthest = kLowest;
#pragma omp simd reduction(max : furthest)
      for (int g = 0; g < a_.groups; ++g) furthest = std::max(furthest, reach_[g]);
      const int g = int(std::find(reach_.begin(), reach_.end(), furthest) - reach_.begin());
      meet(p, end, g);
      reach_[g] = kLowest;
    }
    for (int g = 0; g < a_.groups; ++g)
      if (reach_[g] > *std::min_element(least_.begin() + p, least_.begin() + end)) meet(p, end, g);
  }

  void meet(int p, int end, int g) {
    bool wanted = false;
    for (int row = p; row < end; ++row) wanted |= reach_of(row)[g] > least_[row];
    if (!wanted) return;
    g_ = g;
    group_ = Bounds(group_bounds(g), a_.layout);
    members_ = a_.order + g * kGroup;
    const Int8Layout& heads = a_.queries.layout.heads;
    const Image group({group_bounds(g), a_.layout.heads});
    each_panels(0, a_.layout.heads.panels, [&](int panel, auto panels) {
      multiply_panels<panels>(codes_, group, heads, p, end, panel, rows_ + p / kPanel * prepared_bytes(heads),
                              columns_[g] + panel * prepared_bytes(heads), *this);
    });
  }

  const unsigned char* group_bounds(int g) const { return a_.bounds + g * a_.layout.bytes; }
  const float* reach_of(int p) const { return a_.reach + std::size_t(a_.queue[p]) * a_.groups; }

  // Take the products of a query with those found of a group in full, the largest bound first.
  template <int Vectors>
  ZSAD_NOINLINE void take_those(int p, int column, const Floats* bounds, std::uint64_t found) {
    float values[Vectors * kLanes];
    for (int j = 0; j < Vectors; ++j) store_floats(values + j * kLanes, bounds[j]);
    int q = __builtin_ctzll(found);
    for (std::uint64_t bits = found; bits; bits &= bits - 1)
      if (values[__builtin_ctzll(bits)] > values[q]) q = __builtin_ctzll(bits);
    for (;; q = __builtin_ctzll(found)) {
      found &= ~(std::uint64_t(1) << q);
      if (values[q] > least_[p] && members_[column + q] >= 0) take_in_full(p, column + q);
      if (!found) return;
    }
  }

  // What takes longest is to read the vector, which takes half of that in 16 bits.
  float product(const float* query, int member) const {
    const std::size_t C = a_.channels;
#if defined(__AVX512F__)
    if (a_.halves) {
      const std::uint16_t* vector = a_.halves + (std::size_t(g_) * kGroup + member) * C;
      Sums64 sums;
      for (std::size_t c = 0; c < C; c += Sums64::kCount) sums.add(query + c, vector + c);
      return sums.total();
    }
#endif
    const float* vector = a_.bank + std::size_t(members_[member]) * C;
    return dot(query, vector, vector, C);
  }

  // member: of the present group.
  void take_in_full(int p, int member) {
    if (++taken_[p] > a_.most_taken) {
      a_.given_up[a_.queue[p]] = true;
      least_[p] = -kLowest;
      return;
    }
    const std::size_t query = a_.queue[p];
    std::int64_t index = members_[member];
    float cosine = product(a_.queries.units + query * a_.channels, member);
    if (a_.inverse) cosine *= a_.inverse[index];
    float* cosines = a_.cosines + query * a_.wanted;
    std::int64_t* indices = a_.indices + query * a_.wanted;
    for (int k = 0; k < a_.wanted; ++k)
      if (cosine > cosines[k] || (cosine == cosines[k] && index < indices[k])) {
        std::swap(cosine, cosines[k]);
        std::swap(index, indices[k]);
      }
    least_[p] = cosines[a_.wanted - 1];
  }

  const BankSearch& a_;
  const Bounds queries_;
  const Image codes_;
  const std::int8_t* rows_ = nullptr;  // prepared
  Bounds group_ = queries_;  // the present one
  int g_ = 0;                // its number
  const std::int32_t* members_ = nullptr;
  std::vector<float> least_;  // [P] the k-th nearest so far
  std::vector<int> taken_;    // [P]
  std::vector<float> reach_;  // [groups] that of the present block
  std::vector<const std::int8_t*> columns_;  // [groups] prepared
};

}  // namespace

void ZSAD_JOIN(bound_vectors_, ZSAD_TARGET)(const Bounding& a) {
  const Int8Layout& heads = a.layout.heads;
  const int P = heads.patches, h = heads.channels;
  // The mean terms are then products of heads with their errors.
  const std::vector<float> origin(h);
  ZSAD_JOIN(int8_quantise_, ZSAD_TARGET)(a.heads, origin.data(), heads, true, a.out);
  const float* scales = reinterpret_cast<const float*>(a.out);
  float* terms = reinterpret_cast<float*>(a.out + heads.mean_terms);
  float* rests = reinterpret_cast<float*>(a.out + a.layout.rests);
  float* errors = reinterpret_cast<float*>(a.out + a.layout.errors);
  const std::int8_t* codes = reinterpret_cast<const std::int8_t*>(a.out + heads.codes);
  double longest = 0;
  for (int panel = 0; panel < heads.panels; ++panel, codes += heads.panel_bytes()) {
    std::int32_t squares[kPanel] = {};
    for (int k = 0; k < heads.quads; ++k)
      for (int i = 0; i < kPanel; ++i)
        for (int c = 0; c < kQuad; ++c) {
          const std::int32_t code = codes[(k * kPanel + i) * kQuad + c];
          squares[i] += code * code;
        }
    for (int i = 0; i < kPanel; ++i) {
      const int p = panel * kPanel + i;
      if (p >= P) {
        terms[p] = kLowest;
        rests[p] = errors[p] = 0;
        continue;
      }
      double head = 0;
      for (int c = 0; c < h; ++c) head += double(a.heads[std::size_t(p) * h + c]) * a.heads[std::size_t(p) * h + c];
      const double code = double(scales[p]) * scales[p] * squares[i];
      const double error = std::max(2.0 * terms[p] - head + code, 0.0) + kSquareSlack;
      longest = std::max(longest, code);
      rests[p] = float(std::sqrt(error + std::max(double(a.tails[p]), 0.0)));
      errors[p] = float(std::sqrt(error));
      terms[p] = a.terms[p];
    }
  }
  const float length = float(std::sqrt(longest));
  std::memcpy(a.out + a.layout.longest, &length, sizeof length);
}

std::int64_t ZSAD_JOIN(bounded_search_, ZSAD_TARGET)(const BankSearch& a) {
  return SearchRows(a).run();
}

}  // namespace zsad
