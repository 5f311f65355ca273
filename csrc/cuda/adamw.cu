// AdamW of any number of tensors in one launch. Formula: megapar/ops/adamw.py; arithmetic: csrc/common/adamw.inl, the CPU's.
//
// Bytes a parameter: each stream once, 128 bits an access. fp32 28; bf16 weight and gradient with fp32 master 28, with a remainder 26, with
// neither 22; fp32 gradients 2 more; bf16 moments 8 less. The roofline is the bytes over the memory's bandwidth.
//
// Launch: a block of 256 threads for each chunk; a thread updates 8 consecutive elements (4 where all is fp32), so that 16 bits are one
// access and fp32 two. What changes from step to step is read from device memory: a captured CUDA graph may be replayed.

#include "../common/adamw.h"

#include <cmath>
#include <type_traits>

#include "kernels.h"
#include "launch.h"
#include "vector.cuh"

namespace megapar::cuda {
namespace {

using std::sqrt;
#include "../common/adamw.inl"

constexpr int THREADS = 256;

// In the place of a master's type.
struct none {};

// Random bits of consecutive elements, from element `begin` of the tensor on.
template <int VECTOR>
__device__ inline void draw(uint32_t (&random)[VECTOR], const AdamwEntry& e, int64_t begin, uint64_t key) {
  // The division, which costs more than the update does, only for a part of a logical tensor.
  const int64_t row = e.columns < e.numel ? begin / e.columns : 0;
  int64_t column = begin - row * e.columns;
  uint64_t index = uint64_t(e.base) + uint64_t(row) * uint64_t(e.stride) + uint64_t(column);
#pragma unroll
  for (int k = 0; k < VECTOR; ++k) {
    random[k] = noise(uint32_t(index), uint32_t(index >> 32), key);
    ++index;
    if (++column == e.columns) index += uint64_t(e.stride - e.columns), column = 0;
  }
}

// What is kept in T alone: fp32 whole, 16 bits to nearest or, in bf16, with the low 16 of `random`.
template <bool STOCHASTIC, class T>
__device__ inline T rounded(float x, uint32_t random) {
  if constexpr (STOCHASTIC && std::is_same_v<T, bf16>)
    return {uint16_t(round_stochastically(bits_of(x), random & 0xFFFFu))};
  else
    return round_to<T>(x);
}

template <class Weight, class Grad, class Master, class Moment, bool STOCHASTIC>
__global__ void __launch_bounds__(THREADS, 3)
    adamw_kernel(const AdamwEntry* tensors, const Chunk* chunks, int64_t chunk_size, const StepScalars* scalars,
                 const StepCounter* counters, const double* lr_scale, AdamwOptions options, uint64_t seed) {
  constexpr bool SPLIT = std::is_same_v<Master, int16_t>, WIDE = std::is_same_v<Master, float>;
  constexpr int VECTOR = sizeof(Weight) == 4 && sizeof(Grad) == 4 && sizeof(Moment) == 4 ? 4 : 8;
  if (scalars->skip != 0) return;
  const Chunk chunk = chunks[blockIdx.x];
  const AdamwEntry e = tensors[chunk.tensor];
  const StepCounter counter = counters[e.row];
  const Coefficients c = coefficients_of(options, *scalars, counter, lr_scale == nullptr ? 1.0 : *lr_scale);
  const uint64_t key = STOCHASTIC ? noise_key(seed, uint64_t(counter.step), uint64_t(e.id)) : 0;

  Weight* const weight = static_cast<Weight*>(e.weight);
  const Grad* const grad = static_cast<const Grad*>(e.grad);
  Moment *const exp_avg = static_cast<Moment*>(e.exp_avg), *const exp_avg_sq = static_cast<Moment*>(e.exp_avg_sq);
  const bool vectors = aligned(reinterpret_cast<uintptr_t>(weight) | reinterpret_cast<uintptr_t>(grad) |
                               reinterpret_cast<uintptr_t>(e.master) | reinterpret_cast<uintptr_t>(exp_avg) |
                               reinterpret_cast<uintptr_t>(exp_avg_sq));

  const int64_t begin = chunk.index * chunk_size, end = begin + chunk_size < e.numel ? begin + chunk_size : e.numel;
  for (int64_t i = begin + int64_t(threadIdx.x) * VECTOR; i < end; i += THREADS * VECTOR) {
    const int size = end - i < VECTOR ? int(end - i) : VECTOR;
    const Place at = {i, size, vectors && size == VECTOR};
    Grad g[VECTOR];
    Weight w16[VECTOR];
    int16_t remainder[VECTOR];
    float w[VECTOR];
    Moment m_kept[VECTOR], v_kept[VECTOR];
    load(g, grad, at);
    load(m_kept, exp_avg, at);
    load(v_kept, exp_avg_sq, at);
    if constexpr (WIDE) {
      load(w, static_cast<const float*>(e.master), at);
    } else {
      load(w16, static_cast<const Weight*>(weight), at);
      if constexpr (SPLIT) load(remainder, static_cast<const int16_t*>(e.master), at);
    }
    uint32_t random[VECTOR] = {};
    if constexpr (STOCHASTIC) draw(random, e, i, key);
#pragma unroll
    for (int k = 0; k < VECTOR; ++k) {
      if constexpr (SPLIT)
        w[k] = float_of(join(uint32_t(w16[k].bits), uint32_t(uint16_t(remainder[k]))));
      else if constexpr (!WIDE)
        w[k] = to_float(w16[k]);
      float m = to_float(m_kept[k]), v = to_float(v_kept[k]);
      w[k] = adamw_update(to_float(g[k]), w[k], m, v, c);
      m_kept[k] = rounded<STOCHASTIC, Moment>(m, random[k] >> 16);
      v_kept[k] = rounded<STOCHASTIC, Moment>(v, mix(random[k]));
      if constexpr (SPLIT) {
        const uint32_t u = bits_of(w[k]);
        w16[k].bits = uint16_t(split_high(w[k], u)), remainder[k] = int16_t(u);
      } else {
        w16[k] = rounded<STOCHASTIC && !WIDE, Weight>(w[k], random[k]);
      }
    }
    store(exp_avg, m_kept, at);
    store(exp_avg_sq, v_kept, at);
    store(weight, w16, at);
    if constexpr (WIDE) store(static_cast<float*>(e.master), w, at);
    if constexpr (SPLIT) store(static_cast<int16_t*>(e.master), remainder, at);
  }
}

using Kernel = decltype(&adamw_kernel<float, float, none, float, false>);

// The kernel for the dtypes, nullptr where there is none; each step of the choice fixes one type.
template <class Weight, class Grad, class Master, class Moment>
Kernel kernel_of(bool stochastic) {
  // What rounds stochastically is kept in bf16 alone.
  if constexpr (std::is_same_v<Moment, bf16> || (std::is_same_v<Weight, bf16> && std::is_same_v<Master, none>)) {
    if (stochastic) return adamw_kernel<Weight, Grad, Master, Moment, true>;
  }
  return adamw_kernel<Weight, Grad, Master, Moment, false>;
}

template <class Weight, class Grad, class Master>
Kernel kernel_of(const AdamwDtypes& t, bool stochastic) {
  if (t.moment == Dtype::fp32) return kernel_of<Weight, Grad, Master, float>(stochastic);
  return t.moment == Dtype::bf16 ? kernel_of<Weight, Grad, Master, bf16>(stochastic) : nullptr;
}

template <class Weight, class Grad>
Kernel kernel_of(const AdamwDtypes& t, bool stochastic) {
  if (t.master == Dtype::none) return kernel_of<Weight, Grad, none>(t, stochastic);
  if constexpr (sizeof(Weight) == 2) {
    if (t.master == Dtype::fp32) return kernel_of<Weight, Grad, float>(t, stochastic);
  }
  if constexpr (std::is_same_v<Weight, bf16>) {
    if (t.master == Dtype::int16) return kernel_of<Weight, Grad, int16_t>(t, stochastic);
  }
  return nullptr;
}

template <class Weight>
Kernel kernel_of(const AdamwDtypes& t, bool stochastic) {
  if (t.grad == Dtype::fp32) return kernel_of<Weight, float>(t, stochastic);
  if (t.grad == Dtype::bf16) return kernel_of<Weight, bf16>(t, stochastic);
  return t.grad == Dtype::fp16 ? kernel_of<Weight, fp16>(t, stochastic) : nullptr;
}

Kernel kernel_of(const AdamwDtypes& t, bool stochastic) {
  if (t.weight == Dtype::fp32) return kernel_of<float>(t, stochastic);
  if (t.weight == Dtype::bf16) return kernel_of<bf16>(t, stochastic);
  return t.weight == Dtype::fp16 ? kernel_of<fp16>(t, stochastic) : nullptr;
}

}  // namespace

cudaError_t adamw(const AdamwDtypes& dtypes, const AdamwEntry* tensors, const Chunks& chunks, const StepScalars* scalars,
                  const StepCounter* counters, const double* lr_scale, const AdamwOptions& options, bool stochastic, uint64_t seed,
                  cudaStream_t stream) {
  const Kernel kernel = kernel_of(dtypes, stochastic);
  if (kernel == nullptr) return cudaErrorInvalidValue;
  return launch(kernel, chunks.count, THREADS, stream, tensors, chunks.data, chunks.size, scalars, counters, lr_scale, options, seed);
}

}  // namespace megapar::cuda
