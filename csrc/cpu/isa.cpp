#include "isa.h"

#include <torch/library.h>

#include <array>
#include <cstdlib>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace megapar {
namespace {

constexpr std::array<const char*, 5> NAMES = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(__x86_64__)
// The kernel grants a process the 8 KB of tile state on request only.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
  return false;
#endif
}

Isa best() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::portable;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512vl"))
    return Isa::avx2;
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512;
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1);
  return tiles && may_use_tiles() ? Isa::amx : Isa::avx512_bf16;
}
#else
Isa best() { return Isa::portable; }
#endif

Isa chosen() {
  const Isa most = best();
  const char* asked = std::getenv("MEGAPAR_CPU_ISA");
  if (asked == nullptr || *asked == '\0') return most;
  for (size_t i = 0; i < NAMES.size(); ++i) {
    if (NAMES[i] != std::string(asked)) continue;
    TORCH_CHECK_VALUE(Isa(i) <= most, "MEGAPAR_CPU_ISA=", asked, " names instructions that this processor lacks, its best are ",
                      name_of(most), ": unset it or name a lower one");
    return Isa(i);
  }
  TORCH_CHECK_VALUE(false, "MEGAPAR_CPU_ISA=", asked, " must be one of portable, avx2, avx512, avx512_bf16, amx: correct it or unset it");
}

}  // namespace

std::string name_of(Isa isa) { return NAMES[size_t(isa)]; }

Isa isa() {
  static const Isa once = chosen();
  return once;
}

}  // namespace megapar

TORCH_LIBRARY_IMPL(megapar, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", [] { return megapar::name_of(megapar::isa()); });
}
