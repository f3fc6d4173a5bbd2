// Python binding of the CPU pass; chooses the instruction set at run time.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "tile_pass.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

// Fastest first.
std::vector<std::pair<std::string, zsad::TilePassFunction>> available() {
  std::vector<std::pair<std::string, zsad::TilePassFunction>> found;
#ifdef ZSAD_HAS_avx512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
    found.emplace_back("avx512", zsad::tile_pass_avx512);
#endif
#ifdef ZSAD_HAS_avx2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.emplace_back("avx2", zsad::tile_pass_avx2);
#endif
  found.emplace_back("portable", zsad::tile_pass_portable);
  return found;
}

using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Tile = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;

void tile_pass(const Tile& gram, std::pair<int, int> grid, const std::vector<int>& degrees, const Matrix& inverse_left,
               const Matrix& inverse_right, const Output& best_left, const Output& best_right,
               const std::string& instruction_set) {
  const std::size_t P = std::size_t(grid.first) * grid.second, R = degrees.size();
  if (grid.first < 1 || grid.second < 1 || gram.shape(0) != P || gram.shape(1) != P || gram.stride(1) != 1)
    throw std::invalid_argument("gram must be [P, P] with contiguous rows and P = rows * columns of the grid");
  if (R == 0) throw std::invalid_argument("at least one degree is needed");
  for (int degree : degrees)
    if (degree < 1 || degree % 2 == 0 || degree / 2 > zsad::kMaxReach)
      throw std::invalid_argument("degrees must be odd and at most " + std::to_string(2 * zsad::kMaxReach + 1));
  for (auto shape : {std::pair{inverse_left.shape(0), inverse_left.shape(1)},
                     std::pair{inverse_right.shape(0), inverse_right.shape(1)},
                     std::pair{best_left.shape(0), best_left.shape(1)},
                     std::pair{best_right.shape(0), best_right.shape(1)}})
    if (shape.first != R || shape.second != P) throw std::invalid_argument("inverse lengths and maxima must be [R, P]");

  static const auto sets = available();
  zsad::TilePassFunction run = nullptr;
  for (const auto& set : sets)
    if (instruction_set.empty() || set.first == instruction_set) {
      run = set.second;
      break;
    }
  if (!run) throw std::invalid_argument("instruction set not available here: " + instruction_set);

  const zsad::TilePass arguments{gram.data(),          gram.stride(0),       grid.first,       grid.second,
                                 degrees.data(),       int(R),               inverse_left.data(), inverse_right.data(),
                                 best_left.data(),     best_right.data()};
  nb::gil_scoped_release release;
  run(arguments);
}

}  // namespace

NB_MODULE(_cpu, m) {
  m.attr("MAX_DEGREE") = 2 * zsad::kMaxReach + 1;
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const auto& set : available()) names.push_back(set.first);
    return names;
  }, "Instruction sets this build and this processor share, fastest first.");
  m.def("tile_pass", &tile_pass, "gram"_a, "grid"_a, "degrees"_a, "inverse_left"_a, "inverse_right"_a, "best_left"_a,
        "best_right"_a, "instruction_set"_a = "",
        "Box-filter one Gram tile for every degree and take the maxima of both directions.");
}
