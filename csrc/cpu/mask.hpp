// How many positions of a mask count.
#pragma once

#include <cstdint>

#include "cpu/common/isa.hpp"
#include "cpu/common/mask.hpp"

FASTREWARD_DECLARE(std::int64_t mask_count(const ::fastreward::MaskView& mask, std::int64_t positions, int threads);)
