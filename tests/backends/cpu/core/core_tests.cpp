// The C++ core without Python, run under ASan + UBSan (CMake preset `sanitize`, tests/backends/cpu/test_core_sanitized.py). Every
// array is its own allocation of exactly the size that the kernel may touch, so that a step outside is an error.
// A case is a function registered with CASE(name) (checks.hpp). Prefix trees have a file of their own.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "checks.hpp"
#include "cpu/common/isa.hpp"
#include "cpu/common/kept_memory.hpp"
#include "cpu/common/number_integers.hpp"
#include "cpu/logprobs/logprobs.hpp"
#include "cpu/program/program.hpp"
#include "cpu/rewards.hpp"
#include "cpu/threads.hpp"

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// ------------------------------------------------------------------------------------------------------- logprobs
namespace fr = fastreward;
constexpr int kAllFlags = fr::kEntropy | fr::kLogSumSq | fr::kMeanLogit | fr::kArgmax | fr::kRank;

std::uint16_t to_bf16(float x) {
  std::uint32_t u;
  std::memcpy(&u, &x, 4);
  return static_cast<std::uint16_t>(u >> 16);
}
float from_bf16(std::uint16_t h) {
  const std::uint32_t u = static_cast<std::uint32_t>(h) << 16;
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
// Only for values that a half holds exactly, or infinities: enough for made-up logits.
std::uint16_t to_f16(float x) {
  if (std::isinf(x)) return x > 0 ? 0x7c00 : 0xfc00;
  if (x == 0.0f) return 0;
  int e = 0;
  const float m = std::frexp(std::fabs(x), &e);
  const auto mantissa = static_cast<std::uint16_t>(std::lround(std::ldexp(m, 11))) & 0x3ffu;
  return static_cast<std::uint16_t>((x < 0 ? 0x8000u : 0u) | static_cast<unsigned>(e + 14) << 10 | mantissa);
}

// Rows of logits in the three types, with the same values; the last row ends where the allocation ends.
struct Problem {
  std::int64_t rows, columns, stride;
  std::vector<float> f32;
  std::vector<std::uint16_t> bf16, f16;
  std::vector<std::int64_t> labels;

  Problem(std::int64_t n, std::int64_t v, std::int64_t gap, unsigned seed) : rows(n), columns(v), stride(v + gap) {
    std::mt19937 random(seed);
    const auto size = static_cast<std::size_t>((n - 1) * stride + v);
    for (std::size_t i = 0; i < size; ++i)  // multiples of 1/8 below 8: exact in all three types
      f32.push_back(static_cast<float>(static_cast<int>(random() % 128) - 64) / 8.0f);
    for (std::int64_t i = 0; i < n; ++i)
      labels.push_back(static_cast<std::int64_t>(random() % static_cast<unsigned>(v)));
    convert();
  }
  void convert() {
    bf16.clear(), f16.clear();
    for (const float x : f32) bf16.push_back(to_bf16(x)), f16.push_back(to_f16(x));
  }
  double logit(std::int64_t row, std::int64_t column) const {
    return static_cast<double>(f32[static_cast<std::size_t>(row * stride + column)]);
  }
  fr::LogprobsRows view(fr::DType dtype, int threads) const {
    fr::LogprobsRows in;
    in.logits = dtype == fr::DType::f32 ? static_cast<const void*>(f32.data())
                                        : dtype == fr::DType::bf16 ? bf16.data() : f16.data();
    in.dtype = dtype;
    in.rows = rows, in.columns = columns, in.row_stride = stride;
    in.labels = labels.data();
    in.inv_temperature_scalar = 0.8;
    in.threads = threads;
    return in;
  }
};

struct Outputs {
  std::vector<float> values, id_logprobs;
  std::vector<std::int64_t> indices;
};

std::vector<double> scratch_of(const fr::LogprobsRows& in) {
  const std::int64_t length = in.keep_ids != nullptr ? in.keep_count : in.columns;
  return std::vector<double>(static_cast<std::size_t>(in.rows * fr::logprobs_blocks(length) * fr::kLogprobsPartial));
}

Outputs forward(const fr::LogprobsRows& in, int flags) {
  Outputs out;
  out.values.resize(static_cast<std::size_t>(8 * in.rows), -1.0f);
  out.indices.resize(static_cast<std::size_t>(2 * in.rows), -1);
  out.id_logprobs.resize(static_cast<std::size_t>(in.rows * in.token_count), -1.0f);
  auto scratch = scratch_of(in);
  fr::LogprobsForward call;
  call.in = in;
  call.flags = flags;
  call.values = out.values.data();
  call.indices = out.indices.data();
  call.id_logprobs = out.id_logprobs.data();
  call.scratch = scratch.data();
  FASTREWARD_DISPATCH(logprobs_forward)(call);
  return out;
}

// The kept columns of a row, as the kernel is told of them.
bool kept(const fr::LogprobsRows& in, std::int64_t row, std::int64_t column) {
  if (in.keep_mask != nullptr) return in.keep_mask[row * in.keep_mask_stride + column] != 0;
  if (in.keep_ids == nullptr) return true;
  const std::int64_t* ids = in.keep_ids + row * in.keep_ids_stride;
  return std::find(ids, ids + in.keep_count, column) != ids + in.keep_count;
}

double expected_logsumexp(const Problem& p, const fr::LogprobsRows& in, std::int64_t row) {
  double top = -kInf, sum = 0.0;
  for (std::int64_t j = 0; j < p.columns; ++j)
    if (kept(in, row, j)) top = std::max(top, p.logit(row, j));
  if (top == -kInf) return -kInf;
  for (std::int64_t j = 0; j < p.columns; ++j)
    if (kept(in, row, j)) sum += std::exp((p.logit(row, j) - top) * in.inv_temperature_scalar);
  return top * in.inv_temperature_scalar + std::log(sum);
}

double expected_entropy(const Problem& p, const fr::LogprobsRows& in, std::int64_t row, double lse) {
  double entropy = lse == -kInf ? std::nan("") : 0.0;
  for (std::int64_t j = 0; j < p.columns; ++j) {
    if (!kept(in, row, j) || p.logit(row, j) == -kInf) continue;
    const double logp = p.logit(row, j) * in.inv_temperature_scalar - lse;
    entropy -= std::exp(logp) * logp;
  }
  return entropy;
}

void check_forward(const Problem& p, const fr::LogprobsRows& in) {
  const Outputs out = forward(in, kAllFlags);
  for (std::int64_t row = 0; row < p.rows; ++row) {
    const auto value = [&](int name) {
      return static_cast<double>(out.values[static_cast<std::size_t>(name * p.rows + row)]);
    };
    if (in.mask != nullptr && in.mask[row] == 0) {
      for (int name = 0; name < 7; ++name) CHECK_NEAR(value(name), 0.0, 0.0);
      continue;
    }
    const std::int64_t label = p.labels[static_cast<std::size_t>(row)];
    const double lse = expected_logsumexp(p, in, row);
    const double logit = kept(in, row, label) ? p.logit(row, label) : -kInf;
    CHECK_NEAR(value(fr::kValueLogsumexp), lse, 4e-6);
    CHECK_NEAR(value(fr::kValueLogprob), logit * in.inv_temperature_scalar - lse, 4e-6);
    CHECK_NEAR(value(fr::kValueEntropy), expected_entropy(p, in, row, lse), 4e-6);
    std::int64_t above = 0;
    for (std::int64_t j = 0; j < p.columns; ++j) above += kept(in, row, j) && p.logit(row, j) > logit;
    CHECK(out.indices[static_cast<std::size_t>(p.rows + row)] == above);
  }
}

double stored(const void* data, fr::DType dtype, std::int64_t index) {
  if (dtype == fr::DType::f32) return static_cast<double>(static_cast<const float*>(data)[index]);
  const std::uint16_t h = static_cast<const std::uint16_t*>(data)[index];
  if (dtype == fr::DType::bf16) return static_cast<double>(from_bf16(h));
  const double magnitude = (h >> 10 & 31) == 0 ? std::ldexp(h & 0x3ff, -24)
                                               : std::ldexp(1024 + (h & 0x3ff), (h >> 10 & 31) - 25);
  return (h & 0x8000) != 0 ? -magnitude : magnitude;
}

// Gradient of sum_row (logprob + entropy): fresh and in place must agree, and a row must sum to about 0.
void check_backward(const Problem& p, const fr::LogprobsRows& in, double tolerance) {
  const Outputs out = forward(in, kAllFlags);
  std::vector<float> upstream(static_cast<std::size_t>(8 * p.rows), 0.0f);
  std::fill_n(upstream.begin(), 2 * p.rows, 1.0f);
  std::vector<float> id_upstream(static_cast<std::size_t>(p.rows * in.token_count), 0.25f);
  const std::size_t width = in.dtype == fr::DType::f32 ? 4 : 2;
  const std::size_t bytes = static_cast<std::size_t>((p.rows - 1) * p.stride + p.columns) * width;
  std::vector<std::uint8_t> fresh(bytes), inplace(static_cast<const std::uint8_t*>(in.logits),
                                                  static_cast<const std::uint8_t*>(in.logits) + bytes);
  std::vector<fr::ColumnGradient> columns(static_cast<std::size_t>(in.threads * (in.token_count + 1)));
  std::vector<float> logits(static_cast<std::size_t>(in.threads * in.keep_count));
  fr::LogprobsBackward call;
  call.in = in;
  call.values = out.values.data();
  call.grad_values = upstream.data();
  call.grad_ids = in.token_ids != nullptr ? id_upstream.data() : nullptr;
  call.grad_logits = fresh.data();
  call.grad_stride = p.stride;
  call.columns = columns.data();
  call.kept_logits = logits.data();
  FASTREWARD_DISPATCH(logprobs_backward)(call);
  call.in.logits = call.grad_logits = inplace.data();
  FASTREWARD_DISPATCH(logprobs_backward)(call);
  for (std::int64_t row = 0; row < p.rows; ++row) {
    const std::size_t start = static_cast<std::size_t>(row * p.stride) * width;
    CHECK(std::memcmp(fresh.data() + start, inplace.data() + start, static_cast<std::size_t>(p.columns) * width) == 0);
    double sum = 0.0;
    for (std::int64_t j = 0; j < p.columns; ++j) {
      const double g = stored(fresh.data(), in.dtype, row * p.stride + j);
      if (!kept(in, row, j)) CHECK_NEAR(g, 0.0, 0.0);
      sum += g;
    }
    const bool counted = in.mask == nullptr || in.mask[row] != 0;
    const bool defined = expected_logsumexp(p, in, row) != -kInf;
    if (!counted) CHECK_NEAR(sum, 0.0, 0.0);
    else if (defined && kept(in, row, p.labels[static_cast<std::size_t>(row)])) CHECK_NEAR(sum, 0.0, tolerance);
  }
}

constexpr fr::DType kDTypes[] = {fr::DType::f32, fr::DType::bf16, fr::DType::f16};

void check_all(const Problem& p, const fr::LogprobsRows& like, bool backward = true) {
  for (const fr::DType dtype : kDTypes) {
    for (const int threads : {1, 2}) {
      fr::LogprobsRows in = p.view(dtype, threads);
      in.mask = like.mask;
      in.keep_mask = like.keep_mask, in.keep_mask_stride = like.keep_mask_stride;
      in.keep_ids = like.keep_ids, in.keep_ids_stride = like.keep_ids_stride, in.keep_count = like.keep_count;
      in.token_ids = like.token_ids, in.token_ids_stride = like.token_ids_stride, in.token_count = like.token_count;
      check_forward(p, in);
      if (backward) check_backward(p, in, dtype == fr::DType::f32 ? 1e-5 : 0.05);
    }
  }
}

CASE(logprobs_any_length) {
  for (const std::int64_t columns : {1, 2, 7, 15, 16, 17, 63, 64, 65, 100, 4095, 4096, 4097, 9001})
    check_all(Problem(3, columns, 0, 1), {});
}

CASE(logprobs_strided_rows) {
  for (const std::int64_t gap : {1, 5, 64}) check_all(Problem(4, 333, gap, 2), {});
}

CASE(logprobs_minus_infinity) {
  Problem p(4, 4500, 0, 3);
  for (std::int64_t j = 0; j < p.columns; ++j) {
    if (j % 3 != 0) p.f32[static_cast<std::size_t>(j)] = -INFINITY;
    if (j < 4096) p.f32[static_cast<std::size_t>(p.stride + j)] = -INFINITY;  // a whole block of it
    p.f32[static_cast<std::size_t>(2 * p.stride + j)] = -INFINITY;            // a row of nothing else
  }
  p.labels[0] = 1;  // log-prob -inf
  p.convert();
  for (const fr::DType dtype : kDTypes) check_forward(p, p.view(dtype, 2));
}

CASE(logprobs_mask_and_ids) {
  const Problem p(6, 1000, 3, 4);
  const std::vector<std::uint8_t> mask = {1, 0, 1, 1, 0, 1};
  const std::vector<std::int64_t> ids = {0, 999, 5, 5, 17};
  fr::LogprobsRows like;
  like.mask = mask.data();
  like.token_ids = ids.data(), like.token_count = 5, like.token_ids_stride = 0;
  check_all(p, like);
}

CASE(logprobs_kept_sets) {
  const Problem p(3, 5000, 0, 5);
  std::vector<std::uint8_t> keep;
  for (std::int64_t i = 0; i < p.rows * p.columns; ++i) keep.push_back(i % 7 != 3);
  fr::LogprobsRows like;
  like.keep_mask = keep.data(), like.keep_mask_stride = p.columns;
  check_all(p, like);
  const std::vector<std::int64_t> ids = {4999, 0, -1, 77, p.labels[0], -1, 12, 3, p.labels[1], -1, p.labels[2], 1};
  like = {};
  like.keep_ids = ids.data(), like.keep_count = 4, like.keep_ids_stride = 4;
  check_all(p, like);
}

CASE(logprobs_bits_do_not_depend_on_threads) {
  const Problem p(3, 20000, 0, 6);
  const Outputs one = forward(p.view(fr::DType::f32, 1), kAllFlags);
  const Outputs three = forward(p.view(fr::DType::f32, 3), kAllFlags);
  CHECK(one.values == three.values);
  CHECK(one.indices == three.indices);
}

CASE(logprobs_accumulated_in_slices) {
  const Problem p(3, 777, 0, 7);
  const fr::LogprobsRows whole = p.view(fr::DType::f32, 1);
  const Outputs expected = forward(whole, kAllFlags);
  std::vector<float> thresholds;
  for (std::int64_t row = 0; row < p.rows; ++row)
    thresholds.push_back(static_cast<float>(p.logit(row, p.labels[static_cast<std::size_t>(row)])));
  std::vector<double> state(static_cast<std::size_t>(p.rows * fr::kStateSize), 0.0);
  for (std::int64_t row = 0; row < p.rows; ++row) {
    state[static_cast<std::size_t>(row * fr::kStateSize + fr::kStateMax)] = -kInf;
    state[static_cast<std::size_t>(row * fr::kStateSize + fr::kStateLabel)] = std::nan("");
  }
  for (std::int64_t start = 0; start < p.columns; start += 100) {
    fr::LogprobsAccumulate call;
    call.in = whole;
    call.in.logits = p.f32.data() + start;
    call.in.columns = std::min<std::int64_t>(100, p.columns - start);
    call.vocab_start = start;
    call.flags = kAllFlags;
    call.label_logits = thresholds.data();
    call.state = state.data();
    FASTREWARD_DISPATCH(logprobs_accumulate)(call);
  }
  std::vector<float> values(expected.values.size());
  std::vector<std::int64_t> indices(expected.indices.size());
  fr::LogprobsFinish finish;
  finish.state = state.data();
  finish.inv_temperature_scalar = whole.inv_temperature_scalar;
  finish.rows = p.rows, finish.vocab_size = p.columns, finish.flags = kAllFlags;
  finish.values = values.data(), finish.indices = indices.data();
  FASTREWARD_DISPATCH(logprobs_finish)(finish);
  for (std::size_t i = 0; i < values.size(); ++i)
    CHECK_NEAR(static_cast<double>(values[i]), static_cast<double>(expected.values[i]), 4e-6);
  CHECK(indices == expected.indices);
}

// ------------------------------------------------------------------------------------------------------- programs
// d = x - y; over = d > r; the output is d * r where not over, else 0. Reduced: the output's sum, d's extremes, how many are
// over; over the sequences: sums of groups, of members with a larger key, of the others, and of all, and a permutation.
struct ProgramProblem {
  std::vector<float> x, y, r;
  std::vector<std::uint8_t> mask;
  std::vector<std::int64_t> bounds, groups;
};

fr::ProgramCode make_program() {
  using O = fr::OperandKind;
  using T = fr::TokenOp;
  using R = fr::SequenceOp;
  // columns: 0 r, 1 sum, 2 least, 3 most, 4 over, 5 tokens, 6 group, 7 before, 8 others, 9 moved; numbers: 0 total
  static const fr::TokenOperand operands[] = {
      {O::input, 0},  {O::input, 1},     {O::sequence_value, ~0}, {O::mask, 0},      {O::slot, 0},
      {O::output, 0}, {O::reduction, 0}, {O::reduction, 1},       {O::reduction, 2}, {O::reduction, 3}};
  static const fr::TokenInstruction tile[] = {{T::k_sub, 0, 1, -1, -1, 4},           {T::k_extremes, -1, 7, 8, -1, -1},
                                              {T::k_gt, -1, 2, -1, 3, -1},           {T::k_mul, 4, 2, -1, -1, -1},
                                              {T::k_drop_store, -1, 5, -1, 3, -1}, {T::k_sum, -1, 6, -1, -1, -1}};
  static const fr::MaskInstruction chunk[] = {{fr::MaskOp::k_count, 3, -1, 9}};
  using K = fr::ReductionKind;
  static const fr::Reduction reductions[] = {{K::sum, ~1}, {K::minimum, ~2}, {K::maximum, ~3}, {K::count, ~4}, {K::tokens, ~5}};
  static const fr::TokenStep steps[] = {{0, false, false, {operands, 10}, {tile, 6}, {chunk, 1}, {reductions, 5}}};
  static const fr::SequenceInstruction sequences[] = {
      {R::k_group_sum, ~6, ~1, 0, 0},
      {R::k_group_sum_before, ~7, ~1, ~0, 0},
      {R::k_group_sum_others, ~8, ~1, 0, 0},
      {R::k_batch_permute, ~9, ~1, ~0, ~4},
      {R::k_batch_sum, 0, ~1, 0, 0}};
  static const fr::ProgramStage stages[] = {{{steps, 1}, {sequences, 5}}};
  static const fr::ProgramInput inputs[] = {
      {fr::InputLevel::token, 0}, {fr::InputLevel::token, 0}, {fr::InputLevel::sequence, ~0}};
  static const fr::SequencePlace outputs[] = {fr::kTokenOutput, ~1, ~2, ~3, ~4, ~5, ~6, ~7, ~8, ~9}, batch[] = {0};
  fr::ProgramCode code;
  code.numbers = 1, code.columns = 10;
  code.inputs = {inputs, 3};
  code.stages = {stages, 1};
  code.outputs = {outputs, 10};
  code.batch = {batch, 1};
  return code;
}

void check_program(std::int64_t rows, std::int64_t width, bool packed, bool masked, int threads) {
  std::mt19937 random(static_cast<unsigned>(rows * 10000 + width));
  ProgramProblem p;
  p.bounds.push_back(0);
  for (std::int64_t b = 0; b < rows; ++b)
    p.bounds.push_back(p.bounds.back() + (packed ? static_cast<std::int64_t>(random() % static_cast<unsigned>(width + 1)) : width));
  const auto tokens = static_cast<std::size_t>(p.bounds.back());
  const auto number = [&] { return static_cast<float>(static_cast<int>(random() % 2001) - 1000) / 500.0f; };
  for (std::size_t i = 0; i < tokens; ++i) {
    p.mask.push_back(masked && random() % 8 == 0 ? 0 : 1);
    p.x.push_back(p.mask.back() != 0 ? number() : NAN);
    p.y.push_back(p.mask.back() != 0 ? number() : INFINITY);
  }
  for (std::int64_t b = 0; b < rows; ++b) p.r.push_back(number()), p.groups.push_back(b % (rows / 2 + 1));

  const fr::ProgramCode code = make_program();
  fr::ProgramTokens side{rows, packed ? 0 : width, packed ? p.bounds.data() : nullptr, {}};
  if (masked) side.mask = {p.mask.data(), fr::MaskKind::bytes};
  const float* inputs[] = {p.x.data(), p.y.data(), p.r.data()};
  std::vector<std::vector<float>> outputs(10, std::vector<float>(static_cast<std::size_t>(rows), -7.0f));
  outputs[0].assign(tokens, -7.0f);
  std::vector<float*> pointers;
  for (auto& o : outputs) pointers.push_back(o.data());
  float total = -7.0f;
  fr::ProgramCall call;
  call.code = &code, call.sides = &side, call.inputs = inputs;
  call.groups = p.groups.data(), call.group_count = rows / 2 + 1;
  call.outputs = pointers.data(), call.batch = &total, call.threads = threads;
  FASTREWARD_DISPATCH(program_run)(call);

  double all = 0.0;
  for (std::int64_t b = 0; b < rows; ++b) {
    const auto row = static_cast<std::size_t>(b);
    double sum = 0.0, least = kInf, most = -kInf;
    int over = 0, counted = 0;
    for (auto i = static_cast<std::size_t>(p.bounds[row]); i < static_cast<std::size_t>(p.bounds[row + 1]); ++i) {
      const float d = p.x[i] - p.y[i], r = p.r[row];
      const bool counts = !masked || p.mask[i] != 0, drops = d > r;
      CHECK_NEAR(static_cast<double>(outputs[0][i]), counts && !drops ? static_cast<double>(d * r) : 0.0, 0.0);
      if (!counts) continue;
      sum += drops ? 0.0 : static_cast<double>(d * r);
      least = std::min(least, static_cast<double>(d)), most = std::max(most, static_cast<double>(d));
      over += drops, ++counted;
    }
    CHECK_NEAR(static_cast<double>(outputs[1][row]), sum, 1e-5 + 1e-6 * counted);
    CHECK_NEAR(static_cast<double>(outputs[2][row]), least, 0.0);
    CHECK_NEAR(static_cast<double>(outputs[3][row]), most, 0.0);
    CHECK(outputs[4][row] == static_cast<float>(over));
    CHECK(outputs[5][row] == static_cast<float>(counted));
    all += sum;
    double group = 0.0, before = 0.0;
    for (std::int64_t c = 0; c < rows; ++c) {
      const auto other = static_cast<std::size_t>(c);
      if (p.groups[other] != p.groups[row]) continue;
      group += static_cast<double>(outputs[1][other]);
      const bool first = p.r[other] > p.r[row] || (p.r[other] == p.r[row] && c <= b);
      before += first ? static_cast<double>(outputs[1][other]) : 0.0;
    }
    const double tolerance = 1e-4 + 1e-6 * static_cast<double>(tokens);
    CHECK_NEAR(static_cast<double>(outputs[6][row]), group, tolerance);
    CHECK_NEAR(static_cast<double>(outputs[7][row]), before, tolerance);
    CHECK_NEAR(static_cast<double>(outputs[8][row]), group - static_cast<double>(outputs[1][row]), tolerance);
  }
  CHECK_NEAR(static_cast<double>(total), all, 1e-4 + 1e-6 * static_cast<double>(tokens));
  std::vector<float> sums = outputs[1], moved = outputs[9];
  std::sort(sums.begin(), sums.end()), std::sort(moved.begin(), moved.end());
  CHECK(sums == moved);

  std::vector<float> scaled(tokens), broadcast(tokens);
  FASTREWARD_DISPATCH(program_scale)(side, outputs[0].data(), p.r.data(), 2.0f, scaled.data(), threads);
  FASTREWARD_DISPATCH(program_broadcast_to_tokens)(side, p.r.data(), 2.0f, broadcast.data(), threads);
  for (std::size_t row = 0; row < p.r.size(); ++row)
    for (auto i = static_cast<std::size_t>(p.bounds[row]); i < static_cast<std::size_t>(p.bounds[row + 1]); ++i) {
      CHECK(scaled[i] == outputs[0][i] * (p.r[row] * 2.0f));
      CHECK(broadcast[i] == (masked && p.mask[i] == 0 ? 0.0f : p.r[row] * 2.0f));
    }
}

// From the end of each sequence: y = x + r y of the next token, the same by each token's own y, and the next x; and a
// threshold of x.
void check_scans(std::int64_t rows, std::int64_t width, bool packed, bool masked, int threads) {
  using O = fr::OperandKind;
  using T = fr::TokenOp;
  static const fr::TokenOperand operands[] = {{O::input, 0}, {O::coefficient, ~0}, {O::carry, 0},
                                              {O::output, 0}, {O::input, 1},        {O::carry, 1},
                                              {O::output, 1}, {O::carry, 2},        {O::output, 2}};
  static const fr::TokenInstruction tile[] = {
      {T::k_load, 0, -1, -1, -1, -1}, {T::k_scan_reverse, -1, 1, 2, -1, -1},  {T::k_store, -1, 3, -1, -1, -1},
      {T::k_load, 0, -1, -1, -1, -1}, {T::k_scan_reverse, -1, 4, 5, -1, -1},  {T::k_store, -1, 6, -1, -1, -1},
      {T::k_load, 0, -1, -1, -1, -1}, {T::k_shift_reverse, -1, -1, 7, -1, -1}, {T::k_store, -1, 8, -1, -1, -1}};
  static const fr::TokenStep steps[] = {{0, true, true, {operands, 9}, {tile, 9}, {}, {}}};
  static const fr::ProgramStage stages[] = {{{steps, 1}, {}}};
  static const fr::ProgramInput inputs[] = {
      {fr::InputLevel::token, 0}, {fr::InputLevel::token, 0}, {fr::InputLevel::sequence, ~0}};
  static const fr::SequencePlace outputs[] = {fr::kTokenOutput, fr::kTokenOutput, fr::kTokenOutput};
  fr::ProgramCode code;
  code.columns = 1;
  code.inputs = {inputs, 3}, code.stages = {stages, 1}, code.outputs = {outputs, 3};

  std::mt19937 random(static_cast<unsigned>(rows * 10000 + width));
  const auto number = [&] { return static_cast<float>(static_cast<int>(random() % 2001) - 1000) / 1100.0f; };
  std::vector<std::int64_t> bounds{0};
  for (std::int64_t b = 0; b < rows; ++b)
    bounds.push_back(bounds.back() + (packed ? static_cast<std::int64_t>(random() % static_cast<unsigned>(width + 1)) : width));
  const auto tokens = static_cast<std::size_t>(bounds.back());
  std::vector<float> x(tokens), c(tokens), r(static_cast<std::size_t>(rows));
  std::vector<std::uint8_t> mask(tokens);
  for (std::size_t i = 0; i < tokens; ++i) {
    mask[i] = masked && random() % 8 == 0 ? 0 : 1;
    x[i] = mask[i] != 0 ? number() : NAN, c[i] = mask[i] != 0 ? number() : INFINITY;
  }
  for (float& value : r) value = number();
  fr::ProgramTokens side{rows, packed ? 0 : width, packed ? bounds.data() : nullptr, {}};
  if (masked) side.mask = {mask.data(), fr::MaskKind::bytes};
  const float* given[] = {x.data(), c.data(), r.data()};
  std::vector<float> made[3] = {std::vector<float>(tokens, -7.0f), std::vector<float>(tokens, -7.0f),
                                std::vector<float>(tokens, -7.0f)};
  float* pointers[] = {made[0].data(), made[1].data(), made[2].data()};
  fr::ProgramCall call;
  call.code = &code, call.sides = &side, call.inputs = given, call.outputs = pointers, call.threads = threads;
  FASTREWARD_DISPATCH(program_run)(call);
  float largest = -INFINITY;
  for (std::size_t row = 0; row < r.size(); ++row) {
    double y = 0.0, z = 0.0, next = 0.0;
    for (auto i = static_cast<std::size_t>(bounds[row + 1]); i-- > static_cast<std::size_t>(bounds[row]);) {
      const bool counts = mask[i] != 0;
      CHECK_NEAR(static_cast<double>(made[2][i]), counts ? next : 0.0, 0.0);
      if (counts) {
        next = static_cast<double>(x[i]), y = next + static_cast<double>(r[row]) * y;
        z = next + static_cast<double>(c[i]) * z, largest = std::max(largest, x[i]);
      }
      CHECK_NEAR(static_cast<double>(made[0][i]), counts ? y : 0.0, 2e-5);
      CHECK_NEAR(static_cast<double>(made[1][i]), counts ? z : 0.0, 2e-5);
    }
  }
  const float all = FASTREWARD_DISPATCH(program_threshold)(side, x.data(), 2.0, false, threads);
  CHECK(largest == -INFINITY ? all == INFINITY : all == largest);
  CHECK(FASTREWARD_DISPATCH(program_threshold)(side, x.data(), 1e-9, true, threads) == all);
}

CASE(programs_of_any_length) {
  for (const std::int64_t width : {0, 1, 3, 31, 32, 127, 128, 129, 1000, 2047, 2048, 2049, 5000})
    for (const bool packed : {false, true})
      for (const bool masked : {false, true}) check_program(3, width, packed, masked, 1), check_scans(3, width, packed, masked, 1);
}

CASE(programs_on_threads) {
  for (const bool packed : {false, true}) check_program(70, 4100, packed, true, 3), check_scans(70, 4100, packed, true, 3);
  check_program(0, 100, false, true, 2), check_scans(0, 100, false, true, 2);
  check_program(1, 40000, true, false, 2);
}

// --------------------------------------------------------------------------------------------------------- memory
CASE(kept_memory_is_used_again) {
  constexpr std::size_t mib = std::size_t{1} << 20;
  for (const std::size_t bytes : {9 * mib + 3, 40 * mib}) {
    void* first = nullptr;
    {
      const fr::KeptMemory memory(bytes), other(bytes);
      first = memory.data();
      CHECK(memory.size() == bytes);
      CHECK(first != other.data());
      CHECK(reinterpret_cast<std::uintptr_t>(first) % 64 == 0);
      const auto apart = reinterpret_cast<std::uintptr_t>(first) - reinterpret_cast<std::uintptr_t>(other.data());
      CHECK(apart % 4096 != 0);  // two streams of stores to one place of two pages are slow
      std::memset(first, 1, bytes);
      std::memset(other.data(), 2, bytes);
    }
    const fr::KeptMemory again(bytes - bytes / 8);
    CHECK(again.data() == first);  // the last to be freed is the first to be used
    const fr::KeptMemory larger(2 * bytes);
    std::memset(larger.data(), 3, larger.size());
  }
}

CASE(kept_memory_from_many_threads) {
  constexpr std::size_t bytes = std::size_t{8} << 20;
  std::vector<std::thread> threads;
  for (int t = 0; t < 6; ++t)
    threads.emplace_back([t] {
      for (int i = 0; i < 20; ++i) {
        const fr::KeptMemory memory(bytes);
        auto* data = static_cast<unsigned char*>(memory.data());
        data[0] = data[bytes - 1] = static_cast<unsigned char>(t);
        std::this_thread::yield();
        CHECK(data[0] == t && data[bytes - 1] == t);
      }
    });
  for (std::thread& thread : threads) thread.join();
}

// --------------------------------------------------------------------------------------------------------- rewards
CASE(token_rewards_packed) {
  // Sequences of every length around a vector's and a block's, memory that ends where the tokens do, every place.
  std::mt19937 random(3);
  std::vector<std::int64_t> bounds{0};
  for (const int length : {0, 1, 15, 16, 17, 2047, 2049, 0, 40, 5000, 3}) bounds.push_back(bounds.back() + length);
  const auto tokens = static_cast<std::size_t>(bounds.back()), rows = bounds.size() - 1;
  std::vector<float> logprobs(tokens), reference(tokens), scores(rows);
  std::vector<std::uint8_t> mask(tokens);
  for (float& x : logprobs) x = -static_cast<float>(random() % 64) / 16.0f;
  for (float& x : reference) x = -static_cast<float>(random() % 64) / 16.0f;
  for (float& x : scores) x = static_cast<float>(random() % 9);
  for (std::uint8_t& m : mask) m = random() % 3 != 0;
  scores[4] = std::numeric_limits<float>::quiet_NaN();
  for (const auto place : {fr::ScorePlace::all, fr::ScorePlace::start, fr::ScorePlace::end}) {
    fr::TokenRewards in;
    in.scores = scores.data(), in.logprobs = logprobs.data(), in.ref_logprobs = reference.data();
    in.mask = {mask.data(), fr::MaskKind::bytes};
    in.sequences = static_cast<std::int64_t>(rows), in.cu_seqlens = bounds.data();
    in.kl = fr::KlEstimate::k1, in.place = place;
    in.kl_coef = 0.5f, in.clamp = 2.0f, in.value_clamp = 1.5f, in.low = 1.0f, in.high = 6.0f;
    for (const int threads : {1, 3}) {
      std::vector<float> out(tokens, -9.0f);
      CHECK(!FASTREWARD_DISPATCH(token_rewards)(in, out.data(), threads));
      for (std::size_t row = 0; row < rows; ++row) {
        const auto begin = static_cast<std::size_t>(bounds[row]), end = static_cast<std::size_t>(bounds[row + 1]);
        const double score = std::isnan(scores[row]) ? 0.0 : std::clamp(static_cast<double>(scores[row]), 1.0, 6.0);
        std::size_t first = end, last = end;
        for (std::size_t i = begin; i < end; ++i)
          if (mask[i]) first = first == end ? i : first, last = i;
        for (std::size_t i = begin; i < end; ++i) {
          const double gap = static_cast<double>(logprobs[i]) - static_cast<double>(reference[i]);
          const bool here = place == fr::ScorePlace::all || i == (place == fr::ScorePlace::start ? first : last);
          const double expected = mask[i] ? (here ? score : 0.0) - 0.5 * std::clamp(gap, -1.5, 1.5) : 0.0;
          CHECK_NEAR(static_cast<double>(out[i]), expected, 0.0);
        }
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------- numbering
CASE(number_integers_in_first_seen_order) {
  constexpr std::int64_t kLeast = std::numeric_limits<std::int64_t>::min();
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  const std::vector<std::int64_t> labels{7, kLeast, 7, kMost, -1, kLeast, 0, kMost}, expected{0, 1, 0, 2, 3, 1, 4, 2};
  std::vector<std::int64_t> index(labels.size(), -9);
  CHECK(fr::number_integers(labels.data(), 8, index.data()) == 5);
  CHECK(index == expected);
}

CASE(number_integers_with_colliding_labels) {
  // Multiples of a large power of two collide; against a plain search.
  for (const std::uint64_t step : {std::uint64_t{1}, std::uint64_t{1} << 40, std::uint64_t{1} << 60}) {
    std::mt19937_64 random(5);
    std::vector<std::int64_t> labels(1000), seen, index(labels.size(), -9);
    for (std::int64_t& label : labels) label = static_cast<std::int64_t>(random() % 300 * step);
    const std::int64_t groups = fr::number_integers(labels.data(), 1000, index.data());
    for (std::size_t i = 0; i < labels.size(); ++i) {
      auto place = std::find(seen.begin(), seen.end(), labels[i]);
      if (place == seen.end()) place = seen.insert(seen.end(), labels[i]);
      CHECK(index[i] == place - seen.begin());
    }
    CHECK(groups == static_cast<std::int64_t>(seen.size()));
  }
}

}  // namespace

// All cases, or those whose names have the argument in them.
int main(int count, char** arguments) {
  fr::threads::set_worth_waking(0);  // the cases are small
  int run = 0;
  for (const checks::Case& c : checks::cases()) {
    if (count > 1 && std::strstr(c.name, arguments[1]) == nullptr) continue;
    ++run;
    const int before = checks::failures;
    c.run();
    std::printf("%-45s %s\n", c.name, checks::failures == before ? "ok" : "FAILED");
    std::fflush(stdout);
  }
  std::printf("core tests on %s: %d failures in %d cases\n", fr::isa_name(fr::active_isa()), checks::failures, run);
  return checks::failures == 0 && run > 0 ? 0 : 1;
}
