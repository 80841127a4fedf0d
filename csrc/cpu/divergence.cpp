// Divergences between two distributions over the vocabulary: reading both once from memory, and once more for a gradient.
//
// A thread takes a row of both at a time, which its own caches hold: first the statistics of each (logprobs_forward),
// then, block by block, the log-probs of both as floats in L1, over which the divergence's program runs. The gradient
// needs the statistics and one sum of the forward, so its program writes it block by block where the logits were read.
// A log-prob below -10,000 counts as that, so that a forbidden token (-inf) has a cost and a gradient that are finite.
#include "cpu/divergence.hpp"

#include <cmath>

#include "cpu/common/head_share.hpp"
#include "cpu/logprobs/rows.hpp"
#include "cpu/program/internal.hpp"
#include "cpu/threads.hpp"

namespace fastreward::FASTREWARD_ISA {
namespace {

using namespace simd;
using namespace logprobs;

constexpr float kLowest = -1e4f;
constexpr int kBlock = static_cast<int>(kProgramChunk);

// A row's log-probs, (x - middle) * scale + top, and probabilities, exp((x - middle) * temperature's inverse) * peak.
struct Distribution {
  F32 middle, scale, top, peak;
  ExpScale exponent;
};

// From values [8, rows] at `row`.
Distribution distribution(const LogprobsRows& in, std::int64_t row, const float* values, std::int64_t stride) {
  const double least = 1e-37, most = 1e37, inverse = inv_temperature_of(in, row);
  const double scale = inverse < least ? least : inverse > most ? most : inverse;  // neither 0 * -inf nor 0 * inf
  const float top = values[kValueMaxLogprob * stride];
  return {f32(values[kValueMaxLogit * stride]), f32(static_cast<float>(scale)), f32(top),
          f32(static_cast<float>(std::exp(static_cast<double>(top)))), exp_scale(inverse)};
}

// Log-probs of n columns, and probabilities where they are read; blocks have room for whole vectors.
template <class T, bool kLog, bool kExp>
void probabilities(const T* x, int n, const Distribution& of, float* log, float* exp) {
  const Distribution d = of;
  const F32 lowest = f32(kLowest);
  const auto put = [&](F32 v, int i) {
    const F32 below = v - d.middle;
    if (kLog) store(log + i, max(lowest, fma(below, d.scale, d.top)));
    if (kExp) store(exp + i, exp_scaled(clamp_exponent(below, d.exponent), d.exponent) * d.peak);
  };
  int i = 0;
  for (; i + 2 * kF32 <= n; i += 2 * kF32) {
    put(load(x + i), i);
    put(load(x + i + kF32), i + kF32);
  }
  for (; i < n; i += kF32) put(n - i < kF32 ? load_n(x + i, n - i, 0.0f) : load(x + i), i);
}

template <class T>
void probabilities(const T* x, int n, const Distribution& d, bool log, bool exp, float* at) {
  if (log && exp) probabilities<T, true, true>(x, n, d, at, at + kBlock);
  else if (log) probabilities<T, true, false>(x, n, d, at, nullptr);
  else if (exp) probabilities<T, false, true>(x, n, d, nullptr, at + kBlock);
}

template <class T>
void store_gradient(const float* g, int n, T* out) {
  int i = 0;
  for (; i + kF32 <= n; i += kF32) store(out + i, load(g + i));
  if (i < n) store_n(out + i, load_n(g + i, n - i, 0.0f), n - i);
}

// The one row `row`.
LogprobsRows row_alone(const LogprobsRows& in, std::int64_t row) {
  LogprobsRows one = in;
  const std::int64_t itemsize = in.dtype == DType::f32 ? 4 : 2;
  one.rows = 1;
  one.threads = 1;
  one.logits = static_cast<const char*>(in.logits) + row * in.row_stride * itemsize;
  one.labels = in.labels + row;
  if (in.inv_temperature != nullptr) one.inv_temperature = in.inv_temperature + row * in.inv_temperature_stride;
  one.mask = nullptr;
  return one;
}

// A thread's program and the memory that it reads and writes.
class Rows {
 public:
  explicit Rows(const DivergenceRows& call)
      : c_(call),
        blocks_(5 * kBlock),
        places_(call.code->inputs.size),
        numbers_(call.code->inputs.size),
        results_(call.code->outputs.size),
        outputs_(call.code->outputs.size),
        program_(place(), call.scalars, places_.data(), outputs_.data()) {}

  float* gradient() const { return blocks_.data() + 4 * kBlock; }

  // Runs the program over row `row`; each(start, n) after each block.
  template <class S, class T, class Each>
  void run(std::int64_t row, const Distribution& student, const Distribution& teacher, const Each& each) {
    for (int k = 0; k < c_.code->inputs.size; ++k)
      if (c_.code->inputs[k].level == InputLevel::sequence) numbers_[k] = c_.inputs[k][row];
    const S* x = row_of<S>(c_.student, row);
    const T* y = row_of<T>(c_.teacher, row);
    program_.begin();
    for (std::int64_t start = 0; start < c_.student.columns; start += kBlock) {
      const std::int64_t rest = c_.student.columns - start;
      const int n = rest < kBlock ? static_cast<int>(rest) : kBlock;
      probabilities(x + start, n, student, c_.log_p >= 0, c_.p >= 0, blocks_.data());
      probabilities(y + start, n, teacher, c_.log_q >= 0, c_.q >= 0, blocks_.data() + 2 * kBlock);
      program_.block(n);
      each(start, n);
    }
    program_.end();
  }

  float result(int k) const { return results_[k]; }

 private:
  const ProgramCode& place() {
    const ProgramCode& code = *c_.code;
    __builtin_memset(blocks_.data(), 0, 5 * kBlock * sizeof(float));
    for (int k = 0; k < code.inputs.size; ++k) places_[k] = numbers_.data() + k;
    const int made[] = {c_.log_p, c_.p, c_.log_q, c_.q};
    for (int k = 0; k < 4; ++k)
      if (made[k] >= 0) places_[made[k]] = blocks_.data() + k * kBlock;
    for (int k = 0; k < code.outputs.size; ++k)
      outputs_[k] = code.outputs[k] == kTokenOutput ? gradient() : results_.data() + k;
    return code;
  }

  const DivergenceRows& c_;
  program::Buffer<float> blocks_;  // log-probs and probabilities of the student, those of the teacher, gradient
  program::Buffer<const float*> places_;
  program::Buffer<float> numbers_, results_;
  program::Buffer<float*> outputs_;
  program::BlockProgram program_;
};

// f(pointers of the element types) for the dtypes of both sides.
template <class F>
void by_dtypes(const DivergenceRows& in, const F& f) {
  by_dtype(in.student.dtype, [&](auto student) {
    by_dtype(in.teacher.dtype, [&](auto teacher) { f(student, teacher); });
  });
}
template <class T>
using Element = std::remove_cv_t<std::remove_pointer_t<T>>;

// rows.run for each row, by whichever thread is free.
template <class F>
void for_rows(const DivergenceRows& in, const F& f) {
  const auto make = [&] { return Rows(in); };
  const PerSlot rows(in.student.threads, make);
  parallel_for(in.student.rows, in.student.threads, row_grain(in.student),
               [&](std::int64_t row, int slot) { f(rows[slot], row); });
}

void statistics(const LogprobsRows& in, std::int64_t row, int flags, float* values, std::int64_t* indices) {
  float own[8] = {};
  std::int64_t places[2] = {};
  if (row_counts(in, row)) {
    LogprobsForward call;
    call.in = row_alone(in, row);
    call.flags = flags;
    call.values = own;
    call.indices = places;
    logprobs_forward(call);
  }
  for (int k = 0; k < 8; ++k) values[k * in.rows + row] = own[k];
  for (int k = 0; k < 2; ++k) indices[k * in.rows + row] = places[k];
}

// A thread's row of the teacher's probabilities and of the differences between both.
struct Differences {
  explicit Differences(std::int64_t columns) : q(columns), between(columns), scratch(columns), blocks(4 * kBlock) {}

  template <class S, class T>
  void fill(const S* x, const T* y, std::int64_t columns, const Distribution& student, const Distribution& teacher) {
    float* p = blocks.data() + kBlock;
    float* other = blocks.data() + 3 * kBlock;
    for (std::int64_t start = 0; start < columns; start += kBlock) {
      const std::int64_t rest = columns - start;
      const int n = rest < kBlock ? static_cast<int>(rest) : kBlock;
      probabilities(x + start, n, student, false, true, blocks.data());
      probabilities(y + start, n, teacher, false, true, blocks.data() + 2 * kBlock);
      for (int i = 0; i < n; ++i) {
        q[start + i] = other[i];
        between[start + i] = __builtin_fabsf(p[i] - other[i]);
      }
    }
  }

  program::Buffer<float> q, between, scratch, blocks;
};

}  // namespace

// ------------------------------------------------------------------------------------------------------- launchers
void divergence_head_share(const DivergenceHeadShare& call) {
  const LogprobsRows &x = call.student, &y = call.teacher;
  const std::int64_t columns = x.columns;
  const auto make = [&] { return Differences(columns); };
  const PerSlot rows(x.threads, make);
  by_dtype(x.dtype, [&](auto student) {
    by_dtype(y.dtype, [&](auto teacher) {
      parallel_for(x.rows, x.threads, row_grain(x), [&](std::int64_t row, int slot) {
        call.shares[row] = 0.0f;
        if (!row_counts(x, row)) return;
        Differences& own = rows[slot];
        own.fill(row_of<Element<decltype(student)>>(x, row), row_of<Element<decltype(teacher)>>(y, row), columns,
                 distribution(x, row, call.student_values + row, x.rows),
                 distribution(y, row, call.teacher_values + row, x.rows));
        call.shares[row] = static_cast<float>(
            head_share(own.q.data(), own.between.data(), own.scratch.data(), columns, call.alpha));
      });
    });
  });
}

void divergence_forward(const DivergenceForward& call) {
  const DivergenceRows& in = call.in;
  const std::int64_t n = in.student.rows;
  by_dtypes(in, [&](auto student, auto teacher) {
    for_rows(in, [&](Rows& rows, std::int64_t row) {
      if (!call.known) {
        statistics(in.student, row, call.student_flags, call.student_values, call.student_indices);
        statistics(in.teacher, row, call.teacher_flags, call.teacher_values, call.teacher_indices);
      }
      const bool counts = row_counts(in.student, row);
      if (counts)
        rows.template run<Element<decltype(student)>, Element<decltype(teacher)>>(
            row, distribution(in.student, row, call.student_values + row, n),
            distribution(in.teacher, row, call.teacher_values + row, n), [](std::int64_t, int) {});
      for (int k = 0; k < in.code->outputs.size; ++k) call.outputs[k][row] = counts ? rows.result(k) : 0.0f;
    });
  });
}

void divergence_backward(const DivergenceBackward& call) {
  const DivergenceRows& in = call.in;
  const std::int64_t n = in.student.rows;
  by_dtypes(in, [&](auto student, auto teacher) {
    using S = Element<decltype(student)>;
    for_rows(in, [&](Rows& rows, std::int64_t row) {
      S* out = static_cast<S*>(call.grad_logits) + row * call.grad_stride;
      if (!row_counts(in.student, row)) {
        __builtin_memset(static_cast<void*>(out), 0, static_cast<std::size_t>(in.student.columns) * sizeof(S));
        return;
      }
      const std::int64_t label = call.label_gradients == nullptr ? -1 : in.student.labels[row];
      rows.template run<S, Element<decltype(teacher)>>(
          row, distribution(in.student, row, call.student_values + row, n),
          distribution(in.teacher, row, call.teacher_values + row, n), [&](std::int64_t start, int size) {
            if (label >= start && label < start + size) rows.gradient()[label - start] += call.label_gradients[row];
            store_gradient(rows.gradient(), size, out + start);
          });
    });
  });
}

}  // namespace fastreward::FASTREWARD_ISA
