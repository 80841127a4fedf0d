// What the files of the core's test program share. A case is a function registered with CASE(name); CHECK and CHECK_NEAR
// report and go on.
#pragma once

#include <cmath>
#include <cstdio>
#include <vector>

namespace checks {

inline int failures = 0;

struct Case {
  const char* name;
  void (*run)();
};
inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}
struct Register {
  Register(const char* name, void (*run)()) { cases().push_back({name, run}); }
};

}  // namespace checks

#define CHECK(condition)                                                  \
  do {                                                                    \
    if (!(condition)) {                                                   \
      ++checks::failures;                                                 \
      std::printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
    }                                                                     \
  } while (false)

// Equal within `tolerance`, or the same infinity, or both NaN.
#define CHECK_NEAR(actual, expected, tolerance)                                                   \
  do {                                                                                            \
    const double a_ = (actual), e_ = (expected);                                                  \
    if (!(a_ == e_ || (std::isnan(a_) && std::isnan(e_)) || std::fabs(a_ - e_) <= (tolerance))) { \
      ++checks::failures;                                                                         \
      std::printf("%s:%d: %s = %.9g, expected %.9g\n", __FILE__, __LINE__, #actual, a_, e_);      \
    }                                                                                             \
  } while (false)

#define CASE(name)                                      \
  void name();                                          \
  const checks::Register register_##name(#name, &name); \
  void name()
