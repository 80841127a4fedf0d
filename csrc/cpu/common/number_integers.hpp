// Numbers for group labels: a group may be called by any integer, and the kernels count from 0.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace fastreward {

// Any integers to 0, 1, ... in first-seen order, through an open-addressing table; returns how many there are. `absent`:
// -1 is no label, and stays.
inline std::int64_t number_integers(const std::int64_t* labels, std::int64_t rows, std::int64_t* index,
                                    bool absent = false) {
  std::size_t slots = 16;
  int bits = 4;
  while (slots < 2 * static_cast<std::size_t>(rows)) slots *= 2, ++bits;
  const std::unique_ptr<std::int64_t[]> first_row(new std::int64_t[slots]);
  std::fill_n(first_row.get(), slots, -1);
  std::int64_t groups = 0;
  for (std::int64_t b = 0; b < rows; ++b) {
    if (absent && labels[b] == -1) {
      index[b] = -1;
      continue;
    }
    auto slot = static_cast<std::size_t>((static_cast<std::uint64_t>(labels[b]) * 0x9E3779B97F4A7C15U) >> (64 - bits));
    while (first_row[slot] >= 0 && labels[first_row[slot]] != labels[b]) slot = (slot + 1) & (slots - 1);
    if (first_row[slot] < 0) {
      first_row[slot] = b;
      index[b] = groups++;
    } else {
      index[b] = index[first_row[slot]];
    }
  }
  return groups;
}

}  // namespace fastreward
