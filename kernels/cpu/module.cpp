// Python binding of the CPU kernels; chooses each one's instruction set at run time.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "amx.h"
#include "bounded_bank.h"
#include "bounded_pair.h"
#include "fp32_product.h"
#include "gram_pass.h"
#include "image_tower.h"
#include "int8_product.h"
#include "jpeg_scans.h"
#include "measured_best.h"
#include "pooling.h"
#include "rank_sums.h"
#include "running_top.h"
#include "tiff_strips.h"
#include "unit_vectors.h"
#include "winner_cosines.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

#if defined(ZSAD_X86)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
#if defined(ZSAD_AMX)
bool has_avx512amx() { return has_avx512vnni() && zsad::may_use_amx(); }
#define ZSAD_IF_AMX(...) __VA_ARGS__
#else
#define ZSAD_IF_AMX(...)
#endif
#define ZSAD_IF_X86(...) __VA_ARGS__
#else
#define ZSAD_IF_X86(...)
#endif

// Variants of one kernel that this build and this processor share, fastest first.
template <typename Function>
class Variants {
 public:
  void add(bool usable, const char* instruction_set, Function function) {
    if (usable) variants_.emplace_back(instruction_set, function);
  }
  Function choose(const std::string& instruction_set) const {
    for (const auto& variant : variants_)
      if (instruction_set.empty() || variant.first == instruction_set) return variant.second;
    throw std::invalid_argument("instruction set not available here: " + instruction_set);
  }
  std::vector<std::string> names() const {
    std::vector<std::string> names;
    for (const auto& variant : variants_) names.push_back(variant.first);
    return names;
  }

 private:
  std::vector<std::pair<std::string, Function>> variants_;
};

// The variants of a function that is compiled once per instruction set; `widest` is the set beyond AVX2, and what
// follows adds those beyond that.
#define ZSAD_VARIANTS(function, widest, has_widest, ...)                   \
  [] {                                                                     \
    Variants<decltype(&zsad::function##_portable)> v;                      \
    __VA_ARGS__                                                            \
    ZSAD_IF_X86(v.add(has_widest(), #widest, zsad::function##_##widest);   \
                v.add(has_avx2(), "avx2", zsad::function##_avx2);)         \
    v.add(true, "portable", zsad::function##_portable);                    \
    return v;                                                              \
  }()
#define ZSAD_INT8_VARIANTS(function)                 \
  ZSAD_VARIANTS(function, avx512vnni, has_avx512vnni, \
                ZSAD_IF_AMX(v.add(has_avx512amx(), "avx512amx", zsad::function##_avx512amx);))

const auto gram_passes = ZSAD_VARIANTS(gram_pass, avx512, has_avx512);
const auto poolings = ZSAD_VARIANTS(pooling, avx512, has_avx512);
const auto winner_kernels = ZSAD_VARIANTS(winner_cosines, avx512, has_avx512);
const auto best_measurers = ZSAD_VARIANTS(measured_best, avx512, has_avx512);
const auto rank_summers = ZSAD_VARIANTS(rank_sums, avx512, has_avx512);
const auto running_tops = ZSAD_VARIANTS(running_top, avx512, has_avx512);
const auto unit_makers = ZSAD_VARIANTS(unit_vectors, avx512, has_avx512);
const auto image_towers = ZSAD_INT8_VARIANTS(image_tower);
const auto int8_quantisers = ZSAD_INT8_VARIANTS(int8_quantise);
const auto int8_multipliers = ZSAD_INT8_VARIANTS(int8_multiply);
const auto int8_nearest_finders = ZSAD_INT8_VARIANTS(int8_nearest);
const auto bank_coders = ZSAD_VARIANTS(code_bank, avx512vnni, has_avx512vnni);
const auto image_bounders = ZSAD_VARIANTS(bound_image, avx512vnni, has_avx512vnni);
const auto bounded_pairs = ZSAD_VARIANTS(bounded_pair, avx512vnni, has_avx512vnni);
const auto bounded_banks = ZSAD_VARIANTS(bounded_bank, avx512vnni, has_avx512vnni);
const auto int8_running_tops = ZSAD_INT8_VARIANTS(int8_running_top);
const auto fp32_products = [] {
  Variants<void (*)(const zsad::Fp32Product&)> v;
  ZSAD_IF_X86(ZSAD_IF_AMX(v.add(has_avx512amx(), "avx512amx", zsad::fp32_product_avx512amx);))
  return v;
}();

using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Gram = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;
using GramOutput = nb::ndarray<float, nb::ndim<2>, nb::device::cpu>;
using FeaturesOutput = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Features = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using NumbersOutput = nb::ndarray<std::int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using NumberList = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Numbers = nb::ndarray<const std::int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Candidates = nb::ndarray<const float, nb::ndim<3>, nb::device::cpu>;
using CandidateNumbers = nb::ndarray<const std::int32_t, nb::ndim<3>, nb::device::cpu>;
using IndicesOutput = nb::ndarray<std::int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using FlagsOutput = nb::ndarray<bool, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using FloatsOutput = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using DoublesOutput = nb::ndarray<double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using BankCodes = nb::ndarray<const std::int16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using BankCodesOutput = nb::ndarray<std::int16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Halves = nb::ndarray<const std::uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Chunks = nb::ndarray<const std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using BytesOutput = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

template <typename A>
bool has_shape(const A& array, std::size_t rows, std::size_t columns) {
  return array.shape(0) == rows && array.shape(1) == columns;
}

void gram_pass(const Gram& gram, std::pair<int, int> grid, const std::vector<int>& degrees, const Matrix& inverse_left,
               const Matrix& inverse_right, const Output& best_left, const Output& best_right, bool keys,
               std::optional<int> window, bool narrow, const std::string& instruction_set) {
  require(grid.first >= 1 && grid.second >= 1, "the grid needs at least one row and one column");
  const std::size_t P = std::size_t(grid.first) * grid.second, R = degrees.size();
  require(has_shape(gram, P, P) && gram.stride(1) == 1,
          "gram must be [P, P] with contiguous rows and P = rows * columns of the grid");
  require(R > 0, "at least one degree is needed");
  for (int degree : degrees)
    require(degree >= 1 && degree % 2 == 1 && degree / 2 <= zsad::kMaxReach,
            "degrees must be odd and at most " + std::to_string(2 * zsad::kMaxReach + 1));
  require(has_shape(inverse_left, R, P) && has_shape(inverse_right, R, P) && has_shape(best_left, R, P) &&
              has_shape(best_right, R, P),
          "inverse lengths and maxima must be [R, P]");
  require(!window || *window >= 0, "the window must not be negative");
  require(!keys || P <= zsad::kMaxKeyPatches,
          "keys hold patch numbers of at most " + std::to_string(zsad::kMaxKeyPatches) + " patches");

  const auto run = gram_passes.choose(instruction_set);
  const zsad::GramPass arguments{
      gram.data(), gram.stride(0),      grid.first,           grid.second,      degrees.data(),
      int(R),      inverse_left.data(), inverse_right.data(), best_left.data(), best_right.data(),
      keys,                narrow,
      std::min(window.value_or(std::numeric_limits<int>::max()), std::max(grid.first, grid.second))};
  nb::gil_scoped_release release;
  run(arguments);
}

void pool(const Matrix& tokens, std::pair<int, int> grid, const std::vector<int>& degrees, float zero_length,
          const Output& inverse, const std::optional<FeaturesOutput>& unit, const std::string& instruction_set) {
  require(grid.first >= 1 && grid.second >= 1, "the grid needs at least one row and one column");
  const std::size_t P = std::size_t(grid.first) * grid.second, R = degrees.size(), C = tokens.shape(1);
  require(tokens.shape(0) == P && C > 0, "tokens must be [P, C] with P = rows * columns of the grid");
  for (int degree : degrees) require(degree >= 1 && degree % 2 == 1, "degrees must be odd");
  require(has_shape(inverse, R, P), "inverse lengths must be [R, P]");
  require(!unit || (has_shape(*unit, R, P) && unit->shape(2) == C), "unit features must be [R, P, C]");

  const auto run = poolings.choose(instruction_set);
  const zsad::Pooling arguments{tokens.data(), grid.first,     grid.second,
                                int(C),        degrees.data(), int(R),
                                zero_length,   inverse.data(), unit ? unit->data() : nullptr};
  nb::gil_scoped_release release;
  run(arguments);
}

zsad::Int8Layout layout_of(std::size_t patches, std::size_t channels) {
  // Beyond, the sum of 255 * 127 over all channels might leave 32 bits.
  constexpr std::size_t kMaxChannels = 1 << 16;
  require(patches > 0 && patches < (1u << 24) && channels > 0 && channels <= kMaxChannels,
          "int8 products need 1 to 65536 channels and at least one patch");
  return zsad::Int8Layout(int(patches), int(channels));
}

void int8_quantise(const Matrix& tokens, const Vector& mean, const BytesOutput& out, const std::string& instruction_set,
                   bool near) {
  const auto layout = layout_of(tokens.shape(0), tokens.shape(1));
  require(mean.shape(0) == tokens.shape(1), "mean must be [C]");
  require(out.shape(0) == layout.bytes, "out must have int8_bytes(P, C) bytes");
  require(reinterpret_cast<std::uintptr_t>(out.data()) % sizeof(float) == 0, "out must be aligned to 4 bytes");
  const auto run = int8_quantisers.choose(instruction_set);
  nb::gil_scoped_release release;
  run(tokens.data(), mean.data(), layout, near, out.data());
}

struct Int8Pair {
  zsad::Int8Image left, right;
};

// left: a quantised image of P patches, in so many bytes; right: one of Q, and the channels of both.
Int8Pair int8_pair(const std::uint8_t* left, std::size_t left_bytes, std::size_t P, const std::uint8_t* right,
                   std::size_t right_bytes, std::size_t Q) {
  const std::size_t padded = (P + zsad::kPanel - 1) / zsad::kPanel * zsad::kPanel;
  const std::size_t bytes_per_patch = padded ? left_bytes / padded : 0;
  // What is not header is codes, so the size tells the channels, rounded up to whole quads.
  const std::size_t channels = std::max(bytes_per_patch, zsad::kHeaderBytes) - zsad::kHeaderBytes;
  const Int8Pair pair{{left, layout_of(P, channels)}, {right, layout_of(Q, channels)}};
  require(left_bytes == pair.left.layout.bytes && right_bytes == pair.right.layout.bytes,
          "left and right must have int8_bytes(P, C) and int8_bytes(Q, C) bytes for P and Q patches");
  return pair;
}

void int8_nearest(const Chunks& left, const Chunks& right, const Output& best_left, const Output& best_right,
                  const std::string& instruction_set) {
  const std::size_t R = left.shape(0), P = best_left.shape(1), Q = best_right.shape(1);
  require(right.shape(0) == R && best_left.shape(0) == R && best_right.shape(0) == R,
          "left, right, best_left and best_right must have a row for each degree");
  require(std::max(P, Q) <= zsad::kMaxKeyPatches, "more patches than a key can name");
  const auto run = int8_nearest_finders.choose(instruction_set);
  std::vector<Int8Pair> pairs;
  for (std::size_t r = 0; r < R; ++r)
    pairs.push_back(int8_pair(left.data() + r * left.shape(1), left.shape(1), P, right.data() + r * right.shape(1),
                              right.shape(1), Q));
  nb::gil_scoped_release release;
  for (std::size_t r = 0; r < R; ++r)
    run(pairs[r].left, pairs[r].right, best_left.data() + r * P, best_right.data() + r * Q);
}

void int8_multiply(const Bytes& left, const Bytes& right, const GramOutput& gram, std::optional<int> apart,
                   const std::string& instruction_set) {
  const std::size_t P = gram.shape(0), Q = gram.shape(1);
  const Int8Pair pair = int8_pair(left.data(), left.shape(0), P, right.data(), right.shape(0), Q);
  const std::ptrdiff_t room = std::ptrdiff_t(pair.right.layout.panels) * zsad::kPanel;
  require(gram.stride(1) == 1 && (P == 1 || gram.stride(0) >= room),
          "gram must be [P, Q] with contiguous rows, each with room for Q rounded up to " +
              std::to_string(zsad::kPanel) + " floats");
  require(!apart || *apart >= 0, "apart must not be negative");
  const int most = apart.value_or(std::numeric_limits<int>::max());
  const auto run = int8_multipliers.choose(instruction_set);
  nb::gil_scoped_release release;
  if (P > 1) return run(pair.left, pair.right, gram.data(), gram.stride(0), most);
  std::vector<float> row(room);  // NumPy before 2 gives a single row the stride 1, whatever room it has
  run(pair.left, pair.right, row.data(), room, most);
  std::copy_n(row.begin(), Q, gram.data());
}

void int8_running_top(const Bytes& left, const Chunks& right, int columns, int first, const Output& values,
                      const NumbersOutput& indices, const std::string& instruction_set,
                      const std::optional<Vector>& margins, int wanted) {
  const std::size_t P = values.shape(0), K = values.shape(1);
  require(K > 0 && has_shape(indices, P, K), "values and indices must be [P, K]");
  require(wanted > 0 && std::size_t(wanted) <= K, "wanted must be 1 to K");
  require(!margins || margins->shape(0) == P, "margins must be [P]");
  const std::size_t padded = (P + zsad::kPanel - 1) / zsad::kPanel * zsad::kPanel;
  const std::size_t bytes_per_patch = padded ? left.shape(0) / padded : 0;
  const std::size_t count = right.shape(0), bytes = right.shape(1);
  const std::size_t Q = bytes_per_patch ? bytes / bytes_per_patch : 0;
  const Int8Pair pair = int8_pair(left.data(), left.shape(0), P, right.data(), bytes, Q);
  const std::size_t room = count * pair.right.layout.patches;
  require(columns > 0 && std::size_t(columns) <= room, "right must have room for the columns");
  const auto run = int8_running_tops.choose(instruction_set);
  const zsad::Kept kept{first,          columns, int(K), values.data(), indices.data(), wanted,
                        margins ? margins->data() : nullptr};
  nb::gil_scoped_release release;
  run(pair.left, pair.right, int(count), kept);
}

zsad::Coordinates coordinates_of(const Matrix& heads, const Vector& terms, const Vector& tails) {
  const std::size_t n = heads.shape(0);
  require(terms.shape(0) == n && tails.shape(0) == n, "heads, terms and tails must be [n, h], [n] and [n]");
  require(heads.shape(1) == zsad::kCoded, "heads must have CODED coordinates");
  return {heads.data(), terms.data(), tails.data()};
}

std::pair<float, float> code_bank(const Matrix& heads, const Vector& terms, const Vector& tails,
                                  const BankCodesOutput& out, const std::string& instruction_set) {
  const std::size_t groups = out.shape(0);
  require(heads.shape(0) == groups * zsad::kGroup && out.shape(1) == zsad::kGroup * zsad::kBankCodes,
          "heads and out must be [groups * GROUP, h] and [groups, GROUP * CODES]");
  require(reinterpret_cast<std::uintptr_t>(out.data()) % 64 == 0, "out must lie on a cache line");
  const auto run = bank_coders.choose(instruction_set);
  const zsad::BankCoding arguments{coordinates_of(heads, terms, tails), int(groups), out.data()};
  nb::gil_scoped_release release;
  const zsad::CodedLengths lengths = run(arguments);
  return {lengths.heads, lengths.errors};
}

zsad::PairLayout pair_layout_of(std::size_t patches, std::size_t head, std::size_t lead) {
  layout_of(patches, head);
  require(lead >= 4 && lead <= 128 && (lead & (lead - 1)) == 0, "lead must be a power of two from 4 to 128");
  require(lead <= head, "head must be at least lead");
  return zsad::PairLayout(int(patches), int(head), int(lead));
}

void bound_image(const Matrix& heads, const Vector& terms, const Vector& tails, int lead, const BytesOutput& out,
                 const std::string& instruction_set) {
  const std::size_t P = heads.shape(0);
  const auto layout = pair_layout_of(P, heads.shape(1), lead);
  require(terms.shape(0) == P && tails.shape(0) == P, "terms and tails must be [P]");
  require(out.shape(0) == layout.bytes, "out must have pair_bytes(P, h, lead) bytes");
  require(reinterpret_cast<std::uintptr_t>(out.data()) % 64 == 0, "out must lie on a cache line");
  const auto run = image_bounders.choose(instruction_set);
  nb::gil_scoped_release release;
  run({heads.data(), terms.data(), tails.data(), layout, out.data()});
}

std::int64_t bounded_pair(const Matrix& left, const Matrix& right, const Bytes& left_bounds, const Bytes& right_bounds,
                          int head, int lead, const FloatsOutput& best_left, const FloatsOutput& best_right,
                          const std::string& instruction_set) {
  const std::size_t P = left.shape(0), Q = right.shape(0), C = left.shape(1);
  require(right.shape(1) == C && best_left.shape(0) == P && best_right.shape(0) == Q,
          "left, right, best_left and best_right must be [P, C], [Q, C], [P] and [Q]");
  require(head > 0 && lead > 0, "head and lead must be at least 1");
  const auto of_left = pair_layout_of(P, head, lead), of_right = pair_layout_of(Q, head, lead);
  require(left_bounds.shape(0) == of_left.bytes && right_bounds.shape(0) == of_right.bytes,
          "bounds must have pair_bytes(P, head, lead) and pair_bytes(Q, head, lead) bytes");
  const auto run = bounded_pairs.choose(instruction_set);
  const zsad::BoundedPair arguments{{left.data(), left_bounds.data(), of_left},
                                    {right.data(), right_bounds.data(), of_right},
                                    int(C), best_left.data(), best_right.data()};
  nb::gil_scoped_release release;
  return run(arguments);
}

std::int64_t bounded_bank(const Matrix& queries, const std::tuple<Matrix, Vector, Vector>& coordinates,
                          const NumberList& queue, const Matrix& squares, const Vector& radii, const Matrix& bank,
                          const std::optional<Vector>& inverse, const Numbers& order, const BankCodes& codes,
                          std::pair<float, float> lengths, int most_taken, const Output& cosines,
                          const IndicesOutput& indices, const FlagsOutput& given_up,
                          const std::optional<Halves>& halves, const std::string& instruction_set) {
  const std::size_t P = queries.shape(0), C = queries.shape(1), M = bank.shape(0), k = cosines.shape(1);
  const std::size_t groups = order.shape(0);
  require(bank.shape(1) == C && (!inverse || inverse->shape(0) == M), "bank must be [M, C] and inverse [M]");
  require(k > 0 && has_shape(cosines, P, k) && has_shape(indices, P, k) && given_up.shape(0) == P,
          "cosines and indices must be [P, k], given_up [P]");
  require(most_taken > 0, "most_taken must be at least 1");
  require(has_shape(squares, P, groups) && radii.shape(0) == groups && has_shape(order, groups, zsad::kGroup) &&
              has_shape(codes, groups, zsad::kGroup * zsad::kBankCodes),
          "squares must be [P, groups], radii [groups], order [groups, GROUP] and codes [groups, GROUP * CODES]");
  require(reinterpret_cast<std::uintptr_t>(codes.data()) % 64 == 0, "codes must lie on a cache line");
  require(!halves || (has_shape(*halves, groups * zsad::kGroup, C) && C % 64 == 0),
          "halves must be [groups * GROUP, C], of a multiple of 64 channels");
  const auto is_query = [&](std::int32_t query) { return query >= 0 && query < std::int64_t(P); };
  require(queue.shape(0) == P && std::all_of(queue.data(), queue.data() + P, is_query),
          "queue must be [P] and hold 0 to P - 1");
  const auto in_bank = [&](std::int32_t index) { return index >= -1 && index < std::int64_t(M); };
  require(std::all_of(order.data(), order.data() + order.size(), in_bank), "order must hold -1 to M - 1");
  const auto& [heads, terms, tails] = coordinates;
  require(heads.shape(0) == P, "heads must be [P, h]");
  const auto run = bounded_banks.choose(instruction_set);
  const zsad::BankSearch arguments{queries.data(),
                                   coordinates_of(heads, terms, tails),
                                   queue.data(),
                                   int(P),
                                   int(C),
                                   codes.data(),
                                   {lengths.first, lengths.second},
                                   int(groups),
                                   squares.data(),
                                   radii.data(),
                                   order.data(),
                                   halves ? halves->data() : nullptr,
                                   bank.data(),
                                   inverse ? inverse->data() : nullptr,
                                   int(k),
                                   most_taken,
                                   cosines.data(),
                                   indices.data(),
                                   given_up.data()};
  nb::gil_scoped_release release;
  return run(arguments);
}

void fp32_product(const Gram& left, const Gram& right, const GramOutput& out) {
  const std::size_t P = left.shape(0), Q = right.shape(0), C = left.shape(1);
  require(right.shape(1) == C && has_shape(out, P, Q), "left, right and out must be [P, C], [Q, C] and [P, Q]");
  const auto has_rows = [](const auto& array) { return array.stride(1) == 1 || array.shape(1) < 2; };
  require(has_rows(left) && has_rows(right) && has_rows(out), "rows must be contiguous");
  const auto run = fp32_products.choose("");
  const zsad::Fp32Product arguments{left.data(), right.data(), left.stride(0), right.stride(0), int(P),
                                    int(Q),      int(C),       out.data(),     out.stride(0)};
  nb::gil_scoped_release release;
  run(arguments);
}

void running_top(const Gram& products, int first, const Output& values, const NumbersOutput& indices,
                 const std::string& instruction_set) {
  const std::size_t P = products.shape(0), K = values.shape(1);
  require(products.stride(1) == 1 || products.shape(1) < 2, "products must be [P, Q] with contiguous rows");
  require(K > 0 && has_shape(values, P, K) && has_shape(indices, P, K), "values and indices must be [P, K]");
  const auto run = running_tops.choose(instruction_set);
  const zsad::Kept kept{first, int(products.shape(1)), int(K), values.data(), indices.data(), int(K), nullptr};
  const zsad::RunningTop arguments{products.data(), products.stride(0), int(P), kept};
  nb::gil_scoped_release release;
  run(arguments);
}

void unit_vectors(const Gram& vectors, const Output& units, const DoublesOutput& lengths,
                  const std::string& instruction_set) {
  const std::size_t N = vectors.shape(0), C = vectors.shape(1);
  require(vectors.stride(1) == 1 || C < 2, "vectors must be [N, C] with contiguous rows");
  require(has_shape(units, N, C) && lengths.shape(0) == N, "units must be [N, C] and lengths [N]");
  const auto run = unit_makers.choose(instruction_set);
  const zsad::UnitVectors arguments{vectors.data(), vectors.stride(0), int(N), int(C), units.data(), lengths.data()};
  nb::gil_scoped_release release;
  run(arguments);
}

void winner_cosines(const Matrix& left, const Features& right, int first, const Numbers& image, const Numbers& patch,
                    const Output& cosines, const std::string& instruction_set) {
  const std::size_t P = left.shape(0), C = left.shape(1), K = image.shape(0);
  require(right.shape(2) == C, "left must be [P, C] and right [B, Q, C]");
  require(has_shape(image, K, P) && has_shape(patch, K, P) && has_shape(cosines, K, P),
          "image, patch and cosines must be [K, P]");
  const auto in_right = [&](std::int32_t q) { return q >= 0 && std::size_t(q) < right.shape(1); };
  require(std::all_of(patch.data(), patch.data() + K * P, in_right),
          "patch must hold numbers of 0 to Q - 1");
  const auto run = winner_kernels.choose(instruction_set);
  const zsad::WinnerCosines arguments{
      left.data(),         right.data(), int(P),       int(right.shape(1)), int(C),        first,
      int(right.shape(0)), int(K),       image.data(), patch.data(),        cosines.data()};
  nb::gil_scoped_release release;
  run(arguments);
}

void measured_best(const Matrix& queries, const Candidates& values, const CandidateNumbers& numbers,
                   const Vector& errors, const Matrix& bank, const std::optional<Vector>& inverse, bool all,
                   const Output& cosines, const IndicesOutput& indices, const FlagsOutput& doubtful,
                   const std::string& instruction_set) {
  const std::size_t Q = queries.shape(0), C = queries.shape(1), M = bank.shape(0), k = cosines.shape(1);
  const std::size_t G = values.shape(0), K = values.shape(2);
  require(bank.shape(1) == C && (!inverse || inverse->shape(0) == M), "bank must be [M, C] and inverse [M]");
  const auto lies = [&](const auto& candidates) {
    return candidates.shape(0) == G && candidates.shape(1) == Q && candidates.shape(2) == K &&
           (K < 2 || candidates.stride(2) == 1) && (Q < 2 || candidates.stride(1) == std::ptrdiff_t(K));
  };
  require(lies(values) && lies(numbers), "values and numbers must be [G, Q, K] with contiguous candidates of a run");
  require(k > 0 && k <= K && cosines.shape(0) == Q && has_shape(indices, Q, k) && errors.shape(0) == Q &&
              doubtful.shape(0) == Q,
          "cosines and indices must be [Q, k] of k up to K, errors and doubtful [Q]");
  for (std::size_t g = 0; g < G; ++g) {
    const std::int32_t* of_run = numbers.data() + g * numbers.stride(0);
    require(std::all_of(of_run, of_run + Q * K, [&](std::int32_t number) { return number < std::int64_t(M); }),
            "numbers must be up to M - 1");
  }
  const auto run = best_measurers.choose(instruction_set);
  const zsad::MeasuredBest arguments{
      queries.data(),   int(Q),         int(C),      values.data(), numbers.data(),
      int(G),           int(K),         values.stride(0), numbers.stride(0), errors.data(),
      bank.data(),      inverse ? inverse->data() : nullptr, all, int(k), cosines.data(),
      indices.data(),   doubtful.data()};
  nb::gil_scoped_release release;
  run(arguments);
}

void rank_sums(const Gram& distances, const NumberList& images, int first, int last, const DoublesOutput& sums,
               const std::string& instruction_set) {
  const std::size_t P = distances.shape(0), n = images.shape(0);
  require(sums.shape(0) == P, "distances must be [P, N] and sums [P]");
  require(first >= 0 && first < last && std::size_t(last) <= n, "ranks must satisfy 0 <= first < last <= images");
  require(std::all_of(images.data(), images.data() + n,
                      [&](std::int32_t j) { return j >= 0 && std::size_t(j) < distances.shape(1); }),
          "images must hold numbers of 0 to N - 1");
  const auto run = rank_summers.choose(instruction_set);
  const zsad::RankSums arguments{distances.data(), distances.stride(0), distances.stride(1), int(P), images.data(),
                                 int(n),           first,               last,                sums.data()};
  nb::gil_scoped_release release;
  run(arguments);
}

using Floats = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using Codes = nb::ndarray<const std::int8_t, nb::c_contig, nb::device::cpu>;
using WindowTokens = nb::ndarray<const std::int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Images = nb::ndarray<const float, nb::ndim<4>, nb::c_contig, nb::device::cpu>;
using Seconds = nb::ndarray<double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using TokensOutput = nb::ndarray<float, nb::ndim<4>, nb::c_contig, nb::device::cpu>;

// An image tower and the arrays that it reads.
class ImageTower {
 public:
  ImageTower(std::pair<int, int> width_and_heads, std::pair<int, int> patch_and_grid, int front, float eps,
             const std::string& activation, bool int8, int blocks,
             const nb::typed<nb::dict, nb::str, nb::object>& arrays)
      : arrays_(arrays) {
    std::tie(tower_.width, tower_.heads) = width_and_heads;
    std::tie(tower_.patch, tower_.grid) = patch_and_grid;
    tower_.front = front;
    tower_.eps = eps;
    tower_.int8 = int8;
    const int C = tower_.width;
    require(C > 0 && tower_.heads > 0 && C % tower_.heads == 0 && C / tower_.heads <= zsad::kMaxHead,
            "heads must divide the width and be at most " + std::to_string(zsad::kMaxHead) + " wide");
    require(tower_.patch > 0 && tower_.grid > 0 && front > 0, "patch, grid and front must be positive");
    require(activation == "gelu" || activation == "quick_gelu" || activation == "swiglu",
            "activation must be gelu, quick_gelu or swiglu");
    tower_.activation = activation == "gelu"         ? zsad::Activation::kGelu
                        : activation == "quick_gelu" ? zsad::Activation::kQuickGelu
                                                     : zsad::Activation::kSwiGlu;
    const std::size_t tokens = front + tower_.grid * tower_.grid;
    tower_.patches = linear("patches", 3 * tower_.patch * tower_.patch, C);
    tower_.positions = floats("positions", tokens * C);
    tower_.pre_norm = arrays_.contains("pre_norm.weight") ? norm("pre_norm") : zsad::Norm{};
    tower_.norm = norm("norm");
    const bool rotary = arrays_.contains("cosine");
    require(!rotary || C / tower_.heads % 2 == 0, "rotary heads must be even");
    tower_.cosine = rotary ? floats("cosine", tokens * (C / tower_.heads / 2)) : nullptr;
    tower_.sine = rotary ? floats("sine", tokens * (C / tower_.heads / 2)) : nullptr;
    for (int i = 0; i < blocks; ++i) add_block("block" + std::to_string(i) + ".");
    arrays_ = nb::dict();  // not those that nobody reads
  }

  int patches() const { return tower_.grid * tower_.grid; }

  void forward(const Images& images, const std::vector<int>& taps, bool normed, const TokensOutput& tokens,
               const std::optional<FeaturesOutput>& patches, const std::optional<Output>& classes, int depth,
               bool only_first, const std::vector<std::pair<WindowTokens, FeaturesOutput>>& windows, int threads,
               const std::string& instruction_set, const std::optional<Seconds>& seconds) const {
    const std::size_t B = images.shape(0), side = std::size_t(tower_.patch) * tower_.grid;
    const std::size_t P = std::size_t(tower_.grid) * tower_.grid, C = tower_.width, L = taps.size();
    require(images.shape(1) == 3 && images.shape(2) == side && images.shape(3) == side, "images must be [B, 3, S, S]");
    require(depth >= 0 && std::size_t(depth) <= tower_.blocks.size(), "depth must be of the tower's blocks");
    require(tokens.shape(0) == B && tokens.shape(1) == L && tokens.shape(2) == P && tokens.shape(3) == C,
            "tokens must be [B, taps, P, C]");
    require(!patches || (has_shape(*patches, B, P) && patches->shape(2) == C), "patches must be [B, P, C]");
    require(!classes || has_shape(*classes, B, C), "classes must be [B, C]");
    require(threads > 0, "there must be a thread");
    require(!seconds || seconds->size() == zsad::kTowerParts, "seconds must have one value for each part");
    zsad::TowerRun run{images.data(), int(B),     depth, threads, {}, classes ? classes->data() : nullptr,
                       only_first,    {}, seconds ? seconds->data() : nullptr};
    for (std::size_t i = 0; i < L; ++i) {
      require(taps[i] >= 0 && taps[i] < depth, "taps must be below depth");
      run.taps.push_back({taps[i], normed, tokens.data() + i * P * C, L * P * C});
    }
    for (const auto& [rows, out] : windows) {
      require(has_shape(out, B, rows.shape(0)) && out.shape(2) == C && rows.shape(0) > 0 && rows.shape(1) > 0,
              "of windows there must be [W, T'] tokens and [B, W, C]");
      for (std::size_t i = 0; i < rows.size(); ++i)
        require(rows.data()[i] >= 0 && std::size_t(rows.data()[i]) < tower_.front + P, "windows must be of tokens");
      run.windows.push_back({int(rows.shape(0)), int(rows.shape(1)), rows.data(), out.data()});
    }
    require(windows.empty() || !tower_.cosine, "windows are not of rotary positions");
    require((depth > 0 || !patches) && (depth > 0 || !classes), "without blocks there are neither patches nor classes");
    if (patches) run.taps.push_back({depth - 1, true, patches->data(), P * C});
    const auto kernel = image_towers.choose(instruction_set);
    nb::gil_scoped_release release;
    kernel(tower_, run);
  }

 private:
  template <typename Array>
  auto read(const std::string& name, std::size_t size) {
    require(arrays_.contains(name.c_str()), "there is no array " + name);
    const Array array = nb::cast<Array>(arrays_[name.c_str()]);
    require(array.size() == size, name + " has another size");
    kept_.append(arrays_[name.c_str()]);
    return array.data();
  }
  const float* floats(const std::string& name, std::size_t size) { return read<Floats>(name, size); }
  zsad::Norm norm(const std::string& name) {
    return {floats(name + ".weight", tower_.width), floats(name + ".bias", tower_.width)};
  }
  zsad::Linear linear(const std::string& name, int inputs, int outputs) {
    const std::size_t filled_outputs = (outputs + zsad::kColumns - 1) / zsad::kColumns * zsad::kColumns;
    zsad::Linear layer{inputs, int(filled_outputs), nullptr, nullptr, nullptr, nullptr, nullptr};
    layer.bias = floats(name + ".bias", filled_outputs);
    if (arrays_.contains((name + ".weight").c_str())) {
      layer.weights = floats(name + ".weight", filled_outputs * inputs);
      return layer;
    }
    require(inputs <= 1 << 16, "the sum of an int8 layer's products might leave 32 bits");
    const std::size_t filled = (inputs + zsad::kFill - 1) / zsad::kFill * zsad::kFill;
    layer.codes = read<Codes>(name + ".codes", filled_outputs * filled);
    layer.scales = floats(name + ".scales", filled_outputs);
    layer.sums = floats(name + ".sums", filled_outputs);
    return layer;
  }
  void add_block(const std::string& name) {
    const int C = tower_.width, wide = tower_.activation == zsad::Activation::kSwiGlu ? 2 : 1;
    require(arrays_.contains((name + "hidden").c_str()), "there is no number " + name + "hidden");
    const int hidden = nb::cast<int>(arrays_[(name + "hidden").c_str()]);
    require(hidden > 0, "hidden must be positive");
    tower_.blocks.push_back({norm(name + "norm1"), norm(name + "norm2"), linear(name + "qkv", C, 3 * C),
                             linear(name + "proj", C, C), linear(name + "fc1", C, wide * hidden),
                             linear(name + "fc2", hidden, C)});
  }

  zsad::Tower tower_;
  nb::dict arrays_;
  nb::list kept_;
};

int jpeg_scan_damage(const nb::bytes& content, int rows, int columns) {
  nb::gil_scoped_release release;
  return int(zsad::scan_damage(static_cast<const std::uint8_t*>(content.data()), content.size(), rows, columns));
}

bool tiff_strip_is_whole(const nb::bytes& strip, int compression, std::size_t wanted) {
  nb::gil_scoped_release release;
  return zsad::strip_is_whole(static_cast<const std::uint8_t*>(strip.data()), strip.size(), compression, wanted);
}

std::vector<std::string> instruction_sets(const std::string& kernel) {
  if (kernel == "bounded_bank") return bounded_banks.names();
  if (kernel == "bounded_pair") return bounded_pairs.names();
  if (kernel == "gram_pass") return gram_passes.names();
  if (kernel == "pool") return poolings.names();
  if (kernel == "fp32_product") return fp32_products.names();
  if (kernel == "image_tower") return image_towers.names();
  if (kernel == "int8") return int8_multipliers.names();
  if (kernel == "measured_best") return best_measurers.names();
  if (kernel == "rank_sums") return rank_summers.names();
  if (kernel == "running_top") return running_tops.names();
  if (kernel == "unit_vectors") return unit_makers.names();
  if (kernel == "winner_cosines") return winner_kernels.names();
  throw std::invalid_argument("no such kernel: " + kernel);
}

}  // namespace

NB_MODULE(_cpu, m) {
  m.attr("MAX_DEGREE") = 2 * zsad::kMaxReach + 1;
  m.attr("MAX_KEY_PATCHES") = zsad::kMaxKeyPatches;
  m.attr("PANEL") = zsad::kPanel;
  m.def("instruction_sets", &instruction_sets, "kernel"_a = "gram_pass",
        "Instruction sets of a kernel (bounded_bank, bounded_pair, fp32_product, gram_pass, image_tower, pool, int8, "
        "measured_best, rank_sums, running_top, unit_vectors, winner_cosines) that build and processor share, fastest "
        "first; fp32_product has one for processors with tiles only.");
  m.attr("GROUP") = zsad::kGroup;
  m.attr("CODES") = zsad::kBankCodes;
  m.attr("CODED") = zsad::kCoded;
  m.attr("WIDEST_HEAD") = zsad::kMaxHead;
  m.def(
      "tower_parts",
      [] {
        return std::vector<std::string>{"linear", "attention", "softmax", "normalisation",
                                        "layout", "other",     "waiting"};
      },
      "What the threads of an image tower spend their time on.");
  nb::class_<ImageTower>(m, "ImageTower", "A vision transformer's image tower over arrays that it keeps.")
      .def(nb::init<std::pair<int, int>, std::pair<int, int>, int, float, const std::string&, bool, int,
                    const nb::typed<nb::dict, nb::str, nb::object>&>(),
           "width_and_heads"_a, "patch_and_grid"_a, "front"_a, "eps"_a, "activation"_a, "int8"_a, "blocks"_a,
           "arrays"_a)
      .def_prop_ro("patches", &ImageTower::patches, "Patches of an image.")
      .def("forward", &ImageTower::forward, "images"_a, "taps"_a, "normed"_a, "tokens"_a, "patches"_a, "classes"_a,
           "depth"_a, "only_first"_a, "windows"_a, "threads"_a, "instruction_set"_a = "", "seconds"_a = nb::none(),
           "Take images [B, 3, S, S] through the first depth blocks: fill tokens [B, taps, P, C] behind those of taps, "
           "through the final norm or as they are, patches [B, P, C] behind the last, through the norm, and classes "
           "[B, C], raw. only_first: of the last block only class tokens are wanted. windows: of each size the tokens "
           "[W, T'] of an image's windows, class token first, and what is filled with their class tokens behind the "
           "last of all blocks, [B, W, C], raw. seconds: one for each of tower_parts, which what a thread spends on it "
           "in the mean is added to.");
  m.def("code_bank", &code_bank, "heads"_a, "terms"_a, "tails"_a, "out"_a, "instruction_set"_a = "",
        "Make codes [groups, GROUP * CODES] of a bank's unit vectors u for bounded_bank, group by group: heads [n, "
        "CODED] are the first coordinates of u - mean in an orthogonal basis, terms [n] are mean . u - |mean|^2 / 2, "
        "tails [n] squares of what heads leave. Returns how long heads are at most, and what codes leave of these.");
  m.def(
      "pair_bytes",
      [](std::size_t patches, std::size_t head, std::size_t lead) { return pair_layout_of(patches, head, lead).bytes; },
      "patches"_a, "head"_a, "lead"_a, "Size of what bound_image makes of so many patches.");
  m.def("bound_image", &bound_image, "heads"_a, "terms"_a, "tails"_a, "lead"_a, "out"_a, "instruction_set"_a = "",
        "Make the bounds of an image's unit vectors u for bounded_pair: heads [P, h] are the first coordinates of u - "
        "mean in an orthogonal basis, those first in which vectors differ most, terms [P] are mean . u - |mean|^2 / 2, "
        "tails [P] squares of what the coordinates leave. lead: of a head, so many coordinates have codes.");
  m.def("bounded_pair", &bounded_pair, "left"_a, "right"_a, "left_bounds"_a, "right_bounds"_a, "head"_a, "lead"_a,
        "best_left"_a, "best_right"_a, "instruction_set"_a = "",
        "Fill best_left [P] and best_right [Q] with the largest product of each unit vector of left [P, C] and of "
        "right [Q, C] with one of the other side, and return how many products that took. Bounds by one mean and basis "
        "tell which.");
  m.def("bounded_bank", &bounded_bank, "queries"_a, "coordinates"_a, "queue"_a, "squares"_a, "radii"_a, "bank"_a,
        "inverse"_a, "order"_a, "codes"_a, "lengths"_a, "most_taken"_a, "cosines"_a, "indices"_a, "given_up"_a,
        "halves"_a = nb::none(), "instruction_set"_a = "",
        "Fill cosines [P, k], descending, and indices [P, k] with the vectors of bank [M, C], of these inverse lengths "
        "[M] or of 1, that are nearest to unit queries [P, C], and return how many products that took. coordinates: "
        "heads, terms and tails of the queries as code_bank takes them; queue: [P] the order in which they come, best "
        "one in which those that follow each other are alike; squares: [P, groups] of the distances from heads to the "
        "centres of groups, and radii [groups] of the spheres around these that hold the heads of groups; order: "
        "[groups, GROUP], the vectors of each group, -1 for none; codes, lengths: of the groups, by code_bank. Of equal "
        "cosines the lower index comes first. given_up [P]: for which more than most_taken products would have been "
        "taken. halves: [groups * GROUP, C] bits of 16-bit floats that are exactly the groups' vectors; read with "
        "AVX-512.");
  m.def(
      "fp32_product_bytes",
      [](int rows, int columns, int channels) { return zsad::Fp32Split(rows, columns, channels).bytes(); }, "rows"_a,
      "columns"_a, "channels"_a, "What a thread keeps for such products.");
  m.def("fp32_product", &fp32_product, "left"_a, "right"_a, "out"_a,
        "Fill out [P, Q] with the dot products of left [P, C] with right [Q, C], as exactly as fp32; ValueError where "
        "the processor has no tiles.");
  m.def("gram_pass", &gram_pass, "gram"_a, "grid"_a, "degrees"_a, "inverse_left"_a, "inverse_right"_a, "best_left"_a,
        "best_right"_a, "keys"_a = false, "window"_a = nb::none(), "narrow"_a = false, "instruction_set"_a = "",
        "Box-filter one Gram for every degree and take the maxima of both directions, as cosines or as keys, of "
        "patches at most window rows and columns apart. narrow: of a Gram that is approximate, in 16 bits where these "
        "are enough.");
  m.def("pool", &pool, "tokens"_a, "grid"_a, "degrees"_a, "zero_length"_a, "inverse"_a, "unit"_a = nb::none(),
        "instruction_set"_a = "",
        "Box-sum tokens [P, C] for every degree: inverse lengths [R, P] and, where wanted, unit features [R, P, C].");
  m.def("index_mask", &zsad::index_mask, "patches"_a, "Bits of a key that hold the winner's patch number.");
  m.def(
      "int8_bytes", [](std::size_t patches, std::size_t channels) { return layout_of(patches, channels).bytes; },
      "patches"_a, "channels"_a, "Size of a quantised image.");
  m.def("int8_quantise", &int8_quantise, "tokens"_a, "mean"_a, "out"_a, "instruction_set"_a = "", "near"_a = false,
        "Quantise layer-normed tokens [P, C] around a mean [C] that all images share, for int8_multiply. near: "
        "products of near tokens are to be the more exact, those of others may be less so.");
  m.def("int8_multiply", &int8_multiply, "left"_a, "right"_a, "gram"_a, "apart"_a = nb::none(),
        "instruction_set"_a = "",
        "Fill the Gram [P, Q] of two quantised images, at least where patches' numbers are at most so far apart.");
  m.def("int8_nearest", &int8_nearest, "left"_a, "right"_a, "best_left"_a, "best_right"_a, "instruction_set"_a = "",
        "Fill best_left [R, P] and best_right [R, Q] with keys of the nearest in the other image, by the products of R "
        "pairs of quantised images of unit vectors, [R, int8_bytes(P, C)] and [R, int8_bytes(Q, C)], without a Gram.");
  m.def("int8_running_top", &int8_running_top, "left"_a, "right"_a, "columns"_a, "first"_a, "values"_a, "indices"_a,
        "instruction_set"_a = "", "margins"_a = nb::none(), "wanted"_a = 1,
        "running_top by the products of a quantised image with several [N, bytes] of as many patches each, without a "
        "Gram; right has room for as many columns. With margins [P] only products larger than the wanted-th largest so "
        "far less its row's margin are taken, which behind those come in any order.");
  m.def("jpeg_scan_damage", &jpeg_scan_damage, "content"_a, "rows"_a, "columns"_a,
        "What is wrong with the scans of a progressive JPEG of this size: 0 nothing, 1 bits end early, 2 bits are left "
        "over, 3 a part is missing, 4 no such code.");
  m.def("measured_best", &measured_best, "queries"_a, "values"_a, "numbers"_a, "errors"_a, "bank"_a, "inverse"_a,
        "all"_a, "cosines"_a, "indices"_a, "doubtful"_a, "instruction_set"_a = "",
        "Fill cosines [Q, k], descending, and indices [Q, k] with the vectors of bank [M, C], of these inverse lengths "
        "[M] or of 1, that are nearest to queries [Q, C] among the candidates of G runs: products values [G, Q, K], "
        "off by up to errors [Q], and numbers [G, Q, K], -1 for none. Of equal ones the lower number comes first. "
        "doubtful [Q]: whether a nearer one may be no candidate; never, where all are.");
  m.def("rank_sums", &rank_sums, "distances"_a, "images"_a, "first"_a, "last"_a, "sums"_a, "instruction_set"_a = "",
        "Fill sums [P] with what the ranks first ... last - 1 of distances [P, N], none of them negative, to the "
        "images [n] add up to.");
  m.def("running_top", &running_top, "products"_a, "first"_a, "values"_a, "indices"_a, "instruction_set"_a = "",
        "Raise the largest values [P, K] of every row, descending, and their columns, by products [P, Q] of the "
        "columns first, first + 1, ...; of equal ones the first to come stays before.");
  m.def("tiff_strip_is_whole", &tiff_strip_is_whole, "strip"_a, "compression"_a, "wanted"_a,
        "Whether a strip of a TIFF, by LZW (5) or PackBits (32773), becomes as many bytes as wanted, and no more.");
  m.def("unit_vectors", &unit_vectors, "vectors"_a, "units"_a, "lengths"_a, "instruction_set"_a = "",
        "Fill units [N, C] with vectors [N, C] divided by their lengths [N], also filled; zero ones stay zero.");
  m.def(
      "winner_cosines", &winner_cosines, "left"_a, "right"_a, "first"_a, "image"_a, "patch"_a, "cosines"_a,
      "instruction_set"_a = "",
      "Dot products [K, P] of unit features with those winners that are among images first, first + 1, ... of right.");
}
