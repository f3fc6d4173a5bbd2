// The nearest of each unit vector of two images among those of the other, by exact fp32 products, of which few are
// taken: two bounds, each from more than the one before, tell which.
//
//   u = mean + V (lead, other, tail)   in an orthogonal basis V: (lead, other), the head, carries most of the vectors
//   lead = code + error                8 bits to a coordinate, one scale for an image, after an orthogonal transform
//
// Of heads, with term = mean . u - |mean|^2 / 2, and by Cauchy and Schwarz for the tails:
//
//   u . w <= head . head' + term + term' + |tail| |tail'|
//
// Of codes, since lead . lead' = code . code' + lead . error + lead' . error' + (lead - lead') . (error' - error) -
// error . error', and what is left of the vectors, rest = (other, tail, error), adds at most |rest| |rest'|, which is
// at most half of the sum of their squares:
//
//   u . w <= code . code' + sum + sum' + |lead - lead'| (|error| + |error'|)
//   sum = term + lead . error + |rest|^2 / 2
//
// Only products count that exceed a nearest so far, and of these |lead - lead'| <= |u - w| < sqrt(2 - 2 nearest): near
// vectors lose little by 8 bits. That term is taken off what a bound has to exceed, so that the bounds themselves are
// sums of products of codes and of a number per row and column. They are kept as counts of 16 bits, rounded so that
// none is missed.
//
// The largest bound of each vector comes first, and what its product leaves as the nearest is hard to reach for others.
// What is nearest so far only rises, so that the results are maxima of exact products, whatever the bounds were.
//
// Shapes and types of the arguments: bounded_pair.h; instruction sets (ZSAD_TARGET): int8_blocks.h.
#include "bounded_pair.h"

#include "buffer.h"
#include "dot.h"
#include "int8_blocks.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#define ZSAD_JOIN_(a, b) a##b
#define ZSAD_JOIN(a, b) ZSAD_JOIN_(a, b)

namespace zsad {
namespace {

constexpr float kSlack = 2e-5f;        // for the rounding of fp32 products and bounds
constexpr float kSquareSlack = 1e-5f;  // of squared lengths
constexpr float kLeastScale = 1.0f / 4096;  // of codes, so that sums in its units fit 32 bits
constexpr int kMostLead = 128;                  // coordinates with codes
constexpr float kLowest = -std::numeric_limits<float>::max();

typedef std::int16_t Count;
constexpr Count kNone = std::numeric_limits<Count>::min(), kUnreached = std::numeric_limits<Count>::max();
constexpr int kWord = 64;
constexpr float kMostBound = 2.5f;    // more is as good as out of reach of all that has to be exceeded
constexpr std::int32_t kFar = 1 << 29;  // below all sums

// store_counts: (sums + columns + row) / 2^shift, rounded down. Wide: as many counts as are looked through at once.
// where_larger: a value where a is larger than b. larger_counts: a bit for each of kWord counts that is larger than the
// same number everywhere, or than its column's; equal_counts: for each that is the same.
#if defined(__AVX512F__)
typedef __m512i Wide;
inline void store_counts(Count* out, Sums sums, const std::int32_t* columns, std::int32_t row, int shift) {
  const __m512i bounds = _mm512_add_epi32(_mm512_add_epi32(sums, _mm512_loadu_si512(columns)), _mm512_set1_epi32(row));
  const __m512i counts = _mm512_sra_epi32(bounds, _mm_cvtsi32_si128(shift));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtsepi32_epi16(counts));
}
inline Wide largest(Wide a, Wide b) { return _mm512_max_epi16(a, b); }
inline Wide load_wide(const Count* p) { return _mm512_loadu_si512(p); }
inline void store_wide(Count* p, Wide counts) { _mm512_storeu_si512(p, counts); }
inline Wide all_counts(Count count) { return _mm512_set1_epi16(count); }
inline Wide where_larger(Wide a, Wide b, Wide value, Wide otherwise) {
  return _mm512_mask_mov_epi16(otherwise, _mm512_cmpgt_epi16_mask(a, b), value);
}
inline std::uint64_t equal_counts(const Count* counts, Count count) {
  const auto equal = [&](int at) { return _mm512_cmpeq_epi16_mask(load_wide(counts + at), all_counts(count)); };
  return _cvtmask64_u64(_mm512_kunpackd(equal(32), equal(0)));
}
inline std::uint64_t larger_counts(const Count* counts, Wide least, const Count* columns) {
  const auto larger = [&](int at) {
    return _mm512_cmpgt_epi16_mask(load_wide(counts + at), _mm512_min_epi16(least, load_wide(columns + at)));
  };
  return _cvtmask64_u64(_mm512_kunpackd(larger(32), larger(0)));
}
#elif defined(__AVX2__)
typedef __m256i Wide;
inline Wide load_wide(const Count* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store_wide(Count* p, Wide counts) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), counts); }
inline void store_counts(Count* out, Sums sums, const std::int32_t* columns, std::int32_t row, int shift) {
  const __m256i terms = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns));
  const __m256i bounds = _mm256_add_epi32(_mm256_add_epi32(sums, terms), _mm256_set1_epi32(row));
  const __m256i counts = _mm256_sra_epi32(bounds, _mm_cvtsi32_si128(shift));
  const __m128i packed = _mm_packs_epi32(_mm256_castsi256_si128(counts), _mm256_extracti128_si256(counts, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), packed);
}
inline Wide largest(Wide a, Wide b) { return _mm256_max_epi16(a, b); }
inline Wide all_counts(Count count) { return _mm256_set1_epi16(count); }
inline Wide where_larger(Wide a, Wide b, Wide value, Wide otherwise) {
  return _mm256_blendv_epi8(otherwise, value, _mm256_cmpgt_epi16(a, b));
}
inline std::uint64_t bits_of(Wide found) {
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(found), _mm256_extracti128_si256(found, 1));
  return unsigned(_mm_movemask_epi8(bytes));
}
inline std::uint64_t equal_counts(const Count* counts, Count count) {
  std::uint64_t bits = 0;
  for (int at = 0; at < kWord; at += 16)
    bits |= bits_of(_mm256_cmpeq_epi16(load_wide(counts + at), all_counts(count))) << at;
  return bits;
}
inline std::uint64_t larger_counts(const Count* counts, Wide least, const Count* columns) {
  std::uint64_t bits = 0;
  for (int at = 0; at < kWord; at += 16) {
    const Wide to_exceed = _mm256_min_epi16(least, load_wide(columns + at));
    bits |= bits_of(_mm256_cmpgt_epi16(load_wide(counts + at), to_exceed)) << at;
  }
  return bits;
}
#else
struct Wide {
  Count lane[kLanes];
};
inline void store_counts(Count* out, const Sums& sums, const std::int32_t* columns, std::int32_t row, int shift) {
  for (int lane = 0; lane < kLanes; ++lane) {
    // Dividing by a power of two rounds down, as shifting does where shifts of negative numbers are known to.
    const std::int32_t bound = sums.lane[lane] + columns[lane] + row, unit = std::int32_t(1) << shift;
    const std::int32_t count = bound >= 0 ? bound / unit : -((unit - 1 - bound) / unit);
    out[lane] = Count(std::min<std::int32_t>(std::max<std::int32_t>(count, kNone), kUnreached));
  }
}
inline Wide largest(const Wide& a, const Wide& b) {
  Wide out;
  for (int lane = 0; lane < kLanes; ++lane) out.lane[lane] = std::max(a.lane[lane], b.lane[lane]);
  return out;
}
inline Wide load_wide(const Count* p) {
  Wide out;
  std::memcpy(out.lane, p, sizeof out.lane);
  return out;
}
inline void store_wide(Count* p, const Wide& counts) { std::memcpy(p, counts.lane, sizeof counts.lane); }
inline Wide all_counts(Count count) {
  Wide out;
  std::fill_n(out.lane, kLanes, count);
  return out;
}
inline Wide where_larger(const Wide& a, const Wide& b, const Wide& value, const Wide& otherwise) {
  Wide out;
  for (int lane = 0; lane < kLanes; ++lane)
    out.lane[lane] = a.lane[lane] > b.lane[lane] ? value.lane[lane] : otherwise.lane[lane];
  return out;
}
inline std::uint64_t equal_counts(const Count* counts, Count count) {
  std::uint64_t bits = 0;
  for (int at = 0; at < kWord; ++at) bits |= std::uint64_t(counts[at] == count) << at;
  return bits;
}
inline std::uint64_t larger_counts(const Count* counts, const Wide& least, const Count* columns) {
  std::uint64_t bits = 0;
  for (int at = 0; at < kWord; ++at) bits |= std::uint64_t(counts[at] > std::min(least.lane[0], columns[at])) << at;
  return bits;
}
#endif
constexpr int kWide = sizeof(Wide) / sizeof(Count);

// The upper half joins the lower one, until one is left.
inline Count largest_of(const Wide& counts) {
  Count lanes[kWide];
  store_wide(lanes, counts);
  ZSAD_UNROLL
  for (int half = kWide / 2; half > 0; half /= 2) {
#pragma omp simd
    for (int i = 0; i < half; ++i) lanes[i] = std::max(lanes[i], lanes[i + half]);
  }
  return lanes[0];
}

// The bounds of an image, and what is nearest so far to its vectors.
struct Side {
  const float *units, *heads, *terms, *rests, *errors, *sums;
  float scale, most_error;
  int patches, head;

  explicit Side(const PairSide& a)
      : units(a.units),
        heads(of(a, a.layout.heads)),
        terms(of(a, a.layout.terms)),
        rests(of(a, a.layout.rests)),
        errors(of(a, a.layout.errors)),
        sums(of(a, a.layout.lead.mean_terms)),
        scale(*of(a, 0)),
        most_error(*of(a, a.layout.most_error)),
        patches(a.layout.lead.patches),
        head(a.layout.head) {}

 private:
  static const float* of(const PairSide& a, std::size_t at) { return reinterpret_cast<const float*>(a.bounds + at); }
};

// Takes the sums of products of codes, of which kMostRows left vectors have theirs at a time.
class PairRows : public SumRows {
 public:
  static constexpr int kMostRows = 96 * kPanel;

  explicit PairRows(const BoundedPair& a)
      : a_(a),
        left_(a.left),
        right_(a.right),
        inverse_unit_(1 / (left_.scale * right_.scale)),
        panelled_(a.right.layout.lead.panels * kPanel),
        columns_((panelled_ + kWord - 1) / kWord * kWord),
        row_sums_(a.left.layout.lead.panels * kPanel),
        column_sums_(panelled_),
        least_left_(left_.patches),
        most_right_(columns_),
        row_of_most_(columns_),
        least_right_(columns_),
        best_right_(columns_),
        found_(columns_ / kWord),
        candidates_(kTogether + 2 * columns_) {
    while (kMostBound * inverse_unit_ > float(std::int64_t(kUnreached) << shift_)) ++shift_;
    in_units(left_, row_sums_);
    in_units(right_, column_sums_);
    std::fill_n(a.best_left, left_.patches, kLowest);
    std::fill(least_left_.begin(), least_left_.end(), kNone);
    // Nothing exceeds what fills up.
    std::fill_n(best_right_.begin(), columns_, kLowest);
    std::fill_n(least_right_.get(), columns_, kUnreached);
    std::fill_n(least_right_.get(), right_.patches, kNone);
    // Fresh memory would take as long as the products.
    static thread_local std::vector<Count> kept;
    const std::size_t rows = std::min<std::size_t>(kMostRows, row_sums_.size());
    kept.resize(std::max(kept.size(), rows * columns_ + kLine / sizeof(Count)));
    bounds_ = kept.data() + (-reinterpret_cast<std::uintptr_t>(kept.data())) % kLine / sizeof(Count);
    for (std::size_t row = 0; row < rows; ++row)
      std::fill(bounds_ + row * columns_ + panelled_, bounds_ + (row + 1) * columns_, kNone);
  }

  ZSAD_INLINE void take_sums(int row, int column, const Sums& sums) {
    store_counts(bounds_of(row) + column, sums, column_sums_.data() + column, row_sums_[row], shift_);
  }

  void end(int first, int last) {
    std::fill_n(most_right_.get(), columns_, kNone);
    int p = first;
    for (; p + kRowsAtOnce <= last; p += kRowsAtOnce) find_largest<kRowsAtOnce>(first, p);
    for (; p < last; ++p) find_largest<1>(first, p);
    for (int q = 0; q < right_.patches; ++q) {
      const int row = first + row_of_most_.get()[q];
      if (most_right_.get()[q] > least_right_.get()[q] && bounds_of(row)[q] != kNone) add(row, q);
    }
    take();
    for (p = first; p < last; ++p) find(p);
    take();
  }

  std::int64_t finish() {
    std::copy_n(best_right_.begin(), right_.patches, a_.best_right);
    return taken_;
  }

 private:
  static constexpr int kRowsAtOnce = 8;
  static constexpr int kTogether = 512;  // candidates whose heads are multiplied one after the other
  static constexpr int kAhead = 6;       // products that a vector is fetched before its own

  struct Candidate {
    int left, right;
    float bound;
  };

  Count* bounds_of(int row) const { return bounds_ + std::size_t(row % kMostRows) * columns_; }

  // What is added to a product of codes for one vector, rounded up.
  void in_units(const Side& side, std::vector<std::int32_t>& out) const {
    for (std::size_t p = 0; p < out.size(); ++p)
      out[p] = p < std::size_t(side.patches) ? std::int32_t(side.sums[p] * inverse_unit_) + 2 : -kFar;
  }

  // What a count has to exceed where a product may exceed the nearest; error: the largest sum of both sides' lengths.
  Count least_of(float nearest, float error) const {
    const float apart = std::sqrt(std::max(2 - 2 * nearest, 0.0f) + kSquareSlack);
    const float bound = (nearest - apart * error - kSlack) * inverse_unit_;
    return Count((std::int32_t(std::floor(bound)) >> shift_) - 1);
  }

  // Let the largest count of each of Rows rows be a candidate, and keep those of the columns so far.
  template <int Rows>
  void find_largest(int first, int row) {
    const Count* const bounds = bounds_of(row);  // rows are kept in whole panels, so that these follow each other
    Count *const most_of_columns = most_right_.get(), *const rows_of_most = row_of_most_.get();
    const std::size_t columns = columns_;
    Wide of_rows[Rows], numbers[Rows];
    ZSAD_UNROLL
    for (int i = 0; i < Rows; ++i) {
      of_rows[i] = all_counts(kNone);
      numbers[i] = all_counts(Count(row + i - first));
    }
    for (std::size_t q = 0; q < columns; q += kWide) {
      Wide most = load_wide(most_of_columns + q), row_of_most = load_wide(rows_of_most + q);
      ZSAD_UNROLL
      for (int i = 0; i < Rows; ++i) {
        const Wide counts = load_wide(bounds + i * columns + q);
        of_rows[i] = largest(of_rows[i], counts);
        row_of_most = where_larger(counts, most, numbers[i], row_of_most);
        most = largest(most, counts);
      }
      store_wide(most_of_columns + q, most);
      store_wide(rows_of_most + q, row_of_most);
    }
    ZSAD_UNROLL
    for (int i = 0; i < Rows; ++i) {
      const Count most = largest_of(of_rows[i]);
      if (most > least_left_[row + i]) add(row + i, column_of(row + i, most));
    }
    if (count_ >= kTogether) take();
  }

  // The first column of a row with a count that it has.
  int column_of(int row, Count count) const {
    for (int word = 0;; word += kWord)
      if (const std::uint64_t bits = equal_counts(bounds_of(row) + word, count)) return word + __builtin_ctzll(bits);
  }

  // Let a bound be a candidate, and none of `find`.
  void add(int p, int q) {
    candidates_[count_++] = {p, q, 0};
    bounds_of(p)[q] = kNone;
  }

  // Let those bounds of a row be candidates that exceed what the row or the column says; of all rows once, at the end.
  void find(int p) {
    const Count* const bounds = bounds_of(p);
    const Wide least = all_counts(least_left_[p]);
    const Count* const of_columns = least_right_.get();
    std::uint64_t* const found = found_.data();
    const int words = int(found_.size());
    for (int word = 0; word < words; ++word)
      found[word] = larger_counts(bounds + word * kWord, least, of_columns + word * kWord);
    Candidate* next = candidates_.data() + count_;
    for (int word = 0; word < words; ++word)
      for (std::uint64_t bits = found[word]; bits; bits &= bits - 1)
        *next++ = {p, word * kWord + __builtin_ctzll(bits), 0};
    count_ = int(next - candidates_.data());
    if (count_ >= kTogether) take();
  }

  bool may_be_nearest(const Candidate& c) const {
    return (c.bound > a_.best_left[c.left]) | (c.bound > best_right_[c.right]);
  }

  // Take the products of those candidates in full whose heads leave them the chance to be the nearest. A loop of its
  // own for each step, with few branches: most of them would be guessed wrong.
  void take() {
    const std::size_t C = a_.channels, h = left_.head;
    for (int k = 0; k < count_; ++k) {
      Candidate& c = candidates_[k];
      const float *left = left_.heads + c.left * h, *right = right_.heads + c.right * h;
      const float terms = left_.terms[c.left] + right_.terms[c.right] + kSlack;
      c.bound = dot(left, right, h) + terms + left_.rests[c.left] * right_.rests[c.right];
    }
    int kept = 0;
    for (int k = 0; k < count_; ++k) {
      const Candidate c = candidates_[k];
      candidates_[kept] = c;
      kept += may_be_nearest(c);
    }
    for (int k = 0; k < kept; ++k) {
      const Candidate c = candidates_[k];
      if (!may_be_nearest(c)) continue;  // by now
      const float* next = right_.units + candidates_[std::min(k + kAhead, kept - 1)].right * C;
      const float product = dot(left_.units + c.left * C, right_.units + c.right * C, next, C);
      raise(c, product);
      ++taken_;
    }
    count_ = 0;
  }

  void raise(const Candidate& c, float product) {
    if (product > a_.best_left[c.left]) {
      a_.best_left[c.left] = product;
      least_left_[c.left] = least_of(product, left_.errors[c.left] + right_.most_error);
    }
    if (product > best_right_[c.right]) {
      best_right_[c.right] = product;
      least_right_.get()[c.right] = least_of(product, right_.errors[c.right] + left_.most_error);
    }
  }

  const BoundedPair& a_;
  const Side left_, right_;
  const float inverse_unit_;  // of products of codes, and of sums
  int shift_ = 0;             // of counts: 2^shift units
  const int panelled_, columns_;  // right vectors in whole panels, and in whole words
  std::vector<std::int32_t> row_sums_, column_sums_;
  Count* bounds_;                                 // [rows, columns]
  std::vector<Count> least_left_;                 // [P] what has to be exceeded
  // [columns] The largest of these rows, which of them has it, and the same as least_left.
  const Buffer<Count> most_right_, row_of_most_, least_right_;
  std::vector<float> best_right_;                 // [columns] the nearest so far
  std::vector<std::uint64_t> found_;              // bits of what is wanted of a row
  std::vector<Candidate> candidates_;
  int count_ = 0;
  std::int64_t taken_ = 0;
};

// Walsh-Hadamard over x[n], n a power of two: a few long coordinates become many short ones, which 8 bits suit.
void spread(float* x, int n) {
  for (int half = 1; half < n; half *= 2)
    for (int i = 0; i < n; i += 2 * half)
      for (int j = i; j < i + half; ++j) {
        const float a = x[j], b = x[j + half];
        x[j] = a + b;
        x[j + half] = a - b;
      }
  const float inverse = 1 / std::sqrt(float(n));
  for (int i = 0; i < n; ++i) x[i] *= inverse;
}

float square(const float* x, int n) {
  float sum = 0;
  for (int i = 0; i < n; ++i) sum += x[i] * x[i];
  return sum;
}

}  // namespace

void ZSAD_JOIN(bound_image_, ZSAD_TARGET)(const ImageBounding& a) {
  const Int8Layout& lead = a.layout.lead;
  const int P = lead.patches, h = a.layout.head, n = lead.channels, filled = lead.panels * kPanel;
  const auto floats = [&](std::size_t at) { return reinterpret_cast<float*>(a.out + at); };
  float *scales = floats(0), *sums = floats(lead.mean_terms), *errors = floats(a.layout.errors);
  float *rests = floats(a.layout.rests), *most_error = floats(a.layout.most_error);
  std::int32_t* offsets = reinterpret_cast<std::int32_t*>(a.out + lead.offsets);
  std::int8_t* codes = reinterpret_cast<std::int8_t*>(a.out + lead.codes);
  std::copy_n(a.heads, std::size_t(P) * h, floats(a.layout.heads));
  std::copy_n(a.terms, P, floats(a.layout.terms));
  std::memset(a.out, 0, lead.bytes);
  std::fill_n(errors, filled, 0.0f);
  std::vector<float> leads(std::size_t(P) * n);
  float largest = 0;
  for (int p = 0; p < P; ++p) {
    float* x = leads.data() + std::size_t(p) * n;
    std::copy_n(a.heads + std::size_t(p) * h, n, x);
    spread(x, n);
    for (int c = 0; c < n; ++c) largest = std::max(largest, std::abs(x[c]));
  }
  const float scale = std::max(largest / 127, kLeastScale), inverse = 1 / scale;
  std::fill_n(scales, filled, scale);
  *most_error = 0;
  for (int p = 0; p < P; ++p) {
    const float* x = leads.data() + std::size_t(p) * n;
    float error[kMostLead], along = 0;
    std::int32_t sum = 0;
    std::int8_t* out = codes + p / kPanel * lead.panel_bytes() + p % kPanel * kQuad;
    for (int c = 0; c < n; ++c) {
      const float code = std::nearbyint(x[c] * inverse);
      error[c] = x[c] - code * scale;
      along += x[c] * error[c];
      sum += std::int32_t(code);
      out[c / kQuad * kPanel * kQuad + c % kQuad] = std::int8_t(code);
    }
    const float left = square(error, n), tail = std::max(a.tails[p], 0.0f) + kSquareSlack / 8;
    offsets[p] = -128 * sum;
    errors[p] = std::sqrt(left);
    *most_error = std::max(*most_error, errors[p]);
    rests[p] = std::sqrt(tail);
    sums[p] = a.terms[p] + along + (square(a.heads + std::size_t(p) * h + n, h - n) + tail + left) / 2;
  }
}

std::int64_t ZSAD_JOIN(bounded_pair_, ZSAD_TARGET)(const BoundedPair& a) {
  PairRows rows(a);
  multiply({a.left.bounds, a.left.layout.lead}, {a.right.bounds, a.right.layout.lead}, 1,
           std::numeric_limits<int>::max(), rows);
  return rows.finish();
}

}  // namespace zsad
