// How a function is declared that CPU and GPU compute alike.

#pragma once

#if defined(__CUDACC__)
#define MEGAPAR_FN __host__ __device__ inline
#else
#define MEGAPAR_FN inline
#endif
