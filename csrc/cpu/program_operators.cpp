// The operators behind the token instructions of programs (list: program.hpp).
//
// A tile of eight vectors passes through the instructions in registers: each operator ends in a jump to the next one with
// the tile as its arguments, which the calling convention keeps in vector registers. So an operator costs its arithmetic
// and little else, where one sweep over a block in L1 per operator costs a load, a store and a loop as well (measured: two
// thirds more). Masks are words of bits in memory, written and read one by one, since a wide load of what narrow stores
// have just written has to wait for them: hence `volatile`, which keeps the compiler from joining them.
#include "cpu/program_operators.hpp"

namespace fastreward::FASTREWARD_ISA::program {
namespace {

using namespace simd;

#define INLINE __attribute__((always_inline))
// On to the next instruction, with the tile as it is or after f(vector, its number).
#define NEXT return i[1].run(i + 1, t, a0, a1, a2, a3, a4, a5, a6, a7)
#define EACH(f)                                                                                              \
  a0 = f(a0, 0), a1 = f(a1, 1), a2 = f(a2, 2), a3 = f(a3, 3), a4 = f(a4, 4), a5 = f(a5, 5), a6 = f(a6, 6), \
  a7 = f(a7, 7)
#define NEXT_EACH(f) \
  do {               \
    EACH(f);         \
    NEXT;            \
  } while (false)

// ------------------------------------------------------------------------------------------------------- operands
struct Slot {
  const float* p;
  Slot(const char* x, const Tile*) : p(reinterpret_cast<const float*>(x)) {}
  F32 operator[](int k) const { return load(p + k * kF32); }
};
struct Row {
  F32 v;
  Row(const char* x, const Tile*) : v(load(reinterpret_cast<const float*>(x))) {}
  F32 operator[](int) const { return v; }
};
struct Far {
  const float* p;
  Far(const char* x, const Tile* t) : p(reinterpret_cast<const float*>(x + t->at)) {}
  F32 operator[](int k) const { return load(p + k * kF32); }
};

// Masks are written, and combined, word by word: see above.
struct Mask {
  const Word* p;
  Mask(const Tile* t, std::int64_t place) : p(reinterpret_cast<const Word*>(t->masks + place)) {}
  M32 operator[](int k) const { return load_mask(p + k); }
  unsigned word(int k) const { return *static_cast<const volatile Word*>(p + k); }
};
struct MaskResult {
  volatile Word* p;
  MaskResult(const Tile* t, std::int64_t place) : p(reinterpret_cast<volatile Word*>(t->masks + place)) {}
  void set(int k, M32 m) const { p[k] = simd::word(m); }
  void set(int k, unsigned w) const { p[k] = static_cast<Word>(w); }
};
std::int64_t place_of(const char* y) { return reinterpret_cast<std::int64_t>(y); }  // of a mask in field x or y

// ---------------------------------------------------------------------------------------------------------- values
// What an operator starts from: the accumulator, or operand w.
struct Here {
  Here(const char*, const Tile*) {}
  F32 of(F32 a, int) const { return a; }
};
template <class W>
struct From {
  W w;
  From(const char* at, const Tile* t) : w(at, t) {}
  F32 of(F32, int k) const { return w[k]; }
};
// Where else the result goes: nowhere, or to slot k.
struct Nowhere {
  explicit Nowhere(char*) {}
  F32 of(F32 a, int) const { return a; }
};
struct Kept {
  float* p;
  explicit Kept(char* at) : p(reinterpret_cast<float*>(at)) {}
  F32 of(F32 a, int k) const {
    store(p + k * kF32, a);
    return a;
  }
};
// On to the next instruction with f(what it starts from, its number).
#define NEXT_VALUE(W, K, f)                                                             \
  const W start_(i->w, t);                                                              \
  const K end_(i->k);                                                                   \
  const auto all_ = [&](F32 a, int k) INLINE { return end_.of(f(start_.of(a, k), k), k); }; \
  NEXT_EACH(all_)

void keep(FASTREWARD_TILE) {
  const Kept k(i->k);
  const auto f = [&](F32 a, int n) INLINE { return k.of(a, n); };
  NEXT_EACH(f);
}

// 0 where one of kMasks masks is on: z, y, w.
template <int kMasks>
struct Dropped {
  Mask z, y, w;
  Dropped(const Instruction* i, const Tile* t)
      : z(t, kMasks > 0 ? i->z : 0), y(t, kMasks > 1 ? place_of(i->y) : 0), w(t, kMasks > 2 ? place_of(i->w) : 0) {}
  F32 of(F32 a, int k) const {
    if (kMasks == 0) return a;
    if (kMasks == 1) return select(z[k], f32(0.0f), a);
    Word either = static_cast<Word>(z.p[k] | y.p[k]);
    if (kMasks > 2) either = static_cast<Word>(either | w.p[k]);
    asm("" : "+r"(either));  // one by one
    return select(lanes(either), f32(0.0f), a);
  }
};

template <int kMasks>
void drop(FASTREWARD_TILE) {
  const Dropped<kMasks> dropped(i, t);
  const auto f = [&](F32 a, int k) INLINE { return dropped.of(a, k); };
  NEXT_EACH(f);
}

template <int kMasks, bool kMasked, bool kStreamed>
void store_output(FASTREWARD_TILE) {
  float* x = reinterpret_cast<float*>(i->x + t->at);
  const Dropped<kMasks> dropped(i, t);
  const Mask counted(t, 0);
  const auto f = [&](F32 a, int k) INLINE {
    a = dropped.of(a, k);
    const F32 kept = kMasked ? select(counted[k], a, f32(0.0f)) : a;
    if (kStreamed) stream(x + k * kF32, kept);
    else store(x + k * kF32, kept);
    return a;
  };
  NEXT_EACH(f);
}

#define UNARY(Name, expression)                 \
  struct Name {                                 \
    static F32 of(F32 a) { return expression; } \
  };
UNARY(Load, a)
UNARY(Neg, -a)
UNARY(Abs, abs(a))
UNARY(Sign, sign(a))
UNARY(Sqrt, sqrt(a))
UNARY(Exp, exp(a))
UNARY(ExpBounded, exp_bounded(a))
UNARY(Expm1, expm1(a))
UNARY(Log, log(a))
UNARY(Log1p, log1p(a))
UNARY(Tanh, tanh(a))
UNARY(Sigmoid, sigmoid(a))
UNARY(LogSigmoid, logsigmoid(a))
template <class Op, class W, class K>
void unary(FASTREWARD_TILE) {
  const auto f = [](F32 a, int) INLINE { return Op::of(a); };
  NEXT_VALUE(W, K, f);
}

#define BINARY(Name, expression)                       \
  struct Name {                                        \
    static F32 of(F32 a, F32 x) { return expression; } \
  };
BINARY(Add, a + x)
BINARY(Sub, a - x)
BINARY(SubFrom, x - a)
BINARY(Mul, a* x)
BINARY(Div, a / x)
BINARY(Over, x / a)
BINARY(Minimum, minimum_of(a, x))
BINARY(Maximum, maximum_of(a, x))
template <class Op, class W, class K, class X>
void binary(FASTREWARD_TILE) {
  const X x(i->x, t);
  const auto f = [&](F32 a, int k) INLINE { return Op::of(a, x[k]); };
  NEXT_VALUE(W, K, f);
}

// max(low, min(high, a)) passes over NaN bounds and keeps a NaN, and is clip where the bounds are in order.
inline F32 clipped(F32 a, F32 low, F32 high) { return max(low, min(high, a)); }
inline F32 clipped_anyhow(F32 a, F32 low, F32 high) { return select(a < low, low, select(a > high, high, a)); }

#define TERNARY(Name, expression)                             \
  struct Name {                                               \
    static F32 of(F32 a, F32 x, F32 y) { return expression; } \
  };
TERNARY(Fma, fma(a, x, y))
TERNARY(Fms, fms(a, x, y))
TERNARY(Fnma, fnma(a, x, y))
TERNARY(AddProduct, fma(x, y, a))
TERNARY(SubProduct, fnma(x, y, a))
TERNARY(Clip, clipped_anyhow(a, x, y))
template <class Op, class K, class X, class Y>
void ternary(FASTREWARD_TILE) {
  const X x(i->x, t);
  const Y y(i->y, t);
  const auto f = [&](F32 a, int k) INLINE { return Op::of(a, x[k], y[k]); };
  NEXT_VALUE(Here, K, f);
}

bool in_order(const Instruction* i) {
  return !(*reinterpret_cast<const float*>(i->x) > *reinterpret_cast<const float*>(i->y));
}

// Bounds that are the rows', as most are.
template <class K>
void clip_rows(FASTREWARD_TILE) {
  const Row x(i->x, t), y(i->y, t);
  if (in_order(i)) {
    const auto f = [&](F32 a, int k) INLINE { return clipped(a, x[k], y[k]); };
    NEXT_VALUE(Here, K, f);
  }
  const auto f = [&](F32 a, int k) INLINE { return clipped_anyhow(a, x[k], y[k]); };
  NEXT_VALUE(Here, K, f);
}

// What was changed was outside; a NaN is not.
void clip_outside(FASTREWARD_TILE) {
  const Row x(i->x, t), y(i->y, t);
  const MaskResult z(t, i->z);
  if (in_order(i)) {
    const auto f = [&](F32 a, int k) INLINE {
      const F32 c = clipped(a, x[k], y[k]);
      z.set(k, differ(a, c));
      return c;
    };
    NEXT_EACH(f);
  }
  const auto f = [&](F32 a, int k) INLINE {
    z.set(k, (a < x[k]) | (a > y[k]));
    return clipped_anyhow(a, x[k], y[k]);
  };
  NEXT_EACH(f);
}

// ----------------------------------------------------------------------------------------------------------- masks
// With AVX-512 a comparison takes the mask in (otherwise the compiler brings both to general registers).
#ifdef FASTREWARD_AVX512
#define MASKED(expression, code) M32{_mm512_mask_cmp_ps_mask(m.k, a.v, x.v, code)}
#else
#define MASKED(expression, code) (m & (expression))
#endif
#define COMPARISON(Name, expression, code)                                         \
  struct Name {                                                                    \
    static M32 of(F32 a, F32 x) { return expression; }                             \
    static M32 of(F32 a, F32 x, M32 m) { return MASKED(expression, code); }        \
  };
COMPARISON(Lt, a < x, _CMP_LT_OQ)
COMPARISON(Le, a <= x, _CMP_LE_OQ)
COMPARISON(Gt, a > x, _CMP_GT_OQ)
COMPARISON(Ge, a >= x, _CMP_GE_OQ)
COMPARISON(Eq, a == x, _CMP_EQ_OQ)
COMPARISON(Ne, ~(a == x), _CMP_NEQ_UQ)
template <class Op, class X>
void compare(FASTREWARD_TILE) {
  const X x(i->x, t);
  const MaskResult z(t, i->z);
  const auto f = [&](F32 a, int k) INLINE {
    z.set(k, Op::of(a, x[k]));
    return a;
  };
  NEXT_EACH(f);
}

template <class Op, class X>
void compare_and(FASTREWARD_TILE) {
  const X x(i->x, t);
  const Mask y(t, place_of(i->y));
  const MaskResult z(t, i->z);
  const auto f = [&](F32 a, int k) INLINE {
    z.set(k, Op::of(a, x[k], y[k]));
    return a;
  };
  NEXT_EACH(f);
}

template <class X, class Y>
void outside(FASTREWARD_TILE) {
  const X x(i->x, t);
  const Y y(i->y, t);
  const MaskResult z(t, i->z);
  const auto f = [&](F32 a, int k) INLINE {
    z.set(k, (a < x[k]) | (a > y[k]));
    return a;
  };
  NEXT_EACH(f);
}

// Both sides of the bounds: z below x, the next mask above y.
template <class X, class Y>
void sides(FASTREWARD_TILE) {
  const X x(i->x, t);
  const Y y(i->y, t);
  const MaskResult below(t, i->z), above(t, i->z + kItemVectors * static_cast<std::int64_t>(sizeof(Word)));
  const auto f = [&](F32 a, int k) INLINE {
    below.set(k, a < x[k]);
    above.set(k, a > y[k]);
    return a;
  };
  NEXT_EACH(f);
}

template <class K, class X>
void where(FASTREWARD_TILE) {
  const X x(i->x, t);
  const Mask z(t, i->z);
  const auto f = [&](F32 a, int k) INLINE { return select(z[k], a, x[k]); };
  NEXT_VALUE(Here, K, f);
}

// The minimum or maximum with x where mask z.
template <class Op, class K, class X>
void bound_where(FASTREWARD_TILE) {
  const X x(i->x, t);
  const Mask z(t, i->z);
  const auto f = [&](F32 a, int k) INLINE { return select(z[k], Op::of(a, x[k]), a); };
  NEXT_VALUE(Here, K, f);
}

template <class K, class X>
void where_not(FASTREWARD_TILE) {
  const X x(i->x, t);
  const Mask z(t, i->z);
  const auto f = [&](F32 a, int k) INLINE { return select(z[k], x[k], a); };
  NEXT_VALUE(Here, K, f);
}

struct And {
  static unsigned of(unsigned x, unsigned y) { return x & y; }
};
struct Or {
  static unsigned of(unsigned x, unsigned y) { return x | y; }
};
template <class Op>
void logic(FASTREWARD_TILE) {
  const Mask x(t, place_of(i->x)), y(t, place_of(i->y));
  const MaskResult z(t, i->z);
  for (int k = 0; k < kTileVectors; ++k) z.set(k, Op::of(x.word(k), y.word(k)));
  NEXT;
}

void logic_not(FASTREWARD_TILE) {
  const Mask x(t, place_of(i->x));
  const MaskResult z(t, i->z);
  for (int k = 0; k < kTileVectors; ++k) z.set(k, x.word(k) ^ kAllLanes);
  NEXT;
}

// ------------------------------------------------------------------------------------------------------ reductions
// Lanes that do not count become neutral.
struct Everything {
  explicit Everything(const Tile*) {}
  F32 of(F32 a, int, F32) const { return a; }
};
struct Counted {
  Mask words;
  explicit Counted(const Tile* t) : words(t, 0) {}
  F32 of(F32 a, int k, F32 neutral) const { return select(words[k], a, neutral); }
};

struct Addition {
  static F32 of(F32 a, F32 b) { return a + b; }
};
struct Least {
  static constexpr float kNeutral = 1.0f;
  static F32 of(F32 a, F32 b) { return min(a, b); }
};
struct Most {
  static constexpr float kNeutral = -1.0f;
  static F32 of(F32 a, F32 b) { return max(a, b); }
};
template <class F>
inline INLINE F32 fold(F32 a0, F32 a1, F32 a2, F32 a3, F32 a4, F32 a5, F32 a6, F32 a7) {
  return F::of(F::of(F::of(a0, a1), F::of(a2, a3)), F::of(F::of(a4, a5), F::of(a6, a7)));
}
#define COUNTED(neutral)                                                                                           \
  tokens.of(a0, 0, neutral), tokens.of(a1, 1, neutral), tokens.of(a2, 2, neutral), tokens.of(a3, 3, neutral),      \
      tokens.of(a4, 4, neutral), tokens.of(a5, 5, neutral), tokens.of(a6, 6, neutral), tokens.of(a7, 7, neutral)

template <class F>
inline INLINE void add_to(char* accumulator, F32 x) {
  Accumulator* to = reinterpret_cast<Accumulator*>(accumulator);
  store(to->run, F::of(x, load(to->run)));
}

template <class Tokens>
void sum_tile(FASTREWARD_TILE) {
  const Tokens tokens(t);
  add_to<Addition>(i->x, fold<Addition>(COUNTED(f32(0.0f))));
  NEXT;
}

template <class Tokens>
inline INLINE void add_extremes(char* least, char* most, const Tokens& tokens, F32 a0, F32 a1, F32 a2, F32 a3, F32 a4,
                                F32 a5, F32 a6, F32 a7) {
  const float inf = __builtin_inff();
  add_to<Least>(least, fold<Least>(COUNTED(f32(inf))));
  add_to<Most>(most, fold<Most>(COUNTED(f32(-inf))));
}

template <class Tokens>
inline INLINE bool any_nan(const Tokens& tokens, F32 a0, F32 a1, F32 a2, F32 a3, F32 a4, F32 a5, F32 a6, F32 a7) {
  const auto of = [](F32 b0, F32 b1, F32 b2, F32 b3, F32 b4, F32 b5, F32 b6, F32 b7) INLINE {
    return any((unordered(b0, b1) | unordered(b2, b3)) | (unordered(b4, b5) | unordered(b6, b7)));
  };
  return of(COUNTED(f32(0.0f)));
}

template <class F, class Tokens>
void extreme(FASTREWARD_TILE) {
  const Tokens tokens(t);
  const float inf = __builtin_inff();
  add_to<F>(i->x, fold<F>(COUNTED(f32(F::kNeutral * inf))));
  reinterpret_cast<Accumulator*>(i->x)->nan |= any_nan(tokens, a0, a1, a2, a3, a4, a5, a6, a7);
  NEXT;
}

template <class Tokens>
void extremes(FASTREWARD_TILE) {
  const Tokens tokens(t);
  add_extremes(i->x, i->y, tokens, a0, a1, a2, a3, a4, a5, a6, a7);
  const bool nan = any_nan(tokens, a0, a1, a2, a3, a4, a5, a6, a7);
  reinterpret_cast<Accumulator*>(i->x)->nan |= nan;
  reinterpret_cast<Accumulator*>(i->y)->nan |= nan;
  NEXT;
}

template <class Tokens>
void sum_extremes(FASTREWARD_TILE) {
  const Tokens tokens(t);
  add_to<Addition>(i->x, fold<Addition>(COUNTED(f32(0.0f))));
  add_extremes(i->y, reinterpret_cast<char*>(i->z), tokens, a0, a1, a2, a3, a4, a5, a6, a7);
  NEXT;
}

// ---------------------------------------------------------------------------------------------------------- tables
#define BY_Y(kernel, ...) {&kernel<__VA_ARGS__, Slot>, &kernel<__VA_ARGS__, Row>, &kernel<__VA_ARGS__, Far>}
#define BY_XY(kernel, ...)                                                                 \
  {                                                                                        \
    BY_Y(kernel, __VA_ARGS__, Slot), BY_Y(kernel, __VA_ARGS__, Row), BY_Y(kernel, __VA_ARGS__, Far) \
  }

// Indices into the tables below.
int number(Place place) { return static_cast<int>(place); }
int start_of(Variant v) { return v.w == Place::none ? 0 : v.w == Place::slot ? 1 : v.w == Place::tensor ? 2 : 3; }
int end_of(Variant v) { return v.keeps ? 1 : 0; }

template <class Op>
Operator unary_of(Variant v) {
  constexpr Operator table[4][2] = {{&unary<Op, Here, Nowhere>, &unary<Op, Here, Kept>},
                                    {&unary<Op, From<Slot>, Nowhere>, &unary<Op, From<Slot>, Kept>},
                                    {&unary<Op, From<Far>, Nowhere>, &unary<Op, From<Far>, Kept>},
                                    {&unary<Op, From<Row>, Nowhere>, &unary<Op, From<Row>, Kept>}};
  return table[start_of(v)][end_of(v)];
}
template <class Op>
Operator binary_of(Variant v) {
  constexpr Operator table[3][2][3] = {
      {BY_Y(binary, Op, Here, Nowhere), BY_Y(binary, Op, Here, Kept)},
      {BY_Y(binary, Op, From<Slot>, Nowhere), BY_Y(binary, Op, From<Slot>, Kept)},
      {BY_Y(binary, Op, From<Far>, Nowhere), BY_Y(binary, Op, From<Far>, Kept)}};
  return table[start_of(v)][end_of(v)][number(v.x)];
}
template <class Op>
Operator ternary_of(Variant v) {
  constexpr Operator table[2][3][3] = {BY_XY(ternary, Op, Nowhere), BY_XY(ternary, Op, Kept)};
  return table[end_of(v)][number(v.x)][number(v.y)];
}
Operator clip_of(Variant v) {
  if (v.x != Place::row || v.y != Place::row) return ternary_of<Clip>(v);
  return v.keeps ? &clip_rows<Kept> : &clip_rows<Nowhere>;
}
template <class Op>
Operator compare_of(Variant v) {
  constexpr Operator table[] = BY_Y(compare, Op);
  return table[number(v.x)];
}
template <class Op>
Operator compare_and_of(Variant v) {
  constexpr Operator table[] = BY_Y(compare_and, Op);
  return table[number(v.x)];
}
Operator outside_of(Variant v) {
  constexpr Operator table[3][3] = {BY_Y(outside, Slot), BY_Y(outside, Row), BY_Y(outside, Far)};
  return table[number(v.x)][number(v.y)];
}
Operator sides_of(Variant v) {
  constexpr Operator table[3][3] = {BY_Y(sides, Slot), BY_Y(sides, Row), BY_Y(sides, Far)};
  return table[number(v.x)][number(v.y)];
}
Operator where_of(Variant v) {
  constexpr Operator table[2][3] = {BY_Y(where, Nowhere), BY_Y(where, Kept)};
  return table[end_of(v)][number(v.x)];
}
Operator where_not_of(Variant v) {
  constexpr Operator table[2][3] = {BY_Y(where_not, Nowhere), BY_Y(where_not, Kept)};
  return table[end_of(v)][number(v.x)];
}
template <class Op>
Operator bound_where_of(Variant v) {
  constexpr Operator table[2][3] = {BY_Y(bound_where, Op, Nowhere), BY_Y(bound_where, Op, Kept)};
  return table[end_of(v)][number(v.x)];
}
template <int kMasks>
Operator store_of(Variant v) {
  constexpr Operator table[2][2] = {{&store_output<kMasks, false, false>, &store_output<kMasks, false, true>},
                                    {&store_output<kMasks, true, false>, &store_output<kMasks, true, true>}};
  return table[v.masked ? 1 : 0][v.streamed ? 1 : 0];
}
#define BY_TOKENS(kernel) (v.masked ? &kernel<Counted> : &kernel<Everything>)
#define EXTREME(F) (v.masked ? &extreme<F, Counted> : &extreme<F, Everything>)

}  // namespace

void finish(FASTREWARD_TILE) {
  (void)i, (void)t, (void)a0, (void)a1, (void)a2, (void)a3, (void)a4, (void)a5, (void)a6, (void)a7;
}

void fetch(FASTREWARD_TILE) {
  for (std::int64_t k = 0; k < kTileBytes; k += 64) __builtin_prefetch(i->x + t->ahead + k);
  NEXT;
}

Operator operator_of(TokenOp op, Variant v) {
  switch (op) {
    case TokenOp::k_load: return unary_of<Load>(v);
    case TokenOp::k_keep: return &keep;
    case TokenOp::k_store: return store_of<0>(v);
    case TokenOp::k_drop_store: return store_of<1>(v);
    case TokenOp::k_drop2_store: return store_of<2>(v);
    case TokenOp::k_drop3_store: return store_of<3>(v);
    case TokenOp::k_neg: return unary_of<Neg>(v);
    case TokenOp::k_abs: return unary_of<Abs>(v);
    case TokenOp::k_sign: return unary_of<Sign>(v);
    case TokenOp::k_sqrt: return unary_of<Sqrt>(v);
    case TokenOp::k_exp: return unary_of<Exp>(v);
    case TokenOp::k_exp_bounded: return unary_of<ExpBounded>(v);
    case TokenOp::k_expm1: return unary_of<Expm1>(v);
    case TokenOp::k_log: return unary_of<Log>(v);
    case TokenOp::k_log1p: return unary_of<Log1p>(v);
    case TokenOp::k_tanh: return unary_of<Tanh>(v);
    case TokenOp::k_sigmoid: return unary_of<Sigmoid>(v);
    case TokenOp::k_logsigmoid: return unary_of<LogSigmoid>(v);
    case TokenOp::k_add: return binary_of<Add>(v);
    case TokenOp::k_sub: return binary_of<Sub>(v);
    case TokenOp::k_from: return binary_of<SubFrom>(v);
    case TokenOp::k_mul: return binary_of<Mul>(v);
    case TokenOp::k_div: return binary_of<Div>(v);
    case TokenOp::k_over: return binary_of<Over>(v);
    case TokenOp::k_minimum: return binary_of<Minimum>(v);
    case TokenOp::k_maximum: return binary_of<Maximum>(v);
    case TokenOp::k_fma: return ternary_of<Fma>(v);
    case TokenOp::k_fms: return ternary_of<Fms>(v);
    case TokenOp::k_fnma: return ternary_of<Fnma>(v);
    case TokenOp::k_add_product: return ternary_of<AddProduct>(v);
    case TokenOp::k_sub_product: return ternary_of<SubProduct>(v);
    case TokenOp::k_clip: return clip_of(v);
    case TokenOp::k_clip_outside: return &clip_outside;
    case TokenOp::k_lt: return compare_of<Lt>(v);
    case TokenOp::k_le: return compare_of<Le>(v);
    case TokenOp::k_gt: return compare_of<Gt>(v);
    case TokenOp::k_ge: return compare_of<Ge>(v);
    case TokenOp::k_eq: return compare_of<Eq>(v);
    case TokenOp::k_ne: return compare_of<Ne>(v);
    case TokenOp::k_lt_and: return compare_and_of<Lt>(v);
    case TokenOp::k_le_and: return compare_and_of<Le>(v);
    case TokenOp::k_gt_and: return compare_and_of<Gt>(v);
    case TokenOp::k_ge_and: return compare_and_of<Ge>(v);
    case TokenOp::k_eq_and: return compare_and_of<Eq>(v);
    case TokenOp::k_ne_and: return compare_and_of<Ne>(v);
    case TokenOp::k_outside: return outside_of(v);
    case TokenOp::k_sides: return sides_of(v);
    case TokenOp::k_where: return where_of(v);
    case TokenOp::k_where_not: return where_not_of(v);
    case TokenOp::k_minimum_where: return bound_where_of<Minimum>(v);
    case TokenOp::k_maximum_where: return bound_where_of<Maximum>(v);
    case TokenOp::k_drop: return &drop<1>;
    case TokenOp::k_drop2: return &drop<2>;
    case TokenOp::k_drop3: return &drop<3>;
    case TokenOp::k_and: return &logic<And>;
    case TokenOp::k_or: return &logic<Or>;
    case TokenOp::k_not: return &logic_not;
    case TokenOp::k_sum: return BY_TOKENS(sum_tile);
    case TokenOp::k_least: return EXTREME(Least);
    case TokenOp::k_most: return EXTREME(Most);
    case TokenOp::k_extremes: return BY_TOKENS(extremes);
    case TokenOp::k_sum_extremes: return BY_TOKENS(sum_extremes);
  }
  return nullptr;
}

}  // namespace fastreward::FASTREWARD_ISA::program
