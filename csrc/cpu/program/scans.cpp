// Token operators along a sequence: y_t = x_t + c_t y_(t-1), and the neighbour's value; from either end.
//
// In f64, as what is small at one token may be added to thousands. A vector is scanned in log steps of (c, x), then
// takes what the vectors before it carry. Tokens that do not count are (1, 0), which changes no bit of the others: so
// neither padding nor whether a tile is whole matters.
#include <type_traits>

#include "cpu/program/tile.hpp"
#include "cpu/simd/neighbours.hpp"

namespace fastreward::FASTREWARD_ISA::program {
namespace {

struct All {
  explicit All(const Tile*) {}
  F32 of(F32 a, int, F32) const { return a; }
};
struct Counting {
  Mask words;
  explicit Counting(const Tile* t) : words(t, 0) {}
  F32 of(F32 a, int k, F32 otherwise) const { return select(words[k], a, otherwise); }
};

// A vector's maps y -> c y + x, joined from one end of it to each lane: first the products, which the x need.
template <bool kUp>
struct Products {
  F64 step[3], whole;
  explicit Products(F64 c) {
    const F64 one = f64(1.0);
    step[0] = c, c = c * moved<kUp, 1>(c, one);
    step[1] = c;
    if (kF64 > 2) c = c * moved<kUp, 2>(c, one);
    step[2] = c;
    if (kF64 > 4) c = c * moved<kUp, 4>(c, one);
    whole = c;
  }
};

// x + c y; a c of 0 starts anew, whatever y is.
template <bool kZeros>
inline F64 joined(F64 c, F64 y, F64 x) {
  const F64 sum = fma(c, y, x);
  return kZeros ? select(c == f64(0.0), x, sum) : sum;
}

template <bool kUp, bool kZeros>
inline F64 scanned(F64 x, const Products<kUp>& c, F64& carry) {
  const F64 zero = f64(0.0);
  x = joined<kZeros>(c.step[0], moved<kUp, 1>(x, zero), x);
  if (kF64 > 2) x = joined<kZeros>(c.step[1], moved<kUp, 2>(x, zero), x);
  if (kF64 > 4) x = joined<kZeros>(c.step[2], moved<kUp, 4>(x, zero), x);
  const F64 y = joined<kZeros>(c.whole, carry, x);
  carry = joined<kZeros>(last<kUp>(c.whole), carry, last<kUp>(x));
  return y;
}

// f(vector, its number) in the order of the recurrence.
template <bool kUp, class F>
inline INLINE void along(F32 (&a)[kTileVectors], const F& f) {
#pragma GCC unroll 8
  for (int n = 0; n < kTileVectors; ++n) {
    const int k = kUp ? n : kTileVectors - 1 - n;
    a[k] = f(a[k], k);
  }
}

// The half of a vector that the recurrence meets first, then the other one.
template <bool kUp, class F>
inline INLINE F32 halves(F32 a, const F& f) {
  F64 lower = lower_f64(a), upper = upper_f64(a);
  if (kUp) lower = f(lower, false), upper = f(upper, true);
  else upper = f(upper, true), lower = f(lower, false);
  return to_f32(lower, upper);
}

#define FROM_TILE {a0, a1, a2, a3, a4, a5, a6, a7}
#define NEXT_TILE(a) return i[1].run(i + 1, t, a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7])

// c is the same for all tokens that count.
template <bool kUp, class Tokens>
void scan_same(FASTREWARD_TILE) {
  const double same = *reinterpret_cast<const double*>(i->x);
  if (same == 0.0) NEXT;
  const Tokens tokens(t);
  double& carried = *reinterpret_cast<double*>(const_cast<char*>(i->y));
  F64 carry = f64(carried);
  F32 a[kTileVectors] = FROM_TILE;
  const F64 c = f64(same), one = f64(1.0), zero = f64(0.0);
  const Products<kUp> products(c);
  along<kUp>(a, [&](F32 x, int k) INLINE {
    if (std::is_same_v<Tokens, All>) {
      return halves<kUp>(x, [&](F64 half, bool) INLINE { return scanned<kUp, false>(half, products, carry); });
    }
    const F32 counts = tokens.of(f32(1.0f), k, f32(0.0f));
    const F64 lower = select(lower_f64(counts) > zero, c, one), upper = select(upper_f64(counts) > zero, c, one);
    return halves<kUp>(tokens.of(x, k, f32(0.0f)), [&](F64 half, bool high) INLINE {
      return scanned<kUp, false>(half, Products<kUp>(high ? upper : lower), carry);
    });
  });
  store_n(&carried, carry, 1);
  NEXT_TILE(a);
}

template <bool kUp, class Tokens, class C>
void scan(FASTREWARD_TILE) {
  const C coefficients(i->x, t);
  const Tokens tokens(t);
  double& carried = *reinterpret_cast<double*>(const_cast<char*>(i->y));
  F64 carry = f64(carried);
  F32 a[kTileVectors] = FROM_TILE;
  along<kUp>(a, [&](F32 x, int k) INLINE {
    const F32 c = tokens.of(coefficients[k], k, f32(1.0f));
    return halves<kUp>(tokens.of(x, k, f32(0.0f)), [&](F64 half, bool high) INLINE {
      return scanned<kUp, true>(half, Products<kUp>(high ? upper_f64(c) : lower_f64(c)), carry);
    });
  });
  store_n(&carried, carry, 1);
  NEXT_TILE(a);
}

// The x of the last token before that counts.
template <bool kUp, class Tokens>
void shift(FASTREWARD_TILE) {
  constexpr int kFirst = kUp ? 0 : kTile - 1, kStep = kUp ? 1 : -1;
  const Tokens tokens(t);
  float& carried = *reinterpret_cast<float*>(const_cast<char*>(i->y));
  F32 a[kTileVectors] = FROM_TILE;
  float x[kTile], counts[kTile];
  for (int k = 0; k < kTileVectors; ++k) {
    store(x + k * kF32, a[k]);
    if (!std::is_same_v<Tokens, All>) store(counts + k * kF32, tokens.of(f32(1.0f), k, f32(0.0f)));
  }
  float before = carried;
  for (int n = 0; n < kTile; ++n) {
    const int j = kFirst + n * kStep;
    const float here = x[j];
    x[j] = before;
    before = std::is_same_v<Tokens, All> || counts[j] != 0.0f ? here : before;
  }
  carried = before;
  for (int k = 0; k < kTileVectors; ++k) a[k] = load(x + k * kF32);
  NEXT_TILE(a);
}

template <bool kUp, class Tokens>
Operator scan_by(Place c) {
  if (c == Place::sequence) return &scan_same<kUp, Tokens>;
  return c == Place::slot ? &scan<kUp, Tokens, Slot> : &scan<kUp, Tokens, Far>;
}

template <bool kUp>
Operator scan_of(Variant v) {
  return v.masked ? scan_by<kUp, Counting>(v.x) : scan_by<kUp, All>(v.x);
}
template <bool kUp>
Operator shift_of(Variant v) {
  return v.masked ? &shift<kUp, Counting> : &shift<kUp, All>;
}

}  // namespace

Operator scan_operator(TokenOp op, Variant v) {
  switch (op) {
    case TokenOp::k_scan: return scan_of<true>(v);
    case TokenOp::k_scan_reverse: return scan_of<false>(v);
    case TokenOp::k_shift: return shift_of<true>(v);
    case TokenOp::k_shift_reverse: return shift_of<false>(v);
    default: return nullptr;
  }
}

}  // namespace fastreward::FASTREWARD_ISA::program
