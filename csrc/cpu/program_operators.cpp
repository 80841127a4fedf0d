// The SIMD loops behind the token operators of programs (list: program.hpp).
//
// Each is one sweep over a block of a few dozen vectors that lie in L1. An operand that is the same for all tokens of a
// row is held in a register, so that an operator costs little more than its loads and its store; a vector of booleans is
// a word of bits. Fused forms exist where a measurement has shown that they pay.
#include "cpu/program_operators.hpp"

namespace fastreward::FASTREWARD_ISA::program {
namespace {

using namespace simd;

// ------------------------------------------------------------------------------------------------------- operands
struct Many {
  const float* p;
  explicit Many(const void* at) : p(static_cast<const float*>(at)) {}
  F32 operator[](int v) const { return load(p + v * kF32); }
};
struct One {
  F32 x;
  explicit One(const void* at) : x(load(static_cast<const float*>(at))) {}
  F32 operator[](int) const { return x; }
};
struct Mask {
  const Word* p;
  explicit Mask(const void* at) : p(static_cast<const Word*>(at)) {}
  M32 operator[](int v) const { return lanes(p[v]); }
};
struct Result {
  float* p;
  explicit Result(void* at) : p(static_cast<float*>(at)) {}
  void set(int v, F32 x) const { store(p + v * kF32, x); }
};
struct MaskResult {
  Word* p;
  explicit MaskResult(void* at) : p(static_cast<Word*>(at)) {}
  void set(int v, M32 m) const { p[v] = word(m); }
};

// Lambdas below are the bodies of hot loops: a call per vector would cost more than the work.
#define INLINE __attribute__((always_inline))

template <class Body>
INLINE inline void each(int n, const Body& body) {
  int v = 0;
  for (; v + 4 <= n; v += 4) body(v), body(v + 1), body(v + 2), body(v + 3);
  for (; v < n; ++v) body(v);
}

// ---------------------------------------------------------------------------------------------------- elementwise
#define UNARY(Name, expression)                 \
  struct Name {                                 \
    static F32 of(F32 x) { return expression; } \
  };
UNARY(Neg, -x)
UNARY(Abs, abs(x))
UNARY(Sign, sign(x))
UNARY(Sqrt, sqrt(x))
UNARY(Exp, exp(x))
UNARY(ExpBounded, exp_bounded(x))
UNARY(Expm1, expm1(x))
UNARY(Log, log(x))
UNARY(Log1p, log1p(x))
UNARY(Tanh, tanh(x))
UNARY(Sigmoid, sigmoid(x))
UNARY(LogSigmoid, logsigmoid(x))
#define BINARY(Name, Type, expression)                  \
  struct Name {                                         \
    static Type of(F32 a, F32 b) { return expression; } \
  };
BINARY(Add, F32, a + b)
BINARY(Sub, F32, a - b)
BINARY(Mul, F32, a* b)
BINARY(Div, F32, a / b)
BINARY(Minimum, F32, minimum_of(a, b))
BINARY(Maximum, F32, maximum_of(a, b))
BINARY(Lt, M32, a < b)
BINARY(Le, M32, a <= b)
BINARY(Eq, M32, a == b)
BINARY(Ne, M32, ~(a == b))
#define TERNARY(Name, Type, expression)                        \
  struct Name {                                                \
    static Type of(F32 a, F32 b, F32 c) { return expression; } \
  };
TERNARY(Fma, F32, fma(a, b, c))
TERNARY(Fms, F32, fms(a, b, c))
TERNARY(Fnma, F32, fnma(a, b, c))
TERNARY(Clip, F32, select(a < b, b, select(a > c, c, a)))
TERNARY(Outside, M32, (a < b) | (a > c))

template <class Op>
void unary(const TokenInstruction& i, const Frame& f) {
  const Many a(f.at[i.a]);
  const Result out(f.at[i.out]);
  each(f.vectors, [&](int v) INLINE { out.set(v, Op::of(a[v])); });
}

template <class Op, class Out, class A, class B>
void binary(const TokenInstruction& i, const Frame& f) {
  const A a(f.at[i.a]);
  const B b(f.at[i.b]);
  const Out out(f.at[i.out]);
  each(f.vectors, [&](int v) INLINE { out.set(v, Op::of(a[v], b[v])); });
}

template <class Op, class Out, class A, class B, class C>
void ternary(const TokenInstruction& i, const Frame& f) {
  const A a(f.at[i.a]);
  const B b(f.at[i.b]);
  const C c(f.at[i.c]);
  const Out out(f.at[i.out]);
  each(f.vectors, [&](int v) INLINE { out.set(v, Op::of(a[v], b[v], c[v])); });
}

template <class B, class C>
void where(const TokenInstruction& i, const Frame& f) {
  const Mask a(f.at[i.a]);
  const B b(f.at[i.b]);
  const C c(f.at[i.c]);
  const Result out(f.at[i.out]);
  each(f.vectors, [&](int v) INLINE { out.set(v, select(a[v], b[v], c[v])); });
}

template <class B>
void drop(const TokenInstruction& i, const Frame& f) {
  const Mask a(f.at[i.a]);
  const B b(f.at[i.b]);
  const Result out(f.at[i.out]);
  each(f.vectors, [&](int v) INLINE { out.set(v, simd::drop(a[v], b[v])); });
}

template <class B, class C>
void mul_drop(const TokenInstruction& i, const Frame& f) {
  const Mask a(f.at[i.a]);
  const B b(f.at[i.b]);
  const C c(f.at[i.c]);
  const Result out(f.at[i.out]);
  each(f.vectors, [&](int v) INLINE { out.set(v, simd::drop(a[v], b[v] * c[v])); });
}

// ---------------------------------------------------------------------------------------------------------- masks
struct And {
  static unsigned of(unsigned a, unsigned b) { return a & b; }
};
struct Or {
  static unsigned of(unsigned a, unsigned b) { return a | b; }
};

template <class Op>
void logic(const TokenInstruction& i, const Frame& f) {
  const Word *a = static_cast<const Word*>(f.at[i.a]), *b = static_cast<const Word*>(f.at[i.b]);
  Word* out = static_cast<Word*>(f.at[i.out]);
  for (int v = 0; v < f.vectors; ++v) out[v] = static_cast<Word>(Op::of(a[v], b[v]));
}

void logic_not(const TokenInstruction& i, const Frame& f) {
  const Word* a = static_cast<const Word*>(f.at[i.a]);
  Word* out = static_cast<Word*>(f.at[i.out]);
  for (int v = 0; v < f.vectors; ++v) out[v] = static_cast<Word>(a[v] ^ kAllLanes);
}

// ------------------------------------------------------------------------------------------------- two at a time
template <class A, class B>
void maximum_lt(const TokenInstruction& i, const Frame& f) {
  const A a(f.at[i.a]);
  const B b(f.at[i.b]);
  const Result out(f.at[i.out]);
  const MaskResult second(f.at[i.second]);
  each(f.vectors, [&](int v) INLINE {
    const F32 x = a[v], y = b[v];
    out.set(v, maximum_of(x, y));
    second.set(v, x < y);
  });
}

template <class A, class B>
void minimum_gt(const TokenInstruction& i, const Frame& f) {
  const A a(f.at[i.a]);
  const B b(f.at[i.b]);
  const Result out(f.at[i.out]);
  const MaskResult second(f.at[i.second]);
  each(f.vectors, [&](int v) INLINE {
    const F32 x = a[v], y = b[v];
    out.set(v, minimum_of(x, y));
    second.set(v, x > y);
  });
}

template <class A, class B, class C>
void clip_parts(const TokenInstruction& i, const Frame& f) {
  const A a(f.at[i.a]);
  const B b(f.at[i.b]);
  const C c(f.at[i.c]);
  const Result out(f.at[i.out]);
  const MaskResult second(f.at[i.second]), third(f.at[i.third]);
  each(f.vectors, [&](int v) INLINE {
    const F32 x = a[v], low = b[v], high = c[v];
    const M32 below = x < low, above = x > high;
    out.set(v, select(below, low, select(above, high, x)));
    second.set(v, below);
    third.set(v, above);
  });
}

void sub_clip(const TokenInstruction& i, const Frame& f) {
  const Many a(f.at[i.a]), b(f.at[i.b]);
  const One c(f.at[i.c]), d(f.at[i.d]);
  const Result out(f.at[i.out]);
  const MaskResult second(f.at[i.second]);
  each(f.vectors, [&](int v) INLINE {
    const F32 x = a[v] - b[v];
    const M32 below = x < c[v], above = x > d[v];
    out.set(v, select(below, c[v], select(above, d[v], x)));
    second.set(v, below | above);
  });
}

// ----------------------------------------------------------------------------------------------------- reductions
// The sum goes over a run in float, and from there on in float64; with a mask, lanes that do not count add 0. Extremes
// have two chains, as each step waits for the one before it.
template <bool kSum, bool kMinimum, bool kMaximum, bool kMasked>
void reduce_some(const TokenInstruction& i, const Frame& f) {
  const Many a(f.at[i.a]);
  Accumulator* const sums = kSum ? static_cast<Accumulator*>(f.at[i.out]) : nullptr;
  Accumulator* const least = kMinimum ? static_cast<Accumulator*>(f.at[i.second]) : nullptr;
  Accumulator* const most = kMaximum ? static_cast<Accumulator*>(f.at[i.third]) : nullptr;
  const F32 zero = f32(0.0f);
  F64 lower = f64(0.0), upper = f64(0.0);
  if (kSum) lower = load(sums->sum), upper = load(sums->sum + kF64);
  F32 low[2] = {zero, zero}, high[2] = {zero, zero};
  if (kMinimum) low[0] = low[1] = load(least->extreme);
  if (kMaximum) high[0] = high[1] = load(most->extreme);
  M32 nan = zero < zero;
  const auto one = [&](int v, F32& run) INLINE {
    F32 x = a[v];
    if (kMasked) {
      const M32 counted = lanes(f.counted[v]);
      if (kMinimum) low[v % 2] = select(counted, min(x, low[v % 2]), low[v % 2]);
      if (kMaximum) high[v % 2] = select(counted, max(x, high[v % 2]), high[v % 2]);
      x = select(counted, x, zero);
    } else {
      if (kMinimum) low[v % 2] = min(x, low[v % 2]);
      if (kMaximum) high[v % 2] = max(x, high[v % 2]);
    }
    if (kMinimum || kMaximum) nan = nan | is_nan(x);
    if (kSum) run = run + x;
  };
  int v = 0;
  for (; v + kRun <= f.vectors; v += kRun) {
    F32 run = zero;
    one(v, run), one(v + 1, run), one(v + 2, run), one(v + 3, run);
    one(v + 4, run), one(v + 5, run), one(v + 6, run), one(v + 7, run);
    if (kSum) lower = lower + lower_f64(run), upper = upper + upper_f64(run);
  }
  F32 run = zero;
  for (; v < f.vectors; ++v) one(v, run);
  if (kSum) {
    store(sums->sum, lower + lower_f64(run));
    store(sums->sum + kF64, upper + upper_f64(run));
  }
  if (kMinimum) store(least->extreme, min(low[0], low[1])), least->nan |= any(nan);
  if (kMaximum) store(most->extreme, max(high[0], high[1])), most->nan |= any(nan);
}

template <bool kSum, bool kMinimum, bool kMaximum>
void reduce(const TokenInstruction& i, const Frame& f) {
  if (f.counted == nullptr) reduce_some<kSum, kMinimum, kMaximum, false>(i, f);
  else reduce_some<kSum, kMinimum, kMaximum, true>(i, f);
}

// Bits of n words.
template <class At>
std::int64_t count_bits(int n, const At& at) {
  constexpr int kStep = 8 / static_cast<int>(sizeof(Word));
  std::int64_t counted = 0;
  int v = 0;
  for (; v + kStep <= n; v += kStep) {
    std::uint64_t packed = 0;
    for (int k = 0; k < kStep; ++k) packed |= static_cast<std::uint64_t>(at(v + k)) << (8 * sizeof(Word) * static_cast<unsigned>(k));
    counted += __builtin_popcountll(packed);
  }
  for (; v < n; ++v) counted += __builtin_popcountll(at(v));
  return counted;
}

void count(const TokenInstruction& i, const Frame& f) {
  const Word* a = static_cast<const Word*>(f.at[i.a]);
  const Word* counted = f.counted;
  Accumulator* const sums = static_cast<Accumulator*>(f.at[i.out]);
  if (counted == nullptr) sums->count += count_bits(f.vectors, [&](int v) INLINE { return a[v]; });
  else sums->count += count_bits(f.vectors, [&](int v) INLINE { return static_cast<Word>(a[v] & counted[v]); });
}

// -------------------------------------------------------------------------------------------------------- outputs
template <class Value>
INLINE inline void write(float* out, const Frame& f, const Value& value) {
  if (f.counted == nullptr) {
    if (f.streamed) each(f.vectors, [&](int v) INLINE { stream(out + v * kF32, value(v)); });
    else each(f.vectors, [&](int v) INLINE { simd::store(out + v * kF32, value(v)); });
    return;
  }
  const auto kept = [&](int v) INLINE { return select(lanes(f.counted[v]), value(v), f32(0.0f)); };
  const int whole = f.tokens / kF32;
  for (int v = 0; v < whole; ++v) simd::store(out + v * kF32, kept(v));
  if (whole < f.vectors) store_n(out + whole * kF32, kept(whole), f.tokens - whole * kF32);
}

template <class A>
void store_output(const TokenInstruction& i, const Frame& f) {
  const A a(f.at[i.a]);
  write(static_cast<float*>(f.at[i.out]), f, [&](int v) INLINE { return a[v]; });
}

template <class A, class B>
void mul_store(const TokenInstruction& i, const Frame& f) {
  const A a(f.at[i.a]);
  const B b(f.at[i.b]);
  write(static_cast<float*>(f.at[i.out]), f, [&](int v) INLINE { return a[v] * b[v]; });
}

template <class B>
void drop_store(const TokenInstruction& i, const Frame& f) {
  const Mask a(f.at[i.a]);
  const B b(f.at[i.b]);
  write(static_cast<float*>(f.at[i.out]), f, [&](int v) INLINE { return simd::drop(a[v], b[v]); });
}

template <class B, class C>
void mul_drop_store(const TokenInstruction& i, const Frame& f) {
  const Mask a(f.at[i.a]);
  const B b(f.at[i.b]);
  const C c(f.at[i.c]);
  write(static_cast<float*>(f.at[i.out]), f, [&](int v) INLINE { return simd::drop(a[v], b[v] * c[v]); });
}

// --------------------------------------------------------------------------------------------------------- tables
template <class Op, class Out = Result>
Kernel binary_kernel(unsigned fixed) {
  constexpr Kernel table[] = {&binary<Op, Out, Many, Many>, &binary<Op, Out, One, Many>, &binary<Op, Out, Many, One>};
  return fixed < 3 ? table[fixed] : nullptr;
}

template <class Op, class Out = Result>
Kernel ternary_kernel(unsigned fixed) {
  constexpr Kernel table[] = {&ternary<Op, Out, Many, Many, Many>, &ternary<Op, Out, One, Many, Many>,
                              &ternary<Op, Out, Many, One, Many>,  &ternary<Op, Out, One, One, Many>,
                              &ternary<Op, Out, Many, Many, One>,  &ternary<Op, Out, One, Many, One>,
                              &ternary<Op, Out, Many, One, One>};
  return fixed < 7 ? table[fixed] : nullptr;
}

Kernel reduce_kernel(unsigned present) {
  constexpr Kernel table[] = {nullptr,
                              &reduce<true, false, false>,
                              &reduce<false, true, false>,
                              &reduce<true, true, false>,
                              &reduce<false, false, true>,
                              &reduce<true, false, true>,
                              &reduce<false, true, true>,
                              &reduce<true, true, true>};
  return table[present];
}

// By the kinds of the two operands at bits `shift` and `shift` + 1.
#define BY_TWO(kernel, fixed, shift)                                            \
  ((fixed) >> (shift) == 0   ? &kernel<Many, Many>                              \
   : (fixed) >> (shift) == 1 ? &kernel<One, Many>                               \
   : (fixed) >> (shift) == 2 ? &kernel<Many, One>                               \
                             : &kernel<One, One>)

}  // namespace

Kernel kernel_of(TokenOp op, unsigned variant) {
  switch (op) {
    case TokenOp::k_neg: return &unary<Neg>;
    case TokenOp::k_abs: return &unary<Abs>;
    case TokenOp::k_sign: return &unary<Sign>;
    case TokenOp::k_sqrt: return &unary<Sqrt>;
    case TokenOp::k_exp: return &unary<Exp>;
    case TokenOp::k_exp_bounded: return &unary<ExpBounded>;
    case TokenOp::k_expm1: return &unary<Expm1>;
    case TokenOp::k_log: return &unary<Log>;
    case TokenOp::k_log1p: return &unary<Log1p>;
    case TokenOp::k_tanh: return &unary<Tanh>;
    case TokenOp::k_sigmoid: return &unary<Sigmoid>;
    case TokenOp::k_logsigmoid: return &unary<LogSigmoid>;
    case TokenOp::k_add: return binary_kernel<Add>(variant);
    case TokenOp::k_sub: return binary_kernel<Sub>(variant);
    case TokenOp::k_mul: return binary_kernel<Mul>(variant);
    case TokenOp::k_div: return binary_kernel<Div>(variant);
    case TokenOp::k_minimum: return binary_kernel<Minimum>(variant);
    case TokenOp::k_maximum: return binary_kernel<Maximum>(variant);
    case TokenOp::k_lt: return binary_kernel<Lt, MaskResult>(variant);
    case TokenOp::k_le: return binary_kernel<Le, MaskResult>(variant);
    case TokenOp::k_eq: return binary_kernel<Eq, MaskResult>(variant);
    case TokenOp::k_ne: return binary_kernel<Ne, MaskResult>(variant);
    case TokenOp::k_fma: return ternary_kernel<Fma>(variant);
    case TokenOp::k_fms: return ternary_kernel<Fms>(variant);
    case TokenOp::k_fnma: return ternary_kernel<Fnma>(variant);
    case TokenOp::k_clip: return ternary_kernel<Clip>(variant);
    case TokenOp::k_outside: return ternary_kernel<Outside, MaskResult>(variant);
    case TokenOp::k_where: return BY_TWO(where, variant, 1);
    case TokenOp::k_drop: return variant == 0 ? &drop<Many> : &drop<One>;
    case TokenOp::k_mul_drop: return BY_TWO(mul_drop, variant, 1);
    case TokenOp::k_and: return &logic<And>;
    case TokenOp::k_or: return &logic<Or>;
    case TokenOp::k_not: return &logic_not;
    case TokenOp::k_maximum_lt: return BY_TWO(maximum_lt, variant, 0);
    case TokenOp::k_minimum_gt: return BY_TWO(minimum_gt, variant, 0);
    case TokenOp::k_clip_parts: return variant == 6 ? &clip_parts<Many, One, One> : nullptr;
    case TokenOp::k_sub_clip: return variant == 12 ? &sub_clip : nullptr;
    case TokenOp::k_reduce: return reduce_kernel(variant);
    case TokenOp::k_count: return &count;
    case TokenOp::k_store: return variant == 0 ? &store_output<Many> : &store_output<One>;
    case TokenOp::k_drop_store: return variant == 0 ? &drop_store<Many> : &drop_store<One>;
    case TokenOp::k_mul_store: return BY_TWO(mul_store, variant, 0);
    case TokenOp::k_mul_drop_store: return BY_TWO(mul_drop_store, variant, 1);
  }
  return nullptr;
}

}  // namespace fastreward::FASTREWARD_ISA::program
