// Chooses the instruction set when the first op runs.
#include "kernels.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#define ST_DECLARE(isa)        \
  namespace isa {              \
  extern const Kernels table;  \
  }
ST_DECLARE(st_baseline)
#if defined(__x86_64__)
ST_DECLARE(st_avx2)
ST_DECLARE(st_avx512)
#endif

namespace {

struct Choice {
  const char* name;
  const Kernels* table;
  bool supported;
};

Choice choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const Choice choices[] = {{"avx512", &st_avx512::table, avx512},
                            {"avx2", &st_avx2::table, avx2},
                            {"baseline", &st_baseline::table, true}};
#else
  const Choice choices[] = {{"baseline", &st_baseline::table, true}};
#endif
  const char* wanted = std::getenv("ST_FAST_ISA");
  if (wanted && !*wanted) wanted = nullptr;
  std::string allowed;
  for (const Choice& choice : choices) {
    if (!choice.supported) continue;
    if (!wanted || !std::strcmp(wanted, choice.name)) return choice;
    allowed += allowed.empty() ? choice.name : std::string(", ") + choice.name;
  }
  throw std::runtime_error("ST_FAST_ISA = '" + std::string(wanted) + "': this machine allows " + allowed);
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

}  // namespace

const Kernels& kernels() { return *chosen().table; }
const char* isa_name() { return chosen().name; }

// For Python, through ctypes: the instruction set in use, or nullptr where ST_FAST_ISA names one that is not there.
extern "C" __attribute__((visibility("default"))) const char* st_fast_isa() {
  try {
    return isa_name();
  } catch (const std::runtime_error&) {
    return nullptr;
  }
}
