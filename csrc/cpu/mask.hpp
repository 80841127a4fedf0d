// How many positions of a mask count, in all or by row, and whether it is one of zeros and ones.
#pragma once

#include <cstdint>

#include "cpu/common/isa.hpp"
#include "cpu/common/mask.hpp"

FASTREWARD_DECLARE(std::int64_t mask_count(const ::fastreward::MaskView& mask, std::int64_t positions, int threads);)

// Whether all of a mask [rows, columns] is 0 or 1. flags: where it is written as bytes of 0 and 1; counts [rows]: the
// positions of each row that are not 0; either may be nullptr, and means nothing where the answer is no.
FASTREWARD_DECLARE(bool mask_flags(const ::fastreward::MaskView& mask, std::int64_t rows, std::int64_t columns,
                                   std::uint8_t* flags, float* counts, int threads);)
