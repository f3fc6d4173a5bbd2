// The nearest of unit vectors by exact fp32 products, of which few are taken: bounds from short codes tell which.
//
//   u = mean + V (head, tail)   in an orthogonal basis V, whose first h directions carry most of the vectors
//   head = code + error         8 bits to a coordinate, after the transform of int8_product.cpp
//   u . w <= code . code' + term + term' + |code| |error'| + |error| |code'| + |rest| |rest'|,   rest = (error, tail)
//
// by Cauchy and Schwarz, where term = mean . u - |mean|^2 / 2. Patches of one product lie close to a few dozen directions,
// so that bounds are nearly as small as the products themselves, and leave few pairs of patches that may be the nearest
// of either. Their products are taken in full, and what is nearest so far only rises,
// so that the results are maxima of exact products, whatever the bounds were.
//
// Shapes and types of the arguments: bounded_nearest.h; instruction sets (ZSAD_TARGET): int8_blocks.h.
#include "bounded_nearest.h"

#include "buffer.h"
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

// Bounds are kept as counts, rounded up: half of a float's memory. counts_of: of kLanes floats; Wide: as many counts as
// are looked through at once, and a bit for each that is larger.
typedef std::int16_t Count;
constexpr float kCounts = 15000.0f;  // of 1
constexpr Count kNone = std::numeric_limits<Count>::min(), kUnreached = std::numeric_limits<Count>::max();

// What a count has to exceed where a bound reaches a product.
inline Count least_of(float product) { return Count(std::floor(std::max(product * kCounts, -32000.0f))); }

#if defined(__AVX512F__)
typedef __m256i Counts;
typedef __m512i Wide;
inline Counts counts_of(Floats bounds) {
  const Floats counts = _mm512_fmadd_ps(bounds, all(kCounts), all(1.0f));
  return _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_max_ps(counts, all(-32000.0f))));
}
inline Counts load_counts(const Count* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store_counts(Count* p, Counts counts) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), counts); }
inline Counts largest(Counts a, Counts b) { return _mm256_max_epi16(a, b); }
inline Wide largest(Wide a, Wide b) { return _mm512_max_epi16(a, b); }
inline Wide load_wide(const Count* p) { return _mm512_loadu_si512(p); }
inline Wide all_counts(Count count) { return _mm512_set1_epi16(count); }
inline std::uint64_t larger_counts(Wide a, Wide b) { return _mm512_cmpgt_epi16_mask(a, b); }
#elif defined(__AVX2__)
typedef __m128i Counts;
typedef __m256i Wide;
inline Counts counts_of(Floats bounds) {
  const Floats counts = _mm256_fmadd_ps(bounds, all(kCounts), all(1.0f));
  const __m256i wide = _mm256_cvtps_epi32(_mm256_max_ps(counts, all(-32000.0f)));
  return _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
}
inline Counts load_counts(const Count* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline void store_counts(Count* p, Counts counts) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), counts); }
inline Counts largest(Counts a, Counts b) { return _mm_max_epi16(a, b); }
inline Wide largest(Wide a, Wide b) { return _mm256_max_epi16(a, b); }
inline Wide load_wide(const Count* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Wide all_counts(Count count) { return _mm256_set1_epi16(count); }
inline std::uint64_t larger_counts(Wide a, Wide b) {
  const __m256i found = _mm256_cmpgt_epi16(a, b);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(found), _mm256_extracti128_si256(found, 1));
  return unsigned(_mm_movemask_epi8(bytes));
}
#else
struct Counts {
  Count lane[kLanes];
};
typedef Counts Wide;
inline Counts counts_of(const Floats& bounds) {
  Counts out;
  for (int lane = 0; lane < kLanes; ++lane)
    out.lane[lane] = Count(std::nearbyint(std::min(std::max(bounds.lane[lane] * kCounts + 1, -32000.0f), 32000.0f)));
  return out;
}
inline Counts load_counts(const Count* p) {
  Counts out;
  std::memcpy(out.lane, p, sizeof out.lane);
  return out;
}
inline void store_counts(Count* p, const Counts& counts) { std::memcpy(p, counts.lane, sizeof counts.lane); }
inline Counts largest(const Counts& a, const Counts& b) {
  Counts out;
  for (int lane = 0; lane < kLanes; ++lane) out.lane[lane] = std::max(a.lane[lane], b.lane[lane]);
  return out;
}
inline Wide load_wide(const Count* p) { return load_counts(p); }
inline Wide all_counts(Count count) {
  Wide out;
  std::fill_n(out.lane, kLanes, count);
  return out;
}
inline std::uint64_t larger_counts(const Wide& a, const Wide& b) {
  std::uint64_t found = 0;
  for (int lane = 0; lane < kLanes; ++lane) found |= std::uint64_t(a.lane[lane] > b.lane[lane]) << lane;
  return found;
}
#endif
constexpr int kWide = sizeof(Wide) / sizeof(Count), kWord = 64;

// The bounds of some left vectors with all right ones, [rows, columns], until products are taken in full.
class BoundRows {
 public:
  BoundRows(int rows, int columns)
      : columns_((columns + kWord - 1) / kWord * kWord), there_(columns), found_(columns_ / kWord) {
    // Fresh memory would take as long as the products.
    static thread_local std::vector<Count> kept;
    kept.resize(std::max(kept.size(), std::size_t(rows) * columns_ + kLine / sizeof(Count)));
    counts_ = kept.data() + (-reinterpret_cast<std::uintptr_t>(kept.data())) % kLine / sizeof(Count);
  }

  int columns() const { return columns_; }  // in whole words
  Count* of(int row) { return counts_ + std::size_t(row) * columns_; }

  // The largest of a row that is there.
  Count largest_of(int row) {
    Count* counts = of(row);
    std::fill(counts + there_, counts + columns_, kNone);
    Wide most = load_wide(counts);
    for (int q = kWide; q < columns_; q += kWide) most = largest(most, load_wide(counts + q));
    alignas(kLine) Count lanes[kWide];
    std::memcpy(lanes, &most, sizeof most);
    return *std::max_element(lanes, lanes + kWide);
  }

  // Call take(column, count) for those of a row that are wanted, by bits for a vector of counts from a column on.
  template <typename Wanted, typename Take>
  void each(int row, Wanted wanted, Take take) {
    Count* const counts = of(row);
    std::uint64_t* const found = found_.data();
    for (int word = 0; word * kWord < columns_; ++word) {
      std::uint64_t bits = 0;
      for (int bit = 0; bit < kWord; bit += kWide)
        bits |= wanted(load_wide(counts + word * kWord + bit), word * kWord + bit) << bit;
      found[word] = bits;
    }
    for (std::size_t word = 0; word < found_.size(); ++word)
      for (std::uint64_t bits = found[word]; bits; bits &= bits - 1) {
        const int q = int(word) * kWord + __builtin_ctzll(bits);
        take(q, counts[q]);
      }
  }

 private:
  const int columns_, there_;
  Count* counts_;
  std::vector<std::uint64_t> found_;  // bits of what is wanted of a row
};

// Where products of codes go: those whose bounds reach what is the nearest so far, of either side, are taken in full. Of
// kMostRows left vectors at a time all bounds are there before that, and the largest ones come first: what they leave as
// the nearest is hard to reach.
class NearestRows : public AnyRows {
 public:
  static constexpr int kMostRows = 96 * kPanel;

  explicit NearestRows(const NearestPair& a)
      : a_(a),
        left_(a.left.bounds, a.left.layout),
        right_(a.right.bounds, a.right.layout),
        bounds_(std::min(kMostRows, a.left.layout.heads.panels * kPanel), a.right.layout.heads.patches),
        of_columns_(bounds_.columns()),
        reached_(bounds_.columns()),
        best_(bounds_.columns()),
        terms_(bounds_.columns()) {
    const int P = a.left.layout.heads.patches, Q = a.right.layout.heads.patches;
    for (int q = 0; q < Q; ++q) terms_.get()[q] = right_.errors[q] * left_.longest + kSlack;
    std::fill_n(best_.get(), bounds_.columns(), kLowest);
    std::fill_n(reached_.get(), bounds_.columns(), kNone);
    std::fill_n(of_columns_.get(), bounds_.columns(), kNone);
    std::fill_n(a.best_left, P, kLowest);
    // Images of one product are alike: what is at the same place is a first guess.
    for (int p = 0; p < std::min(P, Q); ++p) take_in_full(p, p);
  }

  template <int Vectors>
  void take(int row, int column, const Floats* products) {
    const Floats term = all(left_.errors[row] * right_.longest), rest = all(left_.rests[row]);
    Count *const bounds = bounds_.of(row % kMostRows), *const of_columns = of_columns_.get();
    ZSAD_UNROLL
    for (int j = 0; j < Vectors; ++j) {
      const int q = column + j * kLanes;
      const Counts counts = counts_of(add_product(sum(products[j], sum(term, load_floats(terms_.get() + q))), rest,
                                                  load_floats(right_.rests + q)));
      store_counts(bounds + q, counts);
      store_counts(of_columns + q, largest(load_counts(of_columns + q), counts));
    }
  }

  void end(int first, int last) {
    Count *const of_columns = of_columns_.get(), *const reached = reached_.get();
    for (int q = 0; q < bounds_.columns(); ++q)  // at least the largest, where that may be the nearest
      of_columns[q] = of_columns[q] > reached[q] ? Count(of_columns[q] - 1) : kUnreached;
    for (int p = first; p < last; ++p) {
      if (p < bounds_.columns()) bounds_.of(p % kMostRows)[p] = kNone;  // was the first guess
      const Count most = bounds_.largest_of(p % kMostRows);
      const Wide mosts = all_counts(most > least_of(a_.best_left[p]) ? Count(most - 1) : kUnreached);
      take_those(p, [=](Wide counts, int q) {
        return larger_counts(counts, mosts) | larger_counts(counts, load_wide(of_columns + q));
      });
    }
    for (int p = first; p < last; ++p) {
      const Wide least = all_counts(least_of(a_.best_left[p]));
      take_those(p, [=](Wide counts, int q) {
        return larger_counts(counts, least) | larger_counts(counts, load_wide(reached + q));
      });
    }
    std::fill_n(of_columns, bounds_.columns(), kNone);
  }

  std::int64_t finish() {
    std::copy_n(best_.get(), a_.right.layout.heads.patches, a_.best_right);
    return taken_;
  }

 private:
  template <typename Wanted>
  void take_those(int p, Wanted wanted) {
    Count* const bounds = bounds_.of(p % kMostRows);
    bounds_.each(p % kMostRows, wanted, [&](int q, Count bound) {
      if (bound <= least_of(a_.best_left[p]) && bound <= reached_.get()[q]) return;  // by now
      bounds[q] = kNone;
      take_in_full(p, q);
    });
  }

  void take_in_full(int p, int q) {
    const std::size_t C = a_.channels;
    const float *left = a_.left.units + p * C, *right = a_.right.units + q * C;
    const float product = dot(left, right, right, C);
    a_.best_left[p] = std::max(a_.best_left[p], product);
    if (product > best_.get()[q]) {
      best_.get()[q] = product;
      reached_.get()[q] = least_of(product);
    }
    ++taken_;
  }

  const NearestPair& a_;
  const Bounds left_, right_;
  BoundRows bounds_;
  const Buffer<Count> of_columns_, reached_;  // [columns] the largest of these rows; what has to be exceeded
  const Buffer<float> best_, terms_;          // [columns] the nearest so far, and what is added to bounds
  std::int64_t taken_ = 0;
};

// The same for the k nearest of queries, block by block of these: a block meets the groups of a bank that may have one of
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

std::int64_t ZSAD_JOIN(bounded_nearest_, ZSAD_TARGET)(const NearestPair& a) {
  NearestRows rows(a);
  multiply({a.left.bounds, a.left.layout.heads}, {a.right.bounds, a.right.layout.heads}, 1,
           std::numeric_limits<int>::max(), rows);
  return rows.finish();
}

std::int64_t ZSAD_JOIN(bounded_search_, ZSAD_TARGET)(const BankSearch& a) {
  return SearchRows(a).run();
}

}  // namespace zsad
