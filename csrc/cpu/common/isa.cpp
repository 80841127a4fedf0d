#include "cpu/common/isa.hpp"

#ifdef FASTREWARD_ONLY_ISA

namespace fastreward {
namespace {

Isa chosen_isa() { return Isa::FASTREWARD_ONLY_ISA; }

}  // namespace
}  // namespace fastreward

#else

#include <cpuid.h>

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace fastreward {
namespace {

bool has_f16c() {  // not every Clang's __builtin_cpu_supports knows the name
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}

Isa best_isa() {
  // The compiler's own cpuid code also checks that the operating system saves the wide registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::baseline;
}

Isa chosen_isa() {
  const Isa best = best_isa();
  const char* wanted = std::getenv("FASTREWARD_ISA");
  if (wanted == nullptr) return best;
  for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512})
    if (std::strcmp(wanted, isa_name(isa)) == 0 && isa <= best) return isa;
  return best;
}

}  // namespace
}  // namespace fastreward

#endif

namespace fastreward {

const char* isa_name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline";
}

Isa active_isa() {
  static const Isa isa = chosen_isa();
  return isa;
}

}  // namespace fastreward
