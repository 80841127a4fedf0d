// How much of the difference between two distributions lies in the head of one: the weight of an adaptive KL.
#pragma once

#include <cstdint>

namespace fastreward {

// The tail is the tokens that, from the least likely on (those of one probability in their order), have at most `alpha`
// of q's mass together. Returns the head's share of the sum of |p - q|, 1/2 of none, NaN where q has one.
// differences: |p - q|; scratch: room for n.
double head_share(const float* q, const float* differences, float* scratch, std::int64_t n, double alpha);

}  // namespace fastreward
