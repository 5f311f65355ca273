// The scalars of an optimizer step: formula in megapar/ops/step_state.py, arithmetic in csrc/common/step_state.h, the CPU's.
//
// Bytes: a few hundred. Launch: one thread, all in fp64; its time is that of a launch.

#include "../common/step_state.h"

#include "kernels.h"
#include "launch.h"

namespace megapar::cuda {
namespace {

__global__ void step_state_kernel(StepScalars* scalars, StepCounter* counters, const double* total, const double* count,
                                  const StepRow* rows, int64_t row_count, double max_norm, LossScaling scaling) {
  finish_gradients(*scalars, total, *count, max_norm);
  move_loss_scale(*scalars, scaling);
  if (scalars->skip != 0) return;
  for (int64_t i = 0; i < row_count; ++i) advance(counters[int64_t(rows[i].row)], rows[i].beta1, rows[i].beta2);
}

}  // namespace

cudaError_t step_state(StepScalars* scalars, StepCounter* counters, const double* total, const double* count, const StepRow* rows,
                       int64_t row_count, double max_norm, const LossScaling& scaling, cudaStream_t stream) {
  return launch(step_state_kernel, 1, 1, stream, scalars, counters, total, count, rows, row_count, max_norm, scaling);
}

}  // namespace megapar::cuda
