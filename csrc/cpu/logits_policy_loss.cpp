// Logits to the gradient of a policy loss, each logit read once from memory and its gradient written once.
//
// A row of logits fits the core's own cache (608 KiB for 151,936 floats), so a thread takes a row at a time: its
// statistics (logprobs_forward), the loss's gradient for this one token (a program without reductions), and the row's
// gradient (logprobs_backward), whose reading then comes from the cache. What is computed is what the three do apart.
#include "cpu/logits_policy_loss.hpp"

#include "cpu/logprobs/rows.hpp"
#include "cpu/program/internal.hpp"
#include "cpu/threads.hpp"

namespace fastreward::FASTREWARD_ISA {
namespace {

using namespace logprobs;

// The one row `row` of the call.
LogprobsRows row_alone(const LogprobsRows& in, std::int64_t row) {
  LogprobsRows one = in;
  const std::int64_t itemsize = in.dtype == DType::f32 ? 4 : 2;
  one.rows = 1;
  one.threads = 1;
  one.logits = static_cast<const char*>(in.logits) + row * in.row_stride * itemsize;
  one.labels = in.labels + row;
  if (in.inv_temperature != nullptr) one.inv_temperature = in.inv_temperature + row * in.inv_temperature_stride;
  if (in.mask != nullptr) one.mask = in.mask + row;
  return one;
}

class Rows {
 public:
  explicit Rows(const LogitsPolicyLoss& call)
      : c_(call),
        sources_(call.code->inputs.size),
        exponentials_(keeps(call) ? call.in.columns : 0),
        maxima_(keeps(call) ? logprobs_blocks(call.in.columns) : 0),
        program_(*call.code, call.scalars) {}

  void run(std::int64_t row) {
    const LogprobsRows one = row_alone(c_.in, row);
    float values[8] = {}, upstream[8] = {};
    const bool counted = row_counts(one, 0);
    if (counted) {
      statistics(one, values);
      gradient(row, values, upstream);
    }
    c_.logprobs[row] = values[kValueLogprob];
    if (c_.entropies != nullptr) c_.entropies[row] = values[kValueEntropy];
    write(one, row, values, upstream);
  }

 private:
  void statistics(const LogprobsRows& one, float* values) const {
    std::int64_t indices[2];
    LogprobsForward call;
    call.in = one;
    call.flags = c_.entropies != nullptr ? kEntropy : 0;
    call.values = values;
    call.indices = indices;
    if (keeps(c_)) call.exponentials = exponentials_.data(), call.block_maxima = maxima_.data();
    logprobs_forward(call);
  }

  void gradient(std::int64_t row, const float* values, float* upstream) {
    for (int k = 0; k < sources_size(); ++k) sources_[k] = c_.inputs[k] + row;
    if (c_.logprob >= 0) sources_[c_.logprob] = values + kValueLogprob;
    if (c_.entropy >= 0) sources_[c_.entropy] = values + kValueEntropy;
    float gradients[2] = {};
    program_.run(sources_.data(), gradients);
    if (c_.logprob_gradient >= 0) upstream[kValueLogprob] = gradients[c_.logprob_gradient] * c_.scale;
    if (c_.entropy_gradient >= 0) upstream[kValueEntropy] = gradients[c_.entropy_gradient] * c_.scale;
  }

  void write(const LogprobsRows& one, std::int64_t row, const float* values, const float* upstream) const {
    const std::int64_t itemsize = one.dtype == DType::f32 ? 4 : 2;
    ColumnGradient column;
    LogprobsBackward call;
    call.in = one;
    call.values = values;
    call.grad_values = upstream;
    call.grad_logits = static_cast<char*>(c_.grad_logits) + row * c_.grad_stride * itemsize;
    call.grad_stride = c_.grad_stride;
    call.columns = &column;
    if (keeps(c_) && row_counts(one, 0)) call.exponentials = exponentials_.data(), call.block_maxima = maxima_.data();
    call.total_bytes = c_.in.rows * c_.in.columns * itemsize;
    logprobs_backward(call);
  }

  // Half the bytes of f32 are half the time in memory, and exponentials would take longer: they are kept for the second
  // sweep, as floats, still in the core's own cache. Rows of f32 would fill it, and are at the memory's limit as it is.
  static bool keeps(const LogitsPolicyLoss& call) {
    return call.in.dtype != DType::f32 && call.entropy_gradient < 0 && call.in.columns <= kKept;
  }

  int sources_size() const { return c_.code->inputs.size; }

  const LogitsPolicyLoss& c_;
  static constexpr std::int64_t kKept = std::int64_t{1} << 18;  // columns: a megabyte of floats

  program::Buffer<const float*> sources_;
  program::Buffer<float> exponentials_;
  program::Buffer<double> maxima_;
  program::TokenProgram program_;
};

}  // namespace

// -------------------------------------------------------------------------------------------------------- launcher
void logits_policy_loss(const LogitsPolicyLoss& call) {
  const auto make = [&] { return Rows(call); };
  const PerSlot rows(call.in.threads, make);
  parallel_for(call.in.rows, call.in.threads, row_grain(call.in),
               [&](std::int64_t row, int slot) { rows[slot].run(row); });
}

}  // namespace fastreward::FASTREWARD_ISA
