// The launchers: raw pointers on the device and a stream, no torch. Each returns what the launch returned and waits for nothing.
//
// A list of tensors is a table with an entry each and a list of chunks, both in device memory, built by megapar/ops/multi_tensor.py: one
// launch does any number of tensors. A chunk is `chunk_size` elements (a multiple of 16) of one tensor, the last may be shorter.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../common/adamw.h"
#include "../common/step_state.h"

namespace megapar::cuda {

enum class Dtype { fp32, bf16, fp16, int16, none };

struct Chunk {
  int32_t tensor, index;  // elements [index * chunk_size, (index + 1) * chunk_size) of tensors[tensor]
};

struct Chunks {
  const Chunk* data;
  int64_t count, size;
};

// One parameter. Its element i is element base + i / columns * stride + i % columns of the logical tensor.
struct AdamwEntry {
  void* weight;
  const void* grad;
  void *master, *exp_avg, *exp_avg_sq;
  int64_t numel, row, id, base, columns, stride;
};

struct AdamwDtypes {
  Dtype weight, grad, master, moment;  // master: none, fp32 beside 16 bits, or int16 beside bf16; moment: fp32 or bf16
};

// seed: of stochastic rounding, where `stochastic`. lr_scale: one number, or nullptr.
cudaError_t adamw(const AdamwDtypes& dtypes, const AdamwEntry* tensors, const Chunks& chunks, const StepScalars* scalars,
                  const StepCounter* counters, const double* lr_scale, const AdamwOptions& options, bool stochastic, uint64_t seed,
                  cudaStream_t stream);

struct GradEntry {
  const void* data;
  int64_t numel, first;  // first: where its partial sums begin, one a chunk
};

// Over a chunk, a tensor or a list: as `total` in megapar/ops/grad_norm.py.
struct GradSums {
  double squares, nonfinite, zeros;
};

// partials[tensors[t].first + k] = sums over chunk k of tensor t, for the chunks of the list.
cudaError_t grad_norm_chunks(Dtype dtype, const GradEntry* tensors, const Chunks& chunks, bool count_zeros, GradSums* partials,
                             cudaStream_t stream);

// sums[t] = the partial sums of tensor t, added; total += sums[0], then sums[1], ...
cudaError_t grad_norm_total(const GradEntry* tensors, int64_t count, int64_t chunk_size, const GradSums* partials, GradSums* sums,
                            GradSums* total, cudaStream_t stream);

struct StepRow {
  double row, beta1, beta2;
};

// counters[rows[i].row] is advanced. max_norm < 0: no clipping.
cudaError_t step_state(StepScalars* scalars, StepCounter* counters, const double* total, const double* count, const StepRow* rows,
                       int64_t row_count, double max_norm, const LossScaling& scaling, cudaStream_t stream);

}  // namespace megapar::cuda
