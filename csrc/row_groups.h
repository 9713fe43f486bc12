// How matrix products for one instruction set go through their rows and outputs.
//
// Like the other headers that files of one instruction set share, all of it is in an anonymous
// namespace: the linker merges nothing of it with another set's copy.
#pragma once

#include <cstdint>

#include "gemm.h"

namespace kt {
namespace {

// A tile of registers: some rows from row index i on, times some panels from output j on.
template <typename arguments>
using tile_of = void(const arguments& args, int64_t i, int64_t j);
using tile_fn = tile_of<gemm_args>;

// All rows at output j; tiles[r - 1] takes r rows. Groups are of equal size as far as possible:
// with tiles of at most 6 rows, 7 rows are 4 + 3, not 6 + 1.
template <typename arguments, int most>
void in_row_groups(const arguments& args, int64_t j, tile_of<arguments>* const (&tiles)[most]) {
  int64_t groups = (args.m + most - 1) / most;
  for (int64_t i = 0; i < args.m; --groups) {
    const int64_t rows = (args.m - i + groups - 1) / groups;
    tiles[rows - 1](args, i, j);
    i += rows;
  }
}

// All outputs, one panel at a time.
template <typename arguments, int most>
[[maybe_unused]] void by_panel(const arguments& args, tile_of<arguments>* const (&tiles)[most]) {
  for (int64_t j = 0; j < args.n; j += panel_outputs) in_row_groups(args, j, tiles);
}

// All outputs, two panels at a time where one tile takes all rows so.
template <int most, int most_of_two>
[[maybe_unused]] void by_panel_or_two(const gemm_args& args, tile_fn* const (&one)[most],
                                      tile_fn* const (&two)[most_of_two]) {
  if (args.m > most_of_two) return by_panel(args, one);
  for (int64_t j = 0; j < args.n; j += 2 * panel_outputs) two[args.m - 1](args, 0, j);
}

// All outputs, four panels at a time and two where four are too many.
template <int most>
[[maybe_unused]] void by_four_panels(const gemm_args& args, tile_fn* const (&four)[most],
                                     tile_fn* const (&two)[most]) {
  constexpr int64_t wide = 4 * panel_outputs;
  int64_t j = 0;
  for (; j + wide <= args.n; j += wide) in_row_groups(args, j, four);
  for (; j < args.n; j += gemm_n_multiple) in_row_groups(args, j, two);
}

}  // namespace
}  // namespace kt
