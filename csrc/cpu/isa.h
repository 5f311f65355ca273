// Which instruction set the kernels use: the best that this processor has, or a lower one that MEGAPAR_CPU_ISA names.

#pragma once

#include <string>

namespace megapar {

// Each has all that those before it have. avx512 is F, BW, DQ and VL; amx is AMX-TILE and AMX-BF16.
enum class Isa { portable, avx2, avx512, avx512_bf16, amx };

// Throws c10::ValueError where MEGAPAR_CPU_ISA names none or one that this processor lacks.
Isa isa();

std::string name_of(Isa isa);

// Calls the body of `function` for this processor: avx512_bf16 and amx use that of avx512, where a kernel has none of its own.
#if defined(__x86_64__)
#define MEGAPAR_DISPATCH(function, ...)                                  \
  (::megapar::isa() >= ::megapar::Isa::avx512 ? avx512::function(__VA_ARGS__) \
   : ::megapar::isa() == ::megapar::Isa::avx2 ? avx2::function(__VA_ARGS__)   \
                                              : portable::function(__VA_ARGS__))
// The same for a kernel that has a body of its own for each.
#define MEGAPAR_DISPATCH_BF16(function, ...)                                       \
  (::megapar::isa() == ::megapar::Isa::amx           ? amx::function(__VA_ARGS__)         \
   : ::megapar::isa() == ::megapar::Isa::avx512_bf16 ? avx512_bf16::function(__VA_ARGS__) \
                                                     : MEGAPAR_DISPATCH(function, __VA_ARGS__))
#else
#define MEGAPAR_DISPATCH(function, ...) (portable::function(__VA_ARGS__))
#define MEGAPAR_DISPATCH_BF16(function, ...) (portable::function(__VA_ARGS__))
#endif

}  // namespace megapar
