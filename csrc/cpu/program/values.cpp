// Token operators that make values of values (list: program.hpp; how they work: tile.hpp).
#include "cpu/program/tile.hpp"

namespace fastreward::FASTREWARD_ISA::program {
namespace {

void keep(FASTREWARD_TILE) {
  const Kept k(i->k);
  const auto f = [&](F32 a, int n) INLINE { return k.of(a, n); };
  NEXT_EACH(f);
}

#define UNARY(name, expression, ...)            \
  struct Unary_##name {                         \
    static F32 of(F32 a) { return expression; } \
  };
UNARY(load, a)
UNARY(exp_bounded, exp_bounded(a))
FASTREWARD_UNARY(UNARY)
template <class Op, class W, class K>
void unary(FASTREWARD_TILE) {
  const auto f = [](F32 a, int) INLINE { return Op::of(a); };
  NEXT_VALUE(W, K, f);
}

BINARY(Add, a + x)
BINARY(Sub, a - x)
BINARY(SubFrom, x - a)
BINARY(Mul, a* x)
BINARY(Div, a / x)
BINARY(Over, x / a)
template <class Op, class W, class K, class X>
void binary(FASTREWARD_TILE) {
  const X x(i->x, t);
  const auto f = [&](F32 a, int k) INLINE { return Op::of(a, x[k]); };
  NEXT_VALUE(W, K, f);
}

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

// Bounds that are the sequences', as most are.
template <class K>
void clip_sequences(FASTREWARD_TILE) {
  const Sequence x(i->x, t), y(i->y, t);
  if (in_order(i)) {
    const auto f = [&](F32 a, int k) INLINE { return clipped(a, x[k], y[k]); };
    NEXT_VALUE(Here, K, f);
  }
  const auto f = [&](F32 a, int k) INLINE { return clipped_anyhow(a, x[k], y[k]); };
  NEXT_VALUE(Here, K, f);
}

// ---------------------------------------------------------------------------------------------------------- tables
// Indices into the tables below.
int start_of(Variant v) { return v.w == Place::none ? 0 : v.w == Place::slot ? 1 : v.w == Place::tensor ? 2 : 3; }
int end_of(Variant v) { return v.keeps ? 1 : 0; }

template <class Op>
Operator unary_of(Variant v) {
  constexpr Operator table[4][2] = {{&unary<Op, Here, Nowhere>, &unary<Op, Here, Kept>},
                                    {&unary<Op, From<Slot>, Nowhere>, &unary<Op, From<Slot>, Kept>},
                                    {&unary<Op, From<Far>, Nowhere>, &unary<Op, From<Far>, Kept>},
                                    {&unary<Op, From<Sequence>, Nowhere>, &unary<Op, From<Sequence>, Kept>}};
  return table[start_of(v)][end_of(v)];
}
template <class Op>
Operator binary_of(Variant v) {
  constexpr Operator table[3][2][3] = {
      {BY_X(binary, Op, Here, Nowhere), BY_X(binary, Op, Here, Kept)},
      {BY_X(binary, Op, From<Slot>, Nowhere), BY_X(binary, Op, From<Slot>, Kept)},
      {BY_X(binary, Op, From<Far>, Nowhere), BY_X(binary, Op, From<Far>, Kept)}};
  return table[start_of(v)][end_of(v)][number(v.x)];
}
template <class Op>
Operator ternary_of(Variant v) {
  constexpr Operator table[2][3][3] = {
      {BY_X(ternary, Op, Nowhere, Slot), BY_X(ternary, Op, Nowhere, Sequence), BY_X(ternary, Op, Nowhere, Far)},
      {BY_X(ternary, Op, Kept, Slot), BY_X(ternary, Op, Kept, Sequence), BY_X(ternary, Op, Kept, Far)}};
  return table[end_of(v)][number(v.x)][number(v.y)];
}
Operator clip_of(Variant v) {
  if (v.x != Place::sequence || v.y != Place::sequence) return ternary_of<Clip>(v);
  return v.keeps ? &clip_sequences<Kept> : &clip_sequences<Nowhere>;
}

}  // namespace

Operator value_operator(TokenOp op, Variant v) {
#define CASE(name, ...) \
  case TokenOp::k_##name: return unary_of<Unary_##name>(v);
  switch (op) {
    CASE(load)
    CASE(exp_bounded)
    FASTREWARD_UNARY(CASE)
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
    case TokenOp::k_keep: return &keep;
    default: return nullptr;
  }
}

}  // namespace fastreward::FASTREWARD_ISA::program
