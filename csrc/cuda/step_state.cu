// The scalars of an optimizer step: formula in megapar/ops/step_state.py, arithmetic in csrc/common/step_state.h, the CPU's.
//
// Bytes: a few hundred. Launch: one thread, all in fp64; its time is that of a launch.

#include "../common/step_state.h"

#include "kernels.h"
#include "launch.h"

namespace megapar::cuda {
namespace {

__global__ void step_state_kernel(StepScalars* scalars, StepCounter* counters, const double* total, const double* count,
                                  const int64_t* rows, const double* betas, int64_t row_count, double max_norm, LossScaling scaling) {
  finish_gradients(*scalars, total, *count, max_norm);
  move_loss_scale(*scalars, scaling);
  if (scalars->skip != 0) return;
  for (int64_t i = 0; i < row_count; ++i) advance(counters[rows[i]], betas[2 * i], betas[2 * i + 1]);
}

}  // namespace

cudaError_t step_state(StepScalars* scalars, StepCounter* counters, const double* total, const double* count, const int64_t* rows,
                       const double* betas, int64_t row_count, double max_norm, const LossScaling& scaling, cudaStream_t stream) {
  return launch(step_state_kernel, 1, 1, stream, scalars, counters, total, count, rows, betas, row_count, max_norm, scaling);
}

}  // namespace megapar::cuda
