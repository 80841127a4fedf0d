// Divergences by moments and their gradients by products, on arrays of exactly the size that may be touched.
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "checks.hpp"
#include "cpu/common/isa.hpp"
#include "cpu/divergence/divergence.hpp"

namespace {

namespace fr = fastreward;

// A program without instructions, for kernels that do not run it: an output, and an input per row.
struct Code {
  fr::TokenStep step;
  fr::ProgramStage stage;
  fr::ProgramInput upstream{fr::InputLevel::sequence, -1};
  fr::SequencePlace output;
  fr::ProgramCode code;

  explicit Code(fr::SequencePlace place) : output(place) {
    stage.tokens = {&step, 1};
    code.numbers = code.columns = 1;
    code.inputs = {&upstream, 1};
    code.stages = {&stage, 1};
    code.outputs = {&output, 1};
  }
};

fr::LogprobsRows side(const std::vector<float>& logits, std::int64_t rows, const std::vector<std::int64_t>& labels,
                      double inverse) {
  fr::LogprobsRows in;
  in.logits = logits.data();
  in.rows = rows, in.columns = in.row_stride = static_cast<std::int64_t>(logits.size()) / rows;
  in.labels = labels.data();
  in.inv_temperature_scalar = inverse;
  in.threads = 2;
  return in;
}

std::vector<double> log_probs(const float* x, std::int64_t n, double inverse) {
  double top = -std::numeric_limits<double>::infinity(), sum = 0.0;
  for (std::int64_t i = 0; i < n; ++i) top = std::fmax(top, static_cast<double>(x[i]));
  for (std::int64_t i = 0; i < n; ++i) sum += std::exp((static_cast<double>(x[i]) - top) * inverse);
  std::vector<double> found;
  for (std::int64_t i = 0; i < n; ++i)
    found.push_back(std::fmax(-1e4, (static_cast<double>(x[i]) - top) * inverse - std::log(sum)));
  return found;
}

CASE(reverse_kl_and_its_gradient) {
  constexpr std::int64_t kRows = 3;
  for (const std::int64_t columns : {1, 5, 8, 2048, 4099})
    for (const double inverse : {1.0, 0.8}) {
      std::mt19937 random(static_cast<unsigned>(columns));
      std::normal_distribution<float> normal(0.0f, 2.0f);
      std::vector<float> x(static_cast<std::size_t>(kRows * columns)), y(x.size()), gradient(x.size());
      for (std::size_t i = 0; i < x.size(); ++i) x[i] = normal(random), y[i] = normal(random);
      if (columns > 1) y[static_cast<std::size_t>(columns)] = -std::numeric_limits<float>::infinity();
      const std::vector<std::int64_t> labels(kRows, columns - 1);
      std::vector<float> values(8 * kRows), teacher_values(8 * kRows), outputs(kRows);
      std::vector<std::int64_t> indices(2 * kRows), teacher_indices(2 * kRows);
      const std::vector<float> upstream{1.0f, -2.0f, 0.5f};
      const float* inputs[] = {upstream.data()};
      const Code whole(0), each(fr::kTokenOutput);
      fr::DivergenceRows in;
      in.student = side(x, kRows, labels, inverse), in.teacher = side(y, kRows, labels, inverse);
      in.inputs = inputs;
      float* results[] = {outputs.data()};
      const fr::DivergenceMoments moments{1.0, 0.0, 0.0, 0.0, 0.0};
      fr::DivergenceForward forward;
      forward.in = in, forward.in.code = &whole.code;
      forward.moments = &moments;
      forward.student_flags = forward.teacher_flags = fr::kEntropy | fr::kArgmax;
      forward.student_values = values.data(), forward.teacher_values = teacher_values.data();
      forward.student_indices = indices.data(), forward.teacher_indices = teacher_indices.data();
      forward.outputs = results;
      FASTREWARD_DISPATCH(divergence_forward)(forward);

      // upstream (p log p - p log q)
      const int of[] = {0};
      const fr::DivergenceTerm terms[] = {{fr::DivergenceProduct::p_log_p, 1.0, {of, 1}},
                                          {fr::DivergenceProduct::p_log_q, -1.0, {of, 1}}};
      fr::DivergenceBackward backward;
      backward.in = in, backward.in.code = &each.code;
      backward.terms = {terms, 2};
      backward.student_values = values.data(), backward.teacher_values = teacher_values.data();
      backward.grad_logits = gradient.data(), backward.grad_stride = columns;
      FASTREWARD_DISPATCH(divergence_backward)(backward);

      for (std::int64_t row = 0; row < kRows; ++row) {
        const auto p = log_probs(x.data() + row * columns, columns, inverse);
        const auto q = log_probs(y.data() + row * columns, columns, inverse);
        double sum = 0.0;
        for (std::size_t i = 0; i < p.size(); ++i) {
          const double term = std::exp(p[i]) * (p[i] - q[i]);
          const auto got = static_cast<double>(gradient[static_cast<std::size_t>(row * columns) + i]);
          const double want = term * static_cast<double>(upstream[static_cast<std::size_t>(row)]);
          CHECK(std::fabs(got - want) <= 2e-6 * (1.0 + std::fabs(want)));
          sum += term;
        }
        const auto got = static_cast<double>(outputs[static_cast<std::size_t>(row)]);
        CHECK(std::fabs(got - sum) <= 1e-6 * (1.0 + std::fabs(sum)));
      }
    }
}

}  // namespace
