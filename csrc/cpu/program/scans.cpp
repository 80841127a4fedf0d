// Token operators along a sequence: y_t = x_t + c_t y_(t-1), and the neighbour's value; from either end.
//
// A vector is scanned in log steps of (c, x), then takes what the vectors before it carry, in f64, as what is small at
// one token may be added to thousands. Where c is the same for all tokens the steps are in f32. Tokens that do not count
// are (1, 0), which changes no bit of the others: so neither padding nor whether a tile is whole matters.
#include <type_traits>

#include "cpu/program/tile.hpp"
#include "cpu/simd/neighbours.hpp"

namespace fastreward::FASTREWARD_ISA::program {
namespace {

struct All {
  explicit All(const Tile*) {}
  F32 of(F32 a, int, F32) const { return a; }
  int count(int) const { return kF32; }
};
struct Counting {
  Mask words;
  explicit Counting(const Tile* t) : words(t, 0) {}
  F32 of(F32 a, int k, F32 otherwise) const { return select(words[k], a, otherwise); }
  int count(int k) const { return __builtin_popcount(words.word(k)); }
};

// A vector's maps y -> c y + x, joined from one end of it to each lane: first the products, which the x need.
template <bool kUp>
struct Products {
  F64 step[3], whole;
  explicit Products(F64 c) {
    const F64 one = f64(1.0);
    step[0] = c, c = c * taken<kUp, 0>(c, one);
    step[1] = c;
    if constexpr (kF64 > 2) c = c * taken<kUp, 1>(c, one);
    step[2] = c;
    if constexpr (kF64 > 4) c = c * taken<kUp, 2>(c, one);
    whole = c;
  }
};

// x + c y; a c of 0 starts anew, whatever y is.
inline F64 joined(F64 c, F64 y, F64 x) { return select(c == f64(0.0), x, fma(c, y, x)); }

template <bool kUp>
inline F64 scanned(F64 x, const Products<kUp>& c, F64& carry) {
  x = joined(c.step[0], taken<kUp, 0>(x), x);
  if constexpr (kF64 > 2) x = joined(c.step[1], taken<kUp, 1>(x), x);
  if constexpr (kF64 > 4) x = joined(c.step[2], taken<kUp, 2>(x), x);
  const F64 y = joined(c.whole, carry, x);
  carry = joined(last<kUp>(c.whole), carry, last<kUp>(x));
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
      return scanned<kUp>(half, Products<kUp>(high ? upper_f64(c) : lower_f64(c)), carry);
    });
  });
  store_n(&carried, carry, 1);
  NEXT_TILE(a);
}

// Steps of a vector whose tokens have these c, in f32.
template <bool kUp>
struct Steps {
  F32 step[4], whole;
  explicit Steps(F32 c) {
    const F32 one = f32(1.0f);
    step[0] = c, c = c * taken<kUp, 0>(c, one);
    step[1] = c, c = c * taken<kUp, 1>(c, one);
    step[2] = c;
    if constexpr (kF32 > 4) c = c * taken<kUp, 2>(c, one);
    step[3] = c;
    if constexpr (kF32 > 8) c = c * taken<kUp, 3>(c, one);
    whole = c;
  }
  // Within the vector.
  F32 of(F32 x) const {
    x = fma(step[0], taken<kUp, 0>(x), x);
    x = fma(step[1], taken<kUp, 1>(x), x);
    if constexpr (kF32 > 4) x = fma(step[2], taken<kUp, 2>(x), x);
    if constexpr (kF32 > 8) x = fma(step[3], taken<kUp, 3>(x), x);
    return x;
  }
};

// Powers of c: what so many tokens make of what lies before them.
struct Powers {
  double of[kF32 + 1];
  explicit Powers(double c) {
    of[0] = 1.0, of[1] = c;
    for (int n = 2; n <= kF32; ++n) of[n] = of[n / 2] * of[n - n / 2];
  }
};

struct Same {
  F32 v;
  Same(const char* x, const Tile*) : v(f32(static_cast<float>(*reinterpret_cast<const double*>(x)))) {}
  F32 operator[](int) const { return v; }
};

// c is the same for all tokens that count; one whose powers f32 does not hold goes the general way.
template <bool kUp, class Tokens>
void scan_same(FASTREWARD_TILE) {
  const double same = *reinterpret_cast<const double*>(i->x), size = same < 0.0 ? -same : same;
  if (!(size >= 1.0 / 128.0 && size <= 128.0)) return scan<kUp, Tokens, Same>(i, t, a0, a1, a2, a3, a4, a5, a6, a7);
  const Tokens tokens(t);
  double& carried = *reinterpret_cast<double*>(const_cast<char*>(i->y));
  double carry = carried;
  F32 a[kTileVectors] = FROM_TILE;
  const Powers powers(same);
  const F32 c = f32(static_cast<float>(same)), one = f32(1.0f), zero = f32(0.0f);
  const Steps<kUp> all(c);
  along<kUp>(a, [&](F32 x, int k) INLINE {
    const bool whole = std::is_same_v<Tokens, All>;
    const Steps<kUp> steps = whole ? all : Steps<kUp>(tokens.of(c, k, one));
    x = steps.of(tokens.of(x, k, zero));
    const F32 y = fma(steps.whole, f32(static_cast<float>(carry)), x);
    carry = __builtin_fma(powers.of[tokens.count(k)], carry, static_cast<double>(last<kUp>(x)));
    return y;
  });
  carried = carry;
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
