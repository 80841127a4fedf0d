// Divergences between two distributions over the vocabulary: reading both once from memory, and once more for a gradient.
//
// A thread takes a row of both at a time. One pass gives the statistics of each and the moments of both (pair.cpp), of
// which the KLs are made. Others take a second one over what the caches still hold of the row: block by block, the
// log-probs of both as floats in L1, over which the divergence's program runs. The gradient needs the statistics and one
// sum of the forward; where it is a sum of products (the KLs') its kernel is gradient.cpp's, else a program again.
// A log-prob below -10,000 counts as that, so that a forbidden token (-inf) has a cost and a gradient that are finite.
#include "cpu/divergence/divergence.hpp"

#include <cmath>

#include "cpu/common/head_share.hpp"
#include "cpu/divergence/gradient.hpp"
#include "cpu/divergence/pair.hpp"
#include "cpu/program/internal.hpp"
#include "cpu/threads.hpp"

namespace fastreward::FASTREWARD_ISA {
namespace {

using namespace divergence;

template <class T>
void store_gradient(const float* g, int n, T* out) {
  int i = 0;
  for (; i + kF32 <= n; i += kF32) store(out + i, load(g + i));
  if (i < n) store_n(out + i, load_n(g + i, n - i, 0.0f), n - i);
}

// Log-probs of a block at `at`, probabilities a block behind, where they are read.
template <class T>
void tokens(const T* x, int n, const Distribution& d, bool log, bool exp, float* at) {
  const int whole = (n + kF32 - 1) / kF32 * kF32;
  probabilities(whole_vectors(x, n, at), whole, d, log ? at : nullptr, exp ? at + kBlock : nullptr);
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
  PairBuffers buffers() const { return {blocks_.data(), blocks_.data() + kBlock}; }

  // The gradient as a sum of products, for row `row`; each(start, n) after each block.
  template <class S, class T, class Each>
  void products(std::int64_t row, const Distribution& student, const Distribution& teacher, const Gradient& of,
                const Each& each) {
    const S* x = row_of<S>(c_.student, row);
    const T* y = row_of<T>(c_.teacher, row);
    const auto kernel = gradient_kernel(of, student.one && teacher.one);
    const PairBuffers to = buffers();
    for (std::int64_t start = 0; start < c_.student.columns; start += kBlock) {
      const int n = block_size(c_.student.columns, start);
      kernel(whole_vectors(x + start, n, to.x), whole_vectors(y + start, n, to.y), n, student, teacher, of, gradient());
      each(start, n);
    }
  }

  // Runs the program over row `row`; each(start, n) after each block.
  template <class S, class T, class Each>
  void run(std::int64_t row, const Distribution& student, const Distribution& teacher, const Each& each) {
    for (int k = 0; k < c_.code->inputs.size; ++k)
      if (c_.code->inputs[k].level == InputLevel::sequence) numbers_[k] = c_.inputs[k][row];
    const S* x = row_of<S>(c_.student, row);
    const T* y = row_of<T>(c_.teacher, row);
    program_.begin();
    for (std::int64_t start = 0; start < c_.student.columns; start += kBlock) {
      const int n = block_size(c_.student.columns, start);
      tokens(x + start, n, student, c_.log_p >= 0, c_.p >= 0, blocks_.data());
      tokens(y + start, n, teacher, c_.log_q >= 0, c_.q >= 0, blocks_.data() + 2 * kBlock);
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

// A side's part of a row's statistics.
template <class T>
void write_side(const LogprobsRows& in, std::int64_t row, int flags, State state, std::int64_t start, float* values,
                std::int64_t* indices) {
  const T* x = row_of<T>(in, row);
  if (is_column(in, in.labels[row])) state.s[kStateLabel] = static_cast<double>(read(x + in.labels[row]));
  if ((flags & kArgmax) != 0) {
    const std::int64_t first = first_of(x, start, in.columns, static_cast<float>(state.s[kStateMax]));
    state.s[kStateArgmax] = first < in.columns ? static_cast<double>(first) : 0.0;
  }
  write_row(state, inv_temperature_of(in, row), 1.0, flags, values + row, indices + row, in.rows);
}

void write_masked(const LogprobsRows& in, std::int64_t row, float* values, std::int64_t* indices) {
  for (int k = 0; k <= kValueMaxLogit; ++k) values[k * in.rows + row] = 0.0f;
  indices[row] = indices[in.rows + row] = 0;
}

// What one pass has to sum for a call.
int pair_flags(const DivergenceForward& call) {
  int flags = ((call.student_flags | call.teacher_flags) & kEntropy) != 0 ? kOfLogs : 0;
  for (int k = 0; call.moments != nullptr && k < call.in.code->outputs.size; ++k) {
    const DivergenceMoments& m = call.moments[k];
    if (m.relative_p != 0.0) flags |= kOfP;
    if (m.relative_q != 0.0) flags |= kOfQ;
    if (m.log_p != 0.0 || m.log_q != 0.0) flags |= kOfLogs;
  }
  return flags;
}

// A thread's row of the teacher's probabilities and of the differences between both.
struct Differences {
  explicit Differences(std::int64_t columns) : q(columns), between(columns), scratch(columns), blocks(4 * kBlock) {}

  template <class S, class T>
  void fill(const S* x, const T* y, std::int64_t columns, const Distribution& student, const Distribution& teacher) {
    float* p = blocks.data() + kBlock;
    float* other = blocks.data() + 3 * kBlock;
    for (std::int64_t start = 0; start < columns; start += kBlock) {
      const int n = block_size(columns, start);
      tokens(x + start, n, student, false, true, blocks.data());
      tokens(y + start, n, teacher, false, true, blocks.data() + 2 * kBlock);
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
  const LogprobsRows &x = in.student, &y = in.teacher;
  const std::int64_t n = x.rows;
  const int flags = pair_flags(call);
  by_dtypes(in, [&](auto student, auto teacher) {
    using S = Element<decltype(student)>;
    using T = Element<decltype(teacher)>;
    for_rows(in, [&](Rows& rows, std::int64_t row) {
      if (!row_counts(x, row)) {
        for (int k = 0; k < in.code->outputs.size; ++k) call.outputs[k][row] = 0.0f;
        if (call.known) return;
        write_masked(x, row, call.student_values, call.student_indices);
        return write_masked(y, row, call.teacher_values, call.teacher_indices);
      }
      if (!call.known) {
        const PairScale scale = pair_scale(inv_temperature_of(x, row), inv_temperature_of(y, row));
        const Pair pair = scan_pair(row_of<S>(x, row), row_of<T>(y, row), x.columns, scale, flags, rows.buffers());
        write_side<S>(x, row, call.student_flags, state_of(pair.sums.x, pair.sums.x_log, scale.x, pair.x_max),
                      pair.x_start, call.student_values, call.student_indices);
        write_side<T>(y, row, call.teacher_flags, state_of(pair.sums.y, pair.sums.y_log, scale.y, pair.y_max),
                      pair.y_start, call.teacher_values, call.teacher_indices);
        if (call.moments != nullptr && !pair.far) {
          for (int k = 0; k < in.code->outputs.size; ++k)
            call.outputs[k][row] = static_cast<float>(by_moments(call.moments[k], pair, scale));
          return;
        }
      }
      rows.template run<S, T>(row, distribution(x, row, call.student_values + row, n),
                              distribution(y, row, call.teacher_values + row, n), [](std::int64_t, int) {});
      for (int k = 0; k < in.code->outputs.size; ++k) call.outputs[k][row] = rows.result(k);
    });
  });
}

void divergence_backward(const DivergenceBackward& call) {
  const DivergenceRows& in = call.in;
  const std::int64_t n = in.student.rows;
  by_dtypes(in, [&](auto student, auto teacher) {
    using S = Element<decltype(student)>;
    using T = Element<decltype(teacher)>;
    for_rows(in, [&](Rows& rows, std::int64_t row) {
      S* out = static_cast<S*>(call.grad_logits) + row * call.grad_stride;
      if (!row_counts(in.student, row)) {
        __builtin_memset(static_cast<void*>(out), 0, static_cast<std::size_t>(in.student.columns) * sizeof(S));
        return;
      }
      const std::int64_t label = call.label_gradients == nullptr ? -1 : in.student.labels[row];
      const auto each = [&](std::int64_t start, int size) {
        if (label >= start && label < start + size) rows.gradient()[label - start] += call.label_gradients[row];
        store_gradient(rows.gradient(), size, out + start);
      };
      const Distribution p = distribution(in.student, row, call.student_values + row, n);
      const Distribution q = distribution(in.teacher, row, call.teacher_values + row, n);
      if (call.terms.size == 0) return rows.template run<S, T>(row, p, q, each);
      rows.template products<S, T>(row, p, q, gradient_of(call, row), each);
    });
  });
}

}  // namespace fastreward::FASTREWARD_ISA
