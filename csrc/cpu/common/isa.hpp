// Which instruction set runs. Every csrc/cpu/*.cpp is compiled for each (FASTREWARD_ISA = baseline, avx2, avx512), or for
// FASTREWARD_ONLY_ISA alone, into namespace fastreward::<isa>; FASTREWARD_DISPATCH chooses a launcher once per call.
#pragma once

namespace fastreward {

enum class Isa { baseline = 0, avx2 = 1, avx512 = 2 };

// The best instruction set of this machine, or the lower one that the environment variable FASTREWARD_ISA names.
Isa active_isa();
const char* isa_name(Isa isa);

}  // namespace fastreward

// Declares the same functions in the namespace of every instruction set:
//     FASTREWARD_DECLARE(void f(const float* x, long n);)
#ifdef FASTREWARD_ONLY_ISA
#define FASTREWARD_DECLARE(...) \
  namespace fastreward::FASTREWARD_ONLY_ISA { __VA_ARGS__ }
#define FASTREWARD_DISPATCH(fn) ::fastreward::FASTREWARD_ONLY_ISA::fn
#else
#define FASTREWARD_DECLARE(...)                    \
  namespace fastreward::baseline { __VA_ARGS__ }   \
  namespace fastreward::avx2 { __VA_ARGS__ }       \
  namespace fastreward::avx512 { __VA_ARGS__ }
// The function pointer for the active instruction set: FASTREWARD_DISPATCH(f)(x, n)
#define FASTREWARD_DISPATCH(fn)                                                              \
  (::fastreward::active_isa() == ::fastreward::Isa::avx512 ? &::fastreward::avx512::fn       \
   : ::fastreward::active_isa() == ::fastreward::Isa::avx2 ? &::fastreward::avx2::fn         \
                                                           : &::fastreward::baseline::fn)
#endif
