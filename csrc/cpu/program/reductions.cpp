// Token operators that reduce: a tile is folded in registers, in a fixed order, and added to an accumulator per lane.
#include "cpu/program/tile.hpp"

namespace fastreward::FASTREWARD_ISA::program {
namespace {

// Lanes that do not count become neutral.
struct Everything {
  explicit Everything(const Tile*) {}
  F32 of(F32 a, int, F32) const { return a; }
};
struct Valid {
  Mask words;
  explicit Valid(const Tile* t) : words(t, 0) {}
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
#define VALID(neutral)                                                                                             \
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
  add_to<Addition>(i->x, fold<Addition>(VALID(f32(0.0f))));
  NEXT;
}

template <class Tokens>
inline INLINE void add_extremes(char* least, char* most, const Tokens& tokens, F32 a0, F32 a1, F32 a2, F32 a3, F32 a4,
                                F32 a5, F32 a6, F32 a7) {
  const float inf = __builtin_inff();
  add_to<Least>(least, fold<Least>(VALID(f32(inf))));
  add_to<Most>(most, fold<Most>(VALID(f32(-inf))));
}

template <class Tokens>
inline INLINE bool any_nan(const Tokens& tokens, F32 a0, F32 a1, F32 a2, F32 a3, F32 a4, F32 a5, F32 a6, F32 a7) {
  const auto of = [](F32 b0, F32 b1, F32 b2, F32 b3, F32 b4, F32 b5, F32 b6, F32 b7) INLINE {
    return any((unordered(b0, b1) | unordered(b2, b3)) | (unordered(b4, b5) | unordered(b6, b7)));
  };
  return of(VALID(f32(0.0f)));
}

template <class F, class Tokens>
void extreme(FASTREWARD_TILE) {
  const Tokens tokens(t);
  const float inf = __builtin_inff();
  add_to<F>(i->x, fold<F>(VALID(f32(F::kNeutral * inf))));
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
  add_to<Addition>(i->x, fold<Addition>(VALID(f32(0.0f))));
  add_extremes(i->y, reinterpret_cast<char*>(i->z), tokens, a0, a1, a2, a3, a4, a5, a6, a7);
  NEXT;
}

#define BY_TOKENS(kernel) (v.masked ? &kernel<Valid> : &kernel<Everything>)
#define EXTREME(F) (v.masked ? &extreme<F, Valid> : &extreme<F, Everything>)

}  // namespace

Operator reduction_operator(TokenOp op, Variant v) {
  switch (op) {
    case TokenOp::k_sum: return BY_TOKENS(sum_tile);
    case TokenOp::k_least: return EXTREME(Least);
    case TokenOp::k_most: return EXTREME(Most);
    case TokenOp::k_extremes: return BY_TOKENS(extremes);
    case TokenOp::k_sum_extremes: return BY_TOKENS(sum_extremes);
    default: return nullptr;
  }
}

void finish(FASTREWARD_TILE) {
  (void)i, (void)t, (void)a0, (void)a1, (void)a2, (void)a3, (void)a4, (void)a5, (void)a6, (void)a7;
}

void fetch(FASTREWARD_TILE) {
  for (std::int64_t k = 0; k < kTileBytes; k += 64) __builtin_prefetch(i->x + t->ahead + k);
  NEXT;
}

Operator operator_of(TokenOp op, Variant variant) {
  if (const Operator value = value_operator(op, variant)) return value;
  if (const Operator mask = mask_operator(op, variant)) return mask;
  if (const Operator scan = scan_operator(op, variant)) return scan;
  return reduction_operator(op, variant);
}

}  // namespace fastreward::FASTREWARD_ISA::program
