// Products from int8 codes: an approximation that is good enough to find winners, at a fraction of the fp32 product.
//
//   u[p]       = orthogonal transform of x[p] - mean
//   scale[p]   = max over c of |u[p, c]| / 127;   code[p, c] = round(u[p, c] / scale[p])
//   gram[p, q] = scale_left[p] * scale_right[q] * sum over c of code_left[p, c] * code_right[q, c]
//                + mean_term_left[p] + mean_term_right[q],   mean_term[p] = mean . x[p] - |mean|^2 / 2
//
// Rounding leaves u = q + e, and of a product q[p] . e[q] + e[p] . q[q] is missing. Where near ones are what counts,
// u[p] . e[p] + u[q] . e[q], which is nothing on the mean, takes its place, as part of the mean terms: what is then
// missing is in proportion to how far u[p] and u[q] are apart, and not to their length.
// The mean is any vector that all images share. What the tokens of a layer have in common, a few huge channels above
// all, then takes no part in the rounding: it tells no two patches apart and would drown what does.
// The transform (Walsh-Hadamard over the first B channels and, where C is not B, the largest power of two up to C, once
// more over the last B) leaves every dot product as it is and spreads the few large channels that vision transformers
// have over many: at the same eight bits the error of a cosine falls to a third on DINOv2 tokens.
//
// Shapes and types of the arguments: int8_product.h; instruction sets (ZSAD_TARGET): int8_blocks.h.
#include "int8_product.h"

#include "buffer.h"
#include "gram_pass.h"
#include "int8_blocks.h"
#include "keys.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#define ZSAD_JOIN_(a, b) a##b
#define ZSAD_JOIN(a, b) ZSAD_JOIN_(a, b)

namespace zsad {
namespace {

// Where the products of a left patch with those from a column on go: into the Gram.
struct GramRows : AnyRows {
  float* gram;
  std::ptrdiff_t stride;

  GramRows(float* to, std::ptrdiff_t apart) : gram(to), stride(apart) {}

  template <int Vectors>
  void take(int row, int column, const Floats* products) {
    for (int j = 0; j < Vectors; ++j) store_floats(gram + row * stride + column + j * kLanes, products[j]);
  }
};

// Or those that are large enough among the largest, and the Gram is never written.
struct KeptRows : AnyRows {
  const Kept& kept;
  float* least;  // of every row: products up to it are not taken
  int* counts;   // of every row: the entries that it has; with margins only
  int before;    // columns of the right images before this one

  KeptRows(const Kept& kept, int rows) : kept(kept), before(0) {
    static thread_local std::vector<float> room;
    static thread_local std::vector<int> counted;
    room.resize(rows);
    counted.resize(rows);
    least = room.data();
    counts = counted.data();
    for (int row = 0; row < rows; ++row) {
      least[row] = smallest(kept, row);
      if (!kept.margins) continue;
      const float* values = kept.values + std::size_t(row) * kept.count;
      counts[row] = int(std::count_if(values, values + kept.count, [](float v) { return v > kLowest; }));
    }
  }

  void begin(int column) { before = column; }

  template <int Vectors>
  void take(int row, int column, const Floats* products) {
    std::uint64_t found = 0;
    for (int j = 0; j < Vectors; ++j) found |= larger(products[j], all(least[row])) << j * kLanes;
    if (found) raise_by<Vectors>(row, before + column, products, found);
  }

 private:
  static constexpr float kLowest = -std::numeric_limits<float>::max();

  template <int Vectors>
  ZSAD_NOINLINE void raise_by(int row, int column, const Floats* products, std::uint64_t found) {
    const int columns = kept.columns - column;
    if (columns < Vectors * kLanes) found &= (std::uint64_t(1) << std::max(columns, 0)) - 1;
    float values[Vectors * kLanes];
    for (int j = 0; j < Vectors; ++j) store_floats(values + j * kLanes, products[j]);
    for (; found; found &= found - 1) {
      const int c = __builtin_ctzll(found);
      if (kept.margins)
        join(row, values[c], kept.first + column + c);
      else
        raise(kept, row, values + c, column + c, column + c + 1);
    }
    if (!kept.margins) least[row] = smallest(kept, row);
  }

  // Take a product among the entries of a row: the `wanted` largest come first, descending, the others as they come.
  void join(int row, float value, std::int32_t index) {
    if (!(value > least[row])) return;
    float* values = kept.values + std::size_t(row) * kept.count;
    std::int32_t* indices = kept.indices + std::size_t(row) * kept.count;
    for (int at = 0; at < std::min(kept.wanted, counts[row]); ++at)
      if (value > values[at]) {
        std::swap(value, values[at]);
        std::swap(index, indices[at]);
      }
    if (counts[row] >= kept.wanted) least[row] = values[kept.wanted - 1] - kept.margins[row];
    if (counts[row] == kept.count && !make_room(row, values, indices, value)) return;
    values[counts[row]] = value;
    indices[counts[row]++] = index;
  }

  // Remove what is of no use by now from a full row, or else its smallest entry, if that is smaller than a value;
  // returns whether there is room.
  bool make_room(int row, float* values, std::int32_t* indices, float value) {
    int left = kept.wanted, last = kept.wanted;  // the smallest
    for (int k = kept.wanted; k < kept.count; ++k) {
      if (values[k] < values[last]) last = k;
      if (!(values[k] > least[row])) continue;
      values[left] = values[k];
      indices[left++] = indices[k];
    }
    if (left < kept.count) {
      std::fill(values + left, values + kept.count, kLowest);
      std::fill(indices + left, indices + kept.count, -1);
      counts[row] = left;
      return true;
    }
    if (kept.wanted == kept.count || !(value > values[last])) return false;
    values[last] = values[kept.count - 1];
    indices[last] = indices[kept.count - 1];
    counts[row] = kept.count - 1;
    return true;
  }
};

#if defined(__AMX_INT8__)

constexpr int kColumns = 2 * kPanel;  // right patches of a block, which has kRows left ones
constexpr int kTogether = 4;          // rows that are looked through together

// Scales of one side's patches, and terms of cosine - 1, with what fills blocks up behind them.
struct NearestSide {
  static constexpr float kFar = -1e30f;  // of what fills blocks up, which is nobody's nearest
  std::vector<float> scales, terms;

  NearestSide(const Int8Image& image, int block, float shift) {
    const Image of(image);
    const int patches = image.layout.patches, filled = (patches + block - 1) / block * block;
    scales.assign(of.scales, of.scales + patches);
    scales.resize(filled);
    terms.reserve(filled);
    for (int p = 0; p < filled; ++p) terms.push_back(p < patches ? of.mean_terms[p] + shift : kFar);
  }
};

// Finds the nearest of both sides block by block: vectors look through one while tiles multiply the next.
class Nearest {
 public:
  Nearest(const Int8Image& left, const Int8Image& right)
      : left_mask_(index_mask(left.layout.patches)),
        right_mask_(index_mask(right.layout.patches)),
        left_(left, kRows, -1.0f),
        right_(right, kColumns, 0.0f),
        rows_(left_.scales.size() * kLanes),
        columns_(right_.scales.size()) {
    std::fill_n(rows_.get(), left_.scales.size() * kLanes, NearestSide::kFar);
    std::fill_n(columns_.get(), right_.scales.size(), NearestSide::kFar);
  }

  int rows() const { return int(left_.scales.size()); }
  int columns() const { return int(right_.scales.size()); }

  // Multiplies left patches from p with right ones from q on, whose prepared panels are `rows` and `columns`, and looks
  // through the block before: some of its rows beside each kTileBytes of a panel.
  void multiply(const std::int8_t* rows, const std::int8_t* columns, std::size_t bytes, int p, int q) {
    Look look(*this);
    multiply_tiles(rows, columns, bytes, sums_[turn_ ^= 1], [&] {
      if (look.left == 0) return;
      ZSAD_UNROLL
      for (int i = 0; i < kTogether; ++i) look.row();
    });
    look.rest();
    p_ = p, q_ = q, there_ = kRows;
  }

  void finish(const Int8Image& left, const Int8Image& right, float* best_left, float* best_right) {
    Look(*this).rest();
    for (int p = 0; p < left.layout.patches; ++p)
      best_left[p] = to_key(_mm512_reduce_max_ps(_mm512_load_ps(rows_.get() + std::size_t(p) * kLanes)), right_mask_);
    for (int q = 0; q < right.layout.patches; ++q) best_right[q] = to_key(columns_.get()[q], left_mask_);
  }

 private:
  // The block before, row after row. All of it is in registers for as long as the block is looked through.
  struct Look {
    explicit Look(const Nearest& nearest)
        : left_mask(_mm512_set1_epi32(nearest.left_mask_)),
          right_mask(_mm512_set1_epi32(nearest.right_mask_)),
          number(nearest.p_),
          left(nearest.there_),
          sums(nearest.sums_[nearest.turn_].of[0]),
          scale(nearest.left_.scales.data() + number),
          term(nearest.left_.terms.data() + number),
          best_of_row(nearest.rows_.get() + std::size_t(number) * kLanes),
          best_of_columns(nearest.columns_.get() + nearest.q_) {
      const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      ZSAD_UNROLL
      for (int j = 0; j < 2; ++j) {
        const int q = nearest.q_ + j * kLanes;
        scales[j] = _mm512_loadu_ps(nearest.right_.scales.data() + q);
        terms[j] = _mm512_loadu_ps(nearest.right_.terms.data() + q);
        best[j] = _mm512_load_ps(best_of_columns + j * kLanes);
        numbers[j] = _mm512_add_epi32(lanes, _mm512_set1_epi32(q));
      }
    }

    ZSAD_INLINE void row() {
      const __m512i of_row = _mm512_set1_epi32(number++);
      __m512 found[2];
      ZSAD_UNROLL
      for (int j = 0; j < 2; ++j) {
        const __m512 below_one = scaled(_mm512_load_si512(sums + j * kLanes), *scale, scales[j], *term, terms[j]);
        found[j] = with_numbers(below_one, right_mask, numbers[j]);
        best[j] = _mm512_max_ps(best[j], with_numbers(below_one, left_mask, of_row));
      }
      _mm512_store_ps(best_of_row, _mm512_max_ps(_mm512_load_ps(best_of_row), _mm512_max_ps(found[0], found[1])));
      sums += kColumns, best_of_row += kLanes, ++scale, ++term, --left;
    }

    ZSAD_INLINE void rest() {
      while (left) row();
      ZSAD_UNROLL
      for (int j = 0; j < 2; ++j) _mm512_store_ps(best_of_columns + j * kLanes, best[j]);
    }

    static __m512 with_numbers(__m512 values, __m512i mask, __m512i numbers) {
      constexpr int kExceptOr = 0xba;  // values & ~mask | numbers
      return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(values), mask, numbers, kExceptOr));
    }

    const __m512i left_mask, right_mask;
    int number, left;  // of left patches: the next one's, and how many are left
    const std::int32_t* sums;
    const float *scale, *term;
    float *best_of_row, *best_of_columns;
    __m512 scales[2], terms[2], best[2];
    __m512i numbers[2];
  };

  const std::uint32_t left_mask_, right_mask_;
  const NearestSide left_, right_;
  const Buffer<float> rows_;     // [left patches, kLanes]: the best among every kLanes-th right patch
  const Buffer<float> columns_;  // of right patches
  TileSums<2> sums_[2];          // of the block before and of the present one, in turn
  int turn_ = 0, p_ = 0, q_ = 0, there_ = 0;  // the block before, if any
};

// Panels of a right image in whole blocks and tiles: where they lie, or else in a room.
const std::int8_t* filled_columns(const Int8Image& right, int columns, std::vector<std::int8_t>& room) {
  const Image image(right);
  const std::size_t bytes = prepared_bytes(right.layout);
  const int panels = right.layout.panels;
  if (columns == panels * kPanel && bytes == right.layout.panel_bytes()) return image.codes;
  room.resize(std::max(room.size(), columns / kPanel * bytes + kLine));
  std::int8_t* filled = room.data() + (-reinterpret_cast<std::uintptr_t>(room.data())) % kLine;
  for (int panel = 0; panel < panels; ++panel) {
    const std::int8_t* codes = image.codes + panel * right.layout.panel_bytes();
    std::memcpy(filled + panel * bytes, codes, right.layout.panel_bytes());
    std::memset(filled + panel * bytes + right.layout.panel_bytes(), 0, bytes - right.layout.panel_bytes());
  }
  std::memset(filled + panels * bytes, 0, (columns / kPanel - panels) * bytes);
  return filled;
}

void find_nearest(const Int8Image& left, const Int8Image& right, float* best_left, float* best_right) {
  // Fresh memory would take as long as the products.
  static thread_local std::vector<std::int8_t> row_room, column_room;
  Nearest nearest(left, right);
  const Int8Layout& layout = left.layout;
  const std::size_t bytes = prepared_bytes(layout);
  row_room.resize(std::max(row_room.size(), 2 * bytes + kLine));
  std::int8_t* rows = row_room.data() + (-reinterpret_cast<std::uintptr_t>(row_room.data())) % kLine;
  const std::int8_t* columns = filled_columns(right, nearest.columns(), column_room);
  const Tiles tiles;
  for (int p = 0; p < nearest.rows(); p += kRows) {
    const int panel = p / kPanel, there = std::min(2, layout.panels - panel);
    prepare_rows(Image(left).codes + panel * layout.panel_bytes(), there, layout, rows);
    std::memset(rows + there * bytes, 0, (2 - there) * bytes);
    for (int q = 0; q < nearest.columns(); q += kColumns)
      nearest.multiply(rows, columns + q / kPanel * bytes, bytes, p, q);
  }
  nearest.finish(left, right, best_left, best_right);
}

#else

// The nearest of both sides, as candidates for keys: where products go when the Gram is never written.
struct NearestRows : AnyRows {
  int patches;  // of the right image
  std::uint32_t left_mask, right_mask;
  float *rows, *columns;  // of the left and of the right patches, the best so far

  NearestRows(int right, std::uint32_t of_left, std::uint32_t of_right, float* lefts, float* rights)
      : patches(right), left_mask(of_left), right_mask(of_right), rows(lefts), columns(rights) {}

  template <int Vectors>
  void take(int row, int column, const Floats* products) {
    float values[Vectors * kLanes], best = rows[row];
    for (int j = 0; j < Vectors; ++j) store_floats(values + j * kLanes, products[j]);
    const int count = std::min(Vectors * kLanes, patches - column);
    float* __restrict found = columns + column;
    const std::uint32_t left = row, right = column, left_bits = left_mask, right_bits = right_mask;
#pragma omp simd reduction(max : best)
    for (int i = 0; i < count; ++i) {
      const float below_one = values[i] - 1.0f;
      const float of_left = with_index(below_one, right_bits, right + std::uint32_t(i));
      const float of_right = with_index(below_one, left_bits, left);
      best = of_left > best ? of_left : best;
      found[i] = of_right > found[i] ? of_right : found[i];
    }
    rows[row] = best;
  }
};

void find_nearest(const Int8Image& left, const Int8Image& right, float* best_left, float* best_right) {
  const int P = left.layout.patches, Q = right.layout.patches;
  constexpr float kLowest = -std::numeric_limits<float>::max();
  std::fill_n(best_left, P, kLowest);
  std::fill_n(best_right, Q, kLowest);
  NearestRows rows(Q, index_mask(P), index_mask(Q), best_left, best_right);
  multiply(left, right, 1, std::numeric_limits<int>::max(), rows);
  for (int p = 0; p < P; ++p) best_left[p] = to_key(best_left[p], rows.right_mask);
  for (int q = 0; q < Q; ++q) best_right[q] = to_key(best_right[q], rows.left_mask);
}

#endif

// Walsh-Hadamard transform of kPanel tokens at a time, t: [channels, kPanel], a power of two of channels. Two of its
// stages in one go halve what is read and written.
void walsh_hadamard(float* t, int channels) {
  int half = 1;
  for (; 2 * half < channels; half *= 4)
    for (int first = 0; first < channels; first += 4 * half) {
      const int apart = half * kPanel;
      float *__restrict t0 = t + first * kPanel, *__restrict t1 = t0 + apart, *__restrict t2 = t1 + apart,
                      *__restrict t3 = t2 + apart;
#pragma omp simd
      for (int i = 0; i < apart; ++i) {
        const float a = t0[i] + t1[i], b = t0[i] - t1[i], c = t2[i] + t3[i], d = t2[i] - t3[i];
        t0[i] = a + c;
        t1[i] = b + d;
        t2[i] = a - c;
        t3[i] = b - d;
      }
    }
  if (half < channels) {
    float *__restrict t0 = t, *__restrict t1 = t + half * kPanel;
#pragma omp simd
    for (int i = 0; i < half * kPanel; ++i) {
      const float a = t0[i], b = t1[i];
      t0[i] = a + b;
      t1[i] = a - b;
    }
  }
  const float unit = 1.0f / std::sqrt(float(channels));
  for (int i = 0; i < channels * kPanel; ++i) t[i] *= unit;
}

void transform(float* t, int channels) {
  int block = 1;
  while (2 * block <= channels) block *= 2;
  walsh_hadamard(t, block);
  if (block == channels) return;
  // What the first pass has spread is half of a Walsh function; without scattered signs the second would gather it.
  for (int c = 0; c < channels; ++c)
    if (std::uint32_t(c) * 2654435769u >> 31)
      for (int i = 0; i < kPanel; ++i) t[c * kPanel + i] = -t[c * kPanel + i];
  walsh_hadamard(t + (channels - block) * kPanel, block);
}

// Tokens [count, C] less the mean, as [C, kPanel]; those beyond `count` are zeros.
void centre(const float* tokens, const float* mean, int count, int C, float* out) {
  int c = 0;
#if defined(__AVX512F__)
  if (count == kPanel)
    for (; c + kPanel <= C; c += kPanel) {
      const __m512 means = _mm512_loadu_ps(mean + c);
      __m512i rows[kPanel];
      ZSAD_UNROLL
      for (int i = 0; i < kPanel; ++i)
        rows[i] = _mm512_castps_si512(_mm512_sub_ps(_mm512_loadu_ps(tokens + std::size_t(i) * C + c), means));
      transpose(rows);
      ZSAD_UNROLL
      for (int j = 0; j < kPanel; ++j) _mm512_storeu_si512(out + (c + j) * kPanel, rows[j]);
    }
#endif
  for (; c < C; ++c)
    for (int i = 0; i < kPanel; ++i)
      out[c * kPanel + i] = i < count ? tokens[std::size_t(i) * C + c] - mean[c] : 0.0f;
}

// What the codes of a panel's patches add up to, and the products of exact values with what rounding has left.
struct CodeSums {
  std::int32_t codes[kPanel] = {};
  float left[kPanel] = {};
};

// The codes of a quad of channels, values: [kQuad, kPanel].
void pack(const float* values, const float* inverse, CodeSums& sums, std::int8_t* codes) {
  std::uint32_t quads[kPanel];
#pragma omp simd
  for (int i = 0; i < kPanel; ++i) {
    std::uint32_t quad = 0;
    for (int c = 0; c < kQuad; ++c) {
      const float exact = values[c * kPanel + i] * inverse[i], rounded = std::nearbyint(exact);
      const std::int32_t code = std::int32_t(rounded);
      sums.codes[i] += code;
      sums.left[i] += exact * (exact - rounded);
      quad |= (std::uint32_t(code) & 255u) << 8 * c;
    }
    quads[i] = quad;
  }
  std::memcpy(codes, quads, sizeof quads);
}

}  // namespace

void ZSAD_JOIN(int8_quantise_, ZSAD_TARGET)(const float* tokens, const float* mean, const Int8Layout& layout,
                                            bool near, unsigned char* out) {
  const int C = layout.channels;
  std::vector<float> transposed(std::size_t(layout.quads) * kQuad * kPanel);  // filled up with zeros
  float* scales = reinterpret_cast<float*>(out);
  std::int32_t* offsets = reinterpret_cast<std::int32_t*>(out + layout.offsets);
  std::int8_t* codes = reinterpret_cast<std::int8_t*>(out + layout.codes);
  float* mean_terms = reinterpret_cast<float*>(out + layout.mean_terms);
  float half_square = 0.0f;
  for (int c = 0; c < C; ++c) half_square += 0.5f * mean[c] * mean[c];
  for (int panel = 0; panel < layout.panels; ++panel, codes += layout.panel_bytes()) {
    const int first = panel * kPanel, count = std::min(kPanel, layout.patches - first);
    centre(tokens + std::size_t(first) * C, mean, count, C, transposed.data());
    float* terms = mean_terms + first;
    std::fill_n(terms, kPanel, half_square);
    for (int c = 0; c < C; ++c)
      for (int i = 0; i < kPanel; ++i) terms[i] += mean[c] * transposed[c * kPanel + i];
    transform(transposed.data(), C);

    float largest[kPanel] = {}, inverse[kPanel];
    for (int c = 0; c < C; ++c)
      for (int i = 0; i < kPanel; ++i) largest[i] = std::max(largest[i], std::fabs(transposed[c * kPanel + i]));
    for (int i = 0; i < kPanel; ++i) {
      scales[first + i] = largest[i] / 127.0f;
      inverse[i] = largest[i] > 0 ? 127.0f / largest[i] : 0.0f;
    }
    CodeSums sums;
    for (int quad = 0; quad < layout.quads; ++quad)
      pack(transposed.data() + quad * kQuad * kPanel, inverse, sums, codes + quad * kQuad * kPanel);
    for (int i = 0; i < kPanel; ++i) {
      offsets[first + i] = -128 * sums.codes[i];
      if (near) terms[i] += scales[first + i] * scales[first + i] * sums.left[i];
    }
  }
}

void ZSAD_JOIN(int8_multiply_, ZSAD_TARGET)(const Int8Image& left, const Int8Image& right, float* gram,
                                            std::ptrdiff_t stride, int apart) {
  GramRows rows(gram, stride);
  multiply(left, right, 1, apart, rows);
}

void ZSAD_JOIN(int8_running_top_, ZSAD_TARGET)(const Int8Image& left, const Int8Image& right, int count,
                                               const Kept& kept) {
  KeptRows rows(kept, left.layout.patches);
  multiply(left, right, count, std::numeric_limits<int>::max(), rows);
}

void ZSAD_JOIN(int8_nearest_, ZSAD_TARGET)(const Int8Image& left, const Int8Image& right, float* best_left,
                                           float* best_right) {
  find_nearest(left, right, best_left, best_right);
}

}  // namespace zsad
