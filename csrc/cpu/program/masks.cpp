// Token operators that make masks, or look at them; outputs, which drop what a mask says.
#include "cpu/program/tile.hpp"

namespace fastreward::FASTREWARD_ISA::program {
namespace {

// ----------------------------------------------------------------------------------------------------- comparisons
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
  const MaskResult below(t, i->z), above(t, i->z + kChunkVectors * static_cast<std::int64_t>(sizeof(Word)));
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

// What was changed was outside; a NaN is not.
void clip_outside(FASTREWARD_TILE) {
  const Sequence x(i->x, t), y(i->y, t);
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

// --------------------------------------------------------------------------------------------------------- outputs
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
  const Mask valid(t, 0);
  const auto f = [&](F32 a, int k) INLINE {
    a = dropped.of(a, k);
    const F32 kept = kMasked ? select(valid[k], a, f32(0.0f)) : a;
    if (kStreamed) stream(x + k * kF32, kept);
    else store(x + k * kF32, kept);
    return a;
  };
  NEXT_EACH(f);
}

// ---------------------------------------------------------------------------------------------------------- tables
template <class Op>
Operator compare_of(Variant v) {
  constexpr Operator table[] = BY_X(compare, Op);
  return table[number(v.x)];
}
template <class Op>
Operator compare_and_of(Variant v) {
  constexpr Operator table[] = BY_X(compare_and, Op);
  return table[number(v.x)];
}
Operator outside_of(Variant v) {
  constexpr Operator table[3][3] = {BY_X(outside, Slot), BY_X(outside, Sequence), BY_X(outside, Far)};
  return table[number(v.x)][number(v.y)];
}
Operator sides_of(Variant v) {
  constexpr Operator table[3][3] = {BY_X(sides, Slot), BY_X(sides, Sequence), BY_X(sides, Far)};
  return table[number(v.x)][number(v.y)];
}
Operator where_of(Variant v) {
  constexpr Operator table[2][3] = {BY_X(where, Nowhere), BY_X(where, Kept)};
  return table[v.keeps ? 1 : 0][number(v.x)];
}
Operator where_not_of(Variant v) {
  constexpr Operator table[2][3] = {BY_X(where_not, Nowhere), BY_X(where_not, Kept)};
  return table[v.keeps ? 1 : 0][number(v.x)];
}
template <class Op>
Operator bound_where_of(Variant v) {
  constexpr Operator table[2][3] = {BY_X(bound_where, Op, Nowhere), BY_X(bound_where, Op, Kept)};
  return table[v.keeps ? 1 : 0][number(v.x)];
}
template <int kMasks>
Operator store_of(Variant v) {
  constexpr Operator table[2][2] = {{&store_output<kMasks, false, false>, &store_output<kMasks, false, true>},
                                    {&store_output<kMasks, true, false>, &store_output<kMasks, true, true>}};
  return table[v.masked ? 1 : 0][v.streamed ? 1 : 0];
}

}  // namespace

Operator mask_operator(TokenOp op, Variant v) {
  switch (op) {
    case TokenOp::k_where: return where_of(v);
    case TokenOp::k_where_not: return where_not_of(v);
    case TokenOp::k_minimum_where: return bound_where_of<Minimum>(v);
    case TokenOp::k_maximum_where: return bound_where_of<Maximum>(v);
    case TokenOp::k_clip_outside: return &clip_outside;
    case TokenOp::k_drop: return &drop<1>;
    case TokenOp::k_drop2: return &drop<2>;
    case TokenOp::k_drop3: return &drop<3>;
    case TokenOp::k_store: return store_of<0>(v);
    case TokenOp::k_drop_store: return store_of<1>(v);
    case TokenOp::k_drop2_store: return store_of<2>(v);
    case TokenOp::k_drop3_store: return store_of<3>(v);
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
    case TokenOp::k_and: return &logic<And>;
    case TokenOp::k_or: return &logic<Or>;
    case TokenOp::k_not: return &logic_not;
    default: return nullptr;
  }
}

}  // namespace fastreward::FASTREWARD_ISA::program
