#pragma once
// The pass over a Gram that is approximate anyway, in 16 bits: twice as many entries to a vector as with floats.
//
// Entries become counts, so many that no sum overflows: |entry| is at most the longest left token times the longest
// right one. The box filters of degree n are four sums of n, over rows and columns of the grid on both sides. After the
// first two counts are divided by n, after the third by what the longest features leave. Inverse lengths become counts,
// relative to the largest. What is then largest is so up to a few counts, typically 1e-4 of a cosine and at most a few
// 1e-3: `Counting` tells whether a cosine of 1 has enough of them, which tokens of very unequal length do not have, and
// whether cosines differ by more than counts do, which they do not where all tokens share a few huge channels. All of
// it takes inverse lengths to be those of the very tokens that the Gram multiplied: of others sums overflow.
//
// With AVX-512 alone: other instruction sets gain nothing over the pass in floats.
#if defined(__AVX512BW__)
#include "buffer.h"
#include "gram_pass.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include <immintrin.h>

namespace zsad {
namespace {
namespace narrow {

typedef std::int16_t Count;
typedef __m512i Counts;
constexpr int kCounts = 32;  // of a vector

constexpr float kMostCounts = 30000.0f;  // of a sum; int8 products may be a little larger than the true ones
constexpr float kLeastCounts = 1000.0f;  // of a cosine of 1 between the shortest features
constexpr float kLeastSpread = 0.1f;     // 1 - cosine of patches taken at random
constexpr Count kNone = std::numeric_limits<Count>::min();

inline Counts load(const Count* p) { return _mm512_loadu_si512(p); }
inline Counts all(Count x) { return _mm512_set1_epi16(x); }
inline Counts sum(Counts a, Counts b) { return _mm512_add_epi16(a, b); }
inline Counts scaled_by(Counts a, Counts b) { return _mm512_mulhrs_epi16(a, b); }  // a * b / 32768, rounded

// What is worth how many counts.
class Counting {
 public:
  // Of one degree.
  struct Sums {
    Count share, last;  // of 32768: what is left of the first two sums, and of the third
    float one;          // counts of a product of 1 after all sums
    float most_left, most_right;  // the largest inverse lengths
  };

  explicit Counting(const GramPass& a)
      : a_(a), patches_(a.rows * a.columns), reach_(*std::max_element(a.degrees, a.degrees + a.degree_count) / 2) {
    const int* one = std::find(a.degrees, a.degrees + a.degree_count, 1);
    if (one == a.degrees + a.degree_count || a.window < std::max(a.rows, a.columns)) return;
    const std::size_t single = std::size_t(one - a.degrees) * patches_;
    const float *left = a.inverse_left + single, *right = a.inverse_right + single;
    if (spread(left, right) < kLeastSpread) return;
    scale_ = kMostCounts / float(2 * reach_ + 1) / (length(left).longest() * length(right).longest());
    enough_ = true;
    for (int r = 0; r < a.degree_count; ++r) add_sums(r);
  }

  // Whether the whole Gram is wanted, and counts are enough.
  bool enough() const { return enough_; }
  float scale() const { return scale_; }  // of entries of the Gram
  int reach() const { return reach_; }    // half of the largest degree
  const Sums& sums(int r) const { return sums_[r]; }

 private:
  struct Lengths {
    float least, most;  // inverse, of those that are not zero
    float longest() const { return 1.0f / least; }
    float shortest() const { return 1.0f / most; }
  };

  void add_sums(int r) {
    const std::size_t first = std::size_t(r) * patches_;
    const Lengths left = length(a_.inverse_left + first), right = length(a_.inverse_right + first);
    Sums sums{0, 0, scale_, left.most, right.most};
    if (const int reach = a_.degrees[r] / 2) {
      sums.share = Count(std::lround(32768.0 / (2 * reach + 1)));
      const float shared = scale_ * sums.share * sums.share / (32768.0f * 32768.0f);
      sums.last = Count(std::min(32767.0f, 32768.0f * kMostCounts / (shared * (left.longest() * right.longest()))));
      sums.one = shared * sums.last / 32768.0f;
    }
    enough_ = enough_ && left.shortest() * right.shortest() * sums.one >= kLeastCounts;
    sums_.push_back(sums);
  }

  Lengths length(const float* inverse) const {
    constexpr float kLarge = std::numeric_limits<float>::max();
    float least = kLarge, most = 0;
#pragma omp simd reduction(min : least) reduction(max : most)
    for (int p = 0; p < patches_; ++p) {
      least = std::min(least, inverse[p] > 0 ? inverse[p] : kLarge);
      most = std::max(most, inverse[p]);
    }
    return most > 0 ? Lengths{least, most} : Lengths{1.0f, 1.0f};
  }

  // The mean of 1 - cosine of single tokens, over a few of the Gram's entries; 0 where they are all of zero tokens.
  float spread(const float* inverse_left, const float* inverse_right) const {
    float total = 0;
    int count = 0;
    for (int p = 0; p < patches_; ++p) {
      const int q = int((std::int64_t(p) * 7919 + patches_ / 2) % patches_);  // not p again, whatever their number
      const float inverse = inverse_left[p] * inverse_right[q];
      if (!(inverse > 0)) continue;
      total += 1.0f - a_.gram[std::ptrdiff_t(p) * a_.gram_stride + q] * inverse;
      ++count;
    }
    return count ? total / float(count) : 0.0f;
  }

  const GramPass& a_;
  const int patches_, reach_;
  float scale_ = 0;
  bool enough_ = false;
  std::vector<Sums> sums_;
};

class Pass {
 public:
  Pass(const GramPass& a, const Counting& counting)
      : a_(a),
        H_(a.rows),
        W_(a.columns),
        P_(H_ * W_),
        stride_((P_ + kCounts - 1) / kCounts * kCounts),
        margin_(kMaxReach * W_ / kCounts * kCounts + kCounts),
        reach_(counting.reach()),
        mask_(index_mask(P_)),
        scale_(counting.scale()),
        zeros_(stride_),
        grams_(std::size_t(std::min(2 * reach_ + 1, H_)) * W_ * stride_),
        summed_(stride_ + 2 * kCounts),
        filtered_(stride_ + 2 * margin_) {
    degrees_.reserve(a.degree_count);
    for (int r = 0; r < a.degree_count; ++r) degrees_.emplace_back(*this, r, counting.sums(r));
  }

  void run() {
    for (int y = 0; y < reach_; ++y) narrow_row(y);
    for (int y = 0; y < H_; ++y) {
      narrow_row(y + reach_);
      for (Degree& degree : degrees_) pass_row(y, degree);
    }
    for (const Degree& degree : degrees_) finish(degree);
  }

 private:
  // What one degree needs beside the Gram.
  struct Degree {
    int r, reach;
    Counting::Sums sums;
    Buffer<Count> left, right;           // inverse lengths, relative to these; right: filled up with zeros
    Buffer<Count> masks;                 // [2 * reach, stride]: which neighbours lie in the same grid row
    Buffer<Count> ring;                  // [degree, stride]: the last sums over rows of the grid
    Buffer<Count> best, numbers;         // [stride] of right patches: counts, and left patches

    Degree(const Pass& pass, int number, const Counting::Sums& own)
        : r(number),
          reach(pass.a_.degrees[number] / 2),
          sums(own),
          left(pass.stride_),
          right(pass.stride_),
          masks(std::size_t(2 * reach) * pass.stride_),
          ring(std::size_t(2 * reach + 1) * pass.stride_),
          best(pass.stride_),
          numbers(pass.stride_) {
      const float *inverse_left = pass.a_.inverse_left + std::size_t(r) * pass.P_;
      const float *inverse_right = pass.a_.inverse_right + std::size_t(r) * pass.P_;
      std::fill_n(best.get(), pass.stride_, kNone);
      const float by_left = 32767.0f / sums.most_left, by_right = 32767.0f / sums.most_right;
#pragma omp simd
      for (int p = 0; p < pass.P_; ++p) {
        left.get()[p] = Count(std::int32_t(inverse_left[p] * by_left + 0.5f));
        right.get()[p] = Count(std::int32_t(inverse_right[p] * by_right + 0.5f));
      }
      for (int d = 0; d < reach; ++d) {
        Count* mask = masks.get() + std::size_t(2 * d) * pass.stride_;
        std::fill_n(mask, pass.P_, Count(-1));
        std::fill_n(mask + pass.stride_, pass.P_, Count(-1));
        for (int y = 0; y < pass.H_; ++y)
          for (int x = 0; x <= d && x < pass.W_; ++x)
            mask[y * pass.W_ + x] = mask[pass.stride_ + (y + 1) * pass.W_ - 1 - x] = 0;
      }
    }
  };

  Count* gram_row(int y, int x) {
    if (y < 0 || y >= H_ || x < 0 || x >= W_) return zeros_.get();
    return grams_.get() + (std::size_t(y % (2 * reach_ + 1)) * W_ + x) * stride_;
  }

  // The Gram's rows of a row of the grid, in counts.
  void narrow_row(int y) {
    if (y >= H_) return;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: the count is in the lowest bits then
    const float scale = scale_;
    for (int x = 0; x < W_; ++x) {
      const float* from = a_.gram + (std::ptrdiff_t(y) * W_ + x) * a_.gram_stride;
      Count* __restrict to = gram_row(y, x);
#pragma omp simd
      for (int q = 0; q < P_; ++q) {
        const float shifted = from[q] * scale + kRound;
        std::int32_t bits;
        std::memcpy(&bits, &shifted, sizeof bits);
        to[q] = Count(bits);
      }
    }
  }

  void pass_row(int y, Degree& degree) {
    switch (degree.reach) {
      case 0: return pass_row<0>(y, degree);
      case 1: return pass_row<1>(y, degree);
      case 2: return pass_row<2>(y, degree);
      case 3: return pass_row<3>(y, degree);
      default: return pass_row<4>(y, degree);
    }
  }

  template <int K>
  void pass_row(int y, Degree& degree) {
    constexpr int kDegree = 2 * K + 1;
    if (K == 0) {
      for (int x = 0; x < W_; ++x) reduce<0>(gram_row(y, x), y * W_ + x, degree);
      return;
    }
    const auto ring_row = [&](int x) {
      return x < 0 || x >= W_ ? zeros_.get() : degree.ring.get() + std::size_t(x % kDegree) * stride_;
    };
    const Count* rows[kDegree];
    for (int x = 0; x < W_ + K; ++x) {
      if (x < W_) {
        for (int d = -K; d <= K; ++d) rows[d + K] = gram_row(y + d, x);
        add_rows<kDegree>(rows, degree.sums.share, ring_row(x));
      }
      const int centre = x - K;
      if (centre < 0) continue;
      for (int d = -K; d <= K; ++d) rows[d + K] = ring_row(centre + d);
      add_rows<kDegree>(rows, degree.sums.share, summed_.get() + kCounts);
      add_columns<K>(degree);
      reduce<K>(filtered_.get() + margin_, y * W_ + centre, degree);
    }
  }

  template <int N>
  void add_rows(const Count* const* rows, Count share, Count* out) const {
    const Count* r[N];
    std::copy_n(rows, N, r);
    const Counts shares = all(share);
    for (int q = 0; q < stride_; q += kCounts) {
      Counts total = load(r[0] + q);
      for (int i = 1; i < N; ++i) total = sum(total, load(r[i] + q));
      _mm512_storeu_si512(out + q, scaled_by(total, shares));
    }
  }

  // Neighbours in the same row of the grid.
  template <int K>
  void add_columns(const Degree& degree) {
    const Count *s = summed_.get() + kCounts, *masks = degree.masks.get();
    Count* out = filtered_.get() + margin_;
    const Counts shares = all(degree.sums.last);
    for (int q = 0; q < stride_; q += kCounts) {
      Counts total = load(s + q);
      for (int d = 0; d < K; ++d) {
        const Count *before = masks + std::size_t(2 * d) * stride_ + q, *behind = before + stride_;
        total = sum(total, _mm512_and_si512(load(s + q - d - 1), load(before)));
        total = sum(total, _mm512_and_si512(load(s + q + d + 1), load(behind)));
      }
      _mm512_storeu_si512(out + q, scaled_by(total, shares));
    }
  }

  // The last sums, over rows of the grid, and both maxima.
  template <int K>
  void reduce(const Count* t, int p, Degree& degree) {
    const Counts inverse_left = all(degree.left.get()[p]);
    const Count *inverse_right = degree.right.get();
    Count *column_best = degree.best.get(), *column_numbers = degree.numbers.get();
    Counts best = all(kNone), blocks = _mm512_setzero_si512();
    const auto block = [&](int q, __mmask32 there) {
      Counts total = load(t + q);
      for (int d = 1; d <= K; ++d) total = sum(total, sum(load(t + q - d * W_), load(t + q + d * W_)));
      const Counts left = scaled_by(total, inverse_left), right = scaled_by(total, load(inverse_right + q));
      const __mmask32 columns = _mm512_cmpgt_epi16_mask(left, load(column_best + q));
      if (columns) {
        _mm512_mask_storeu_epi16(column_best + q, columns, left);
        _mm512_mask_storeu_epi16(column_numbers + q, columns, all(Count(p)));
      }
      const __mmask32 larger = _mm512_mask_cmpgt_epi16_mask(there, right, best);
      best = _mm512_mask_mov_epi16(best, larger, right);
      blocks = _mm512_mask_mov_epi16(blocks, larger, all(Count(q / kCounts)));
    };
    const int whole = P_ / kCounts * kCounts;
    for (int q = 0; q < whole; q += kCounts) block(q, ~__mmask32(0));
    if (whole < P_) block(whole, (__mmask32(1) << (P_ - whole)) - 1);
    alignas(64) Count bests[kCounts], numbers[kCounts];
    _mm512_store_si512(bests, best);
    _mm512_store_si512(numbers, blocks);
    int lane = 0;
    for (int i = 1; i < kCounts; ++i)
      if (bests[i] > bests[lane]) lane = i;
    const std::size_t at = std::size_t(degree.r) * P_ + p;
    a_.best_left[at] = key(bests[lane], degree.sums.most_right * a_.inverse_left[at], degree,
                           std::uint32_t(numbers[lane] * kCounts + lane));
  }

  void finish(const Degree& degree) const {
    for (int q = 0; q < P_; ++q) {
      const std::size_t at = std::size_t(degree.r) * P_ + q;
      a_.best_right[at] = key(degree.best.get()[q], degree.sums.most_left * a_.inverse_right[at], degree,
                              std::uint32_t(std::uint16_t(degree.numbers.get()[q])));
    }
  }

  float key(Count counts, float inverse, const Degree& degree, std::uint32_t number) const {
    const float cosine = counts * (32768.0f / 32767.0f) * inverse / degree.sums.one;
    const float distance = std::max(1.0f - cosine, 0.0f);
    std::uint32_t bits;
    std::memcpy(&bits, &distance, sizeof bits);
    bits = (bits & ~mask_) | number;
    float found;
    std::memcpy(&found, &bits, sizeof found);
    return found;
  }

  const GramPass& a_;
  const int H_, W_, P_, stride_, margin_, reach_;
  const std::uint32_t mask_;
  const float scale_;
  const Buffer<Count> zeros_, grams_, summed_, filtered_;
  std::vector<Degree> degrees_;
};

}  // namespace narrow
}  // namespace
}  // namespace zsad
#endif
