// The nearest of unit vectors in a bank by exact fp32 products, of which few are taken: bounds from short codes tell
// which.
//
//   u = mean + V (head, tail)   in an orthogonal basis V, whose first directions carry most of the vectors
//   u . w <= head . head' + term + term' + |tail| |tail'|,   term = mean . u - |mean|^2 / 2
//
// by Cauchy and Schwarz. Patches of one product lie close to a few dozen directions, so that bounds are nearly as small
// as the products themselves, and leave few vectors that may be the nearest. Their products are taken in full, and what
// is nearest so far only rises, so that the results are maxima of exact products, whatever the bounds were.
//
// Before that, heads of groups of vectors lie in spheres: |u - w| is at least as long as the way from a head to the
// sphere, and |u - w|^2 = 2 - 2 u . w.
//
// A bound is one product of codes of 16 bits, in units of 1 / kUnit: those of the coordinates, and three more,
//
//   (|tail|, term, 1) . (|tail'|, 1, term')
//
// rounded up. What rounding takes from a product of heads is at most |error| |head'| + |code| |error'|: the query's
// term has the most that this can be for any vector of the bank. Sums fit 32 bits: a bound is -7 at least and, but for
// errors, 1 at most: of x = (head, |tail|) |x|^2 = 1 - 2 term, so that x . x' + term + term' <= 1 - (|x| - |x'|)^2 / 2.
//
// Shapes and types of the arguments: bounded_bank.h; instruction sets (ZSAD_TARGET): int8_blocks.h, but for tiles,
// which are too large for this.
#include "bounded_bank.h"

#include "dot.h"
#include "int8_blocks.h"

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

constexpr int kUnit = 16383;           // of codes: coordinates and terms are smaller than 2
constexpr float kSlack = 2e-5f;        // for the rounding of fp32 products and coordinates
constexpr float kSquareSlack = 1e-5f;  // of squared lengths
constexpr float kLowest = -std::numeric_limits<float>::max();
constexpr std::int32_t kTaken = std::numeric_limits<std::int32_t>::min();  // below all bounds
constexpr int kTail = kCoded, kTerm = kCoded + 1;  // codes behind those of the coordinates; kTerm and the next one
                                                   // change places between queries and the bank
constexpr int kPairs = kBankCodes / 2, kGroupLanes = kGroup / kLanes;

// kQueries: rows of a block, whose sums stay in registers. add_pairs: sums += pairs of codes of kLanes vectors times
// the same pair.
#if defined(__AVX512VNNI__)
constexpr int kQueries = 8;
inline void add_pairs(Sums& sums, const std::int16_t* vectors, std::int32_t pair) {
  // Not the intrinsic: see int8_blocks.h.
  asm("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(_mm512_load_si512(vectors)), "v"(_mm512_set1_epi32(pair)));
}
inline Sums load_sums(const std::int32_t* p) { return _mm512_load_si512(p); }
inline void store_sums(std::int32_t* p, Sums sums) { _mm512_store_si512(p, sums); }
inline Sums largest(Sums a, Sums b) { return _mm512_max_epi32(a, b); }
inline std::uint64_t larger(Sums sums, std::int32_t least) {
  return _mm512_cmpgt_epi32_mask(sums, _mm512_set1_epi32(least));
}
#elif defined(__AVX2__)
constexpr int kQueries = 2;
inline void add_pairs(Sums& sums, const std::int16_t* vectors, std::int32_t pair) {
  const __m256i codes = _mm256_load_si256(reinterpret_cast<const __m256i*>(vectors));
  sums = _mm256_add_epi32(sums, _mm256_madd_epi16(codes, _mm256_set1_epi32(pair)));
}
inline Sums load_sums(const std::int32_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store_sums(std::int32_t* p, Sums sums) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), sums); }
inline Sums largest(Sums a, Sums b) { return _mm256_max_epi32(a, b); }
inline std::uint64_t larger(Sums sums, std::int32_t least) {
  return unsigned(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(sums, _mm256_set1_epi32(least)))));
}
#else
constexpr int kQueries = 1;
inline void add_pairs(Sums& sums, const std::int16_t* vectors, std::int32_t pair) {
  std::int16_t codes[2];
  std::memcpy(codes, &pair, sizeof codes);
  for (int lane = 0; lane < kLanes; ++lane)
    sums.lane[lane] += std::int32_t(codes[0]) * vectors[2 * lane] + std::int32_t(codes[1]) * vectors[2 * lane + 1];
}
inline Sums load_sums(const std::int32_t* p) {
  Sums sums;
  std::memcpy(sums.lane, p, sizeof sums.lane);
  return sums;
}
inline void store_sums(std::int32_t* p, const Sums& sums) { std::memcpy(p, sums.lane, sizeof sums.lane); }
inline Sums largest(const Sums& a, const Sums& b) {
  Sums out;
  for (int lane = 0; lane < kLanes; ++lane) out.lane[lane] = std::max(a.lane[lane], b.lane[lane]);
  return out;
}
inline std::uint64_t larger(const Sums& sums, std::int32_t least) {
  std::uint64_t found = 0;
  for (int lane = 0; lane < kLanes; ++lane) found |= std::uint64_t(sums.lane[lane] > least) << lane;
  return found;
}
#endif

struct alignas(kLine) GroupSums {
  std::int32_t of[kQueries][kGroup];
};

// Bounds of kQueries queries with a group. queries: [kQueries, kBankCodes]; group: [kPairs, kGroup, 2]. A function of
// its own, like sum_products.
ZSAD_NOINLINE void sum_codes(const std::int16_t* queries, const std::int16_t* group, GroupSums& out) {
  Sums sums[kQueries][kGroupLanes] = {};
  for (int k = 0; k < kPairs; ++k, group += 2 * kGroup, queries += 2) {
    ZSAD_UNROLL
    for (int i = 0; i < kQueries; ++i) {
      std::int32_t pair;
      std::memcpy(&pair, queries + i * kBankCodes, sizeof pair);
      ZSAD_UNROLL
      for (int j = 0; j < kGroupLanes; ++j) add_pairs(sums[i][j], group + 2 * j * kLanes, pair);
    }
  }
  ZSAD_UNROLL
  for (int i = 0; i < kQueries; ++i) {
    ZSAD_UNROLL
    for (int j = 0; j < kGroupLanes; ++j) store_sums(out.of[i] + j * kLanes, sums[i][j]);
  }
}

// The codes of one vector, but for its term: put(k, code).
template <typename Put>
CodedLengths put_codes(const Coordinates& of, std::size_t vector, Put put) {
  const float* head = of.heads + vector * kCoded;
  double length = 0, error = 0;
  for (int c = 0; c < kCoded; ++c) {
    const double code = std::nearbyint(double(head[c]) * kUnit), off = head[c] - code / kUnit;
    put(c, std::int16_t(code));
    length += code * code / kUnit / kUnit;
    error += off * off;
  }
  const double tail = std::sqrt(std::max(of.tails[vector], 0.0f) + kSquareSlack);
  put(kTail, std::int16_t(std::ceil(tail * kUnit)));
  return {float(std::sqrt(length)), float(std::sqrt(error))};
}

inline std::int16_t code_of_term(float term) { return std::int16_t(std::ceil(double(term) * kUnit)); }

// Finds the k nearest of queries, block by block of these: a block meets the groups of a bank that may have one of the
// nearest, those first that may come nearest.
class SearchRows {
 public:
  explicit SearchRows(const BankSearch& a)
      : a_(a),
        codes_(std::size_t(a.patches + kQueries - 1) / kQueries * kQueries * kBankCodes),
        least_sums_(a.patches, kTaken),
        furthest_(a.patches, std::numeric_limits<float>::max()),
        taken_(a.patches),
        gaps_(std::size_t(kQueries) * a.groups),
        nearest_gap_(a.groups) {
    std::fill_n(a.cosines, std::size_t(a.patches) * a.wanted, kLowest);
    std::fill_n(a.indices, std::size_t(a.patches) * a.wanted, std::numeric_limits<std::int64_t>::max());
    std::fill_n(a.given_up, a.patches, false);
    for (int p = 0; p < a.patches; ++p) {
      std::int16_t* codes = codes_.data() + std::size_t(p) * kBankCodes;
      const std::size_t query = a.queue[p];
      const CodedLengths own = put_codes(a.coordinates, query, [=](int k, std::int16_t code) { codes[k] = code; });
      const float rounded = own.errors * (a.lengths.heads + a.lengths.errors) +
                            own.heads * a.lengths.errors;
      codes[kTerm] = code_of_term(a.coordinates.terms[query] + rounded + kSlack);
      codes[kTerm + 1] = kUnit;
    }
  }

  std::int64_t run() {
    for (int p = 0; p < a_.patches; p += kQueries) search(p, std::min(p + kQueries, a_.patches));
    return std::accumulate(taken_.begin(), taken_.end(), std::int64_t(0));
  }

 private:
  struct Found {
    int row, group, member;
    std::int32_t bound;
  };
  static constexpr std::size_t kTogether = 64, kAhead = 6;  // found before products are taken, and fetched before that
  static constexpr int kFirst = 8;  // groups whose largest bound counts before anything is taken

  // Let the queries from p up to `end`, at most kQueries, meet the groups that may have one of their nearest.
  void search(int p, int end) {
    std::fill_n(nearest_gap_.begin(), a_.groups, std::numeric_limits<float>::max());
    for (int row = p; row < end; ++row) {
      const float* squares = a_.squares + std::size_t(a_.queue[row]) * a_.groups;
      float* gaps = gaps_of(row - p);
#pragma omp simd
      for (int g = 0; g < a_.groups; ++g) {
        gaps[g] = std::sqrt(std::max(squares[g] - kSquareSlack, 0.0f)) - a_.radii[g];
        nearest_gap_[g] = std::min(nearest_gap_[g], gaps[g]);
      }
    }
    const int first = std::min(kFirst, a_.groups);
    for (int i = 0; i < first; ++i) {
      float least = std::numeric_limits<float>::max();
#pragma omp simd reduction(min : least)
      for (int g = 0; g < a_.groups; ++g) least = std::min(least, nearest_gap_[g]);
      first_[i] = int(std::find(nearest_gap_.begin(), nearest_gap_.end(), least) - nearest_gap_.begin());
      nearest_gap_[first_[i]] = std::numeric_limits<float>::max();
      sum_codes(codes_of(p), group_codes(first_[i]), sums_[i]);
    }
    for (int row = p; row < end; ++row) find_largest(row, row - p, first);
    take_found();
    for (int i = 0; i < first; ++i) find_larger(p, end, first_[i], sums_[i]);
    take_found();
    for (int g = 0; g < a_.groups; ++g)
      if (nearest_gap_[g] < *std::max_element(furthest_.begin() + p, furthest_.begin() + end)) meet(p, end, g);
    take_found();
  }

  void meet(int p, int end, int g) {
    bool wanted = false;
    for (int row = p; row < end; ++row) wanted |= gaps_of(row - p)[g] < furthest_[row];
    if (!wanted) return;
    sum_codes(codes_of(p), group_codes(g), sums_[0]);
    find_larger(p, end, g, sums_[0]);
    if (found_.size() >= kTogether) take_found();
  }

  // Find the largest bound of a query, row i of the block, with the first groups: what its product leaves as the
  // nearest is hard to reach for others.
  void find_largest(int p, int i, int first) {
    Sums most = load_sums(sums_[0].of[i]);
    for (int group = 0; group < first; ++group)
      for (int j = 0; j < kGroup; j += kLanes) most = largest(most, load_sums(sums_[group].of[i] + j));
    std::int32_t lanes[kLanes];
    std::memcpy(lanes, &most, sizeof most);
    const std::int32_t bound = *std::max_element(lanes, lanes + kLanes);
    for (int group = 0; group < first; ++group)
      for (int j = 0; j < kGroup; j += kLanes)
        if (const std::uint64_t equal = larger(load_sums(sums_[group].of[i] + j), bound - 1)) {
          const int q = j + __builtin_ctzll(equal);  // a vector, since copies that fill a group up are behind all
          sums_[group].of[i][q] = kTaken;
          found_.push_back({p, first_[group], q, bound});
          return;
        }
  }

  // Find the bounds of the block's queries with a group that exceed what is nearest so far.
  void find_larger(int p, int end, int g, const GroupSums& sums) {
    for (int row = p; row < end; ++row) {
      const std::int32_t* of = sums.of[row - p];
      std::uint64_t bits = 0;
      for (int j = 0; j < kGroup; j += kLanes) bits |= larger(load_sums(of + j), least_sums_[row]) << j;
      for (; bits; bits &= bits - 1) {
        const int q = __builtin_ctzll(bits);
        found_.push_back({row, g, q, of[q]});
      }
    }
  }

  float* gaps_of(int row) { return gaps_.data() + std::size_t(row) * a_.groups; }  // of the block
  const std::int16_t* codes_of(int p) const { return codes_.data() + std::size_t(p) * kBankCodes; }
  const std::int16_t* group_codes(int g) const { return a_.codes + std::size_t(g) * kGroup * kBankCodes; }

  // Take the products of what was found in full, unless something nearer was by then. What takes longest is to read the
  // vectors, which are fetched before their turn.
  void take_found() {
    for (std::size_t k = 0; k < found_.size(); ++k) {
      if (k + kAhead < found_.size()) fetch(found_[k + kAhead]);
      const Found& of = found_[k];
      if (of.bound > least_sums_[of.row]) take_in_full(of.row, of.group, of.member);
    }
    found_.clear();
  }

  void fetch(const Found& of) const {
    const std::size_t C = a_.channels, place = std::size_t(of.group) * kGroup + of.member;
    const char* vector = reinterpret_cast<const char*>(a_.bank + std::max(a_.order[place], 0) * C);
    std::size_t bytes = C * sizeof(float);
#if defined(__AVX512F__)
    if (a_.halves) {
      vector = reinterpret_cast<const char*>(a_.halves + place * C);
      bytes = C * sizeof(std::uint16_t);
    }
#endif
    for (std::size_t line = 0; line < bytes; line += kLine) ZSAD_PREFETCH(vector + line);
  }

  // A vector takes half of the time where it has 16 bits.
  float product(std::size_t query, int g, int member) const {
    const std::size_t C = a_.channels, place = std::size_t(g) * kGroup + member;
    const float* left = a_.queries + query * C;
#if defined(__AVX512F__)
    if (a_.halves) {
      const std::uint16_t* vector = a_.halves + place * C;
      Sums64 sums;
      for (std::size_t c = 0; c < C; c += Sums64::kCount) sums.add(left + c, vector + c);
      return sums.total();
    }
#endif
    return dot(left, a_.bank + a_.order[place] * C, C);
  }

  void take_in_full(int p, int g, int member) {
    const std::size_t query = a_.queue[p];
    std::int64_t index = a_.order[std::size_t(g) * kGroup + member];
    if (index < 0) return;
    if (++taken_[p] > a_.most_taken) {
      a_.given_up[query] = true;
      set_least(p, -kLowest);
      return;
    }
    float cosine = product(query, g, member);
    if (a_.inverse) cosine *= a_.inverse[index];
    float* cosines = a_.cosines + query * a_.wanted;
    std::int64_t* indices = a_.indices + query * a_.wanted;
    for (int k = 0; k < a_.wanted; ++k)
      if (cosine > cosines[k] || (cosine == cosines[k] && index < indices[k])) {
        std::swap(cosine, cosines[k]);
        std::swap(index, indices[k]);
      }
    set_least(p, cosines[a_.wanted - 1]);
  }

  void set_least(int p, float product) {
    const double least = std::min(std::max(double(product), -2.0), 2.0);
    least_sums_[p] = std::int32_t(std::floor(least * kUnit * kUnit));
    furthest_[p] = float(std::sqrt(std::max(2 - 2 * (least - kSlack), 0.0)));
  }

  const BankSearch& a_;
  std::vector<std::int16_t> codes_;       // [P in whole blocks, kBankCodes] of the queries as they come
  std::vector<std::int32_t> least_sums_;  // [P] what a bound has to exceed to reach the k-th nearest so far
  std::vector<float> furthest_;           // [P] how far a vector may be to be as near
  std::vector<int> taken_;                // [P]
  std::vector<float> gaps_;               // [kQueries, groups] from queries of the present block to the groups' spheres
  std::vector<float> nearest_gap_;        // [groups] the least of the block
  std::vector<Found> found_;              // bounds of the block whose products are to be taken
  int first_[kFirst];                     // groups that it meets first
  GroupSums sums_[kFirst];                // bounds of the block with these, then with one after the other
};

}  // namespace

CodedLengths ZSAD_JOIN(code_bank_, ZSAD_TARGET)(const BankCoding& a) {
  CodedLengths most{0, 0};
  for (int g = 0; g < a.groups; ++g) {
    std::int16_t* group = a.codes + std::size_t(g) * kGroup * kBankCodes;
    for (int i = 0; i < kGroup; ++i) {
      const auto put = [=](int k, std::int16_t code) { group[(k / 2 * kGroup + i) * 2 + k % 2] = code; };
      const std::size_t vector = std::size_t(g) * kGroup + i;
      const CodedLengths own = put_codes(a.vectors, vector, put);
      put(kTerm, kUnit);
      put(kTerm + 1, code_of_term(a.vectors.terms[vector]));
      most = {std::max(most.heads, own.heads), std::max(most.errors, own.errors)};
    }
  }
  return most;
}

std::int64_t ZSAD_JOIN(bounded_bank_, ZSAD_TARGET)(const BankSearch& a) { return SearchRows(a).run(); }

}  // namespace zsad
