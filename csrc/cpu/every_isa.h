// Compiles the kernel file that MEGAPAR_KERNEL names once for each instruction set, into namespaces portable, avx2 and avx512.
//
// All headers that a kernel needs are included here or before, outside the pragmas: an inline function of a standard header compiled for
// AVX-512 could be the copy that the linker keeps for everyone, and crash on a processor without it. Kernel files include nothing.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../common/dtypes.h"
#include "isa.h"
#include "parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#pragma GCC diagnostic ignored "-Wpsabi"

#define MEGAPAR_ISA portable
#define MEGAPAR_LEVEL 0
#include "vec.inl"
#include "vec_math.inl"
#include MEGAPAR_KERNEL
#undef MEGAPAR_ISA
#undef MEGAPAR_LEVEL

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,lzcnt")
#define MEGAPAR_ISA avx2
#define MEGAPAR_LEVEL 2
#include "vec.inl"
#include "vec_math.inl"
#include MEGAPAR_KERNEL
#undef MEGAPAR_ISA
#undef MEGAPAR_LEVEL
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,lzcnt")
#define MEGAPAR_ISA avx512
#define MEGAPAR_LEVEL 512
#include "vec.inl"
#include "vec_math.inl"
#include MEGAPAR_KERNEL
#undef MEGAPAR_ISA
#undef MEGAPAR_LEVEL
#pragma GCC pop_options

#endif
