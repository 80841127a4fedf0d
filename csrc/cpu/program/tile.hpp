// What the token operators of programs are made of. For csrc/cpu/program/{values,masks,scans,reductions}.cpp only.
//
// A tile of eight vectors passes through the instructions in registers: each operator ends in a jump to the next one
// with the tile as its arguments, which the calling convention keeps in vector registers. So an operator costs its
// arithmetic and little else, where one sweep over a block in L1 per operator costs a load, a store and a loop as well
// (measured: nearly twice the time for the PPO loss). Masks are words of bits in memory, written and read one by one,
// since a wide load of what narrow stores have just written has to wait for them: hence `volatile`, which keeps the
// compiler from joining them.
#pragma once

#include "cpu/program/operators.hpp"

namespace fastreward::FASTREWARD_ISA::program {

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
struct Sequence {
  F32 v;
  Sequence(const char* x, const Tile*) : v(load(reinterpret_cast<const float*>(x))) {}
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
inline std::int64_t place_of(const char* y) { return reinterpret_cast<std::int64_t>(y); }  // of a mask in field x or y

// ------------------------------------------------------------------------------------------- starts and ends
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

// --------------------------------------------------------------------------------------------------------- tables
#define BY_X(kernel, ...) {&kernel<__VA_ARGS__, Slot>, &kernel<__VA_ARGS__, Sequence>, &kernel<__VA_ARGS__, Far>}
inline int number(Place place) { return static_cast<int>(place); }

// ---------------------------------------------------------------------------------------------------------- bounds
#define BINARY(Name, expression)                       \
  struct Name {                                        \
    static F32 of(F32 a, F32 x) { return expression; } \
  };
BINARY(Minimum, minimum_of(a, x))
BINARY(Maximum, maximum_of(a, x))

// max(low, min(high, a)) passes over NaN bounds and keeps a NaN, and is clip where the bounds are in order.
inline F32 clipped(F32 a, F32 low, F32 high) { return max(low, min(high, a)); }
inline F32 clipped_anyhow(F32 a, F32 low, F32 high) { return select(a < low, low, select(a > high, high, a)); }

// Bounds of the sequences.
inline bool in_order(const Instruction* i) {
  return !(*reinterpret_cast<const float*>(i->x) > *reinterpret_cast<const float*>(i->y));
}

// Operators by the file that they are in; nullptr: not there.
Operator value_operator(TokenOp op, Variant variant);
Operator mask_operator(TokenOp op, Variant variant);
Operator reduction_operator(TokenOp op, Variant variant);
Operator scan_operator(TokenOp op, Variant variant);

}  // namespace fastreward::FASTREWARD_ISA::program
