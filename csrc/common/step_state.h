// The scalar work of one optimizer step: formula and layout in megapar/ops/step_state.py. One thread does it, on any device.

#pragma once

#include <cmath>
#include <cstdint>

#include "function.h"

namespace megapar {

// One row of `scalars`, float64.
struct StepScalars {
  double grad_scale, grad_norm, skip, loss_scale, growth, hysteresis;
};

// One row of `counters`, float64.
struct StepCounter {
  double step, step_scale, root_scale;
};

// How the loss scale moves; growth_interval 0 means that it does not.
struct LossScaling {
  double growth_factor, backoff_factor;
  int64_t growth_interval, hysteresis;
  double min_scale;
};

// total: sum of squares of the scaled gradient sums, and how many of their elements are not finite. max_norm < 0 means no clipping.
MEGAPAR_FN void finish_gradients(StepScalars& state, const double* total, double count, double max_norm) {
  const double scale = 1 / (state.loss_scale * count);
  state.grad_norm = std::sqrt(total[0]) * scale;
  const double clip = max_norm < 0 ? 1 : std::fmin(1.0, max_norm / (state.grad_norm + 1e-6));
  state.grad_scale = double(float(clip * scale));
  state.skip = total[1] > 0 || !std::isfinite(total[0]);
}

// Backs off after `hysteresis` steps with a gradient that is not finite, without a finite one between them, and after each further one.
MEGAPAR_FN void move_loss_scale(StepScalars& state, const LossScaling& how) {
  if (how.growth_interval == 0) return;
  if (state.skip != 0) {
    state.growth = 0;
    state.hysteresis -= 1;
    if (state.hysteresis <= 0) state.loss_scale = std::fmax(how.min_scale, double(float(state.loss_scale * how.backoff_factor)));
    return;
  }
  state.hysteresis = double(how.hysteresis);
  state.growth += 1;
  if (state.growth < double(how.growth_interval)) return;
  state.growth = 0;
  const float grown = float(state.loss_scale * how.growth_factor);
  if (std::isfinite(grown)) state.loss_scale = double(grown);
}

// 1 - beta^step. Taken from the power it would have no more digits than the power has beyond those of 1:
// tests/ops/test_step_state.py::test_bias_corrections_far_along.
MEGAPAR_FN double complement_of_power(double beta, double step) { return -std::expm1(step * std::log1p(beta - 1)); }

MEGAPAR_FN void advance(StepCounter& counter, double beta1, double beta2) {
  counter.step += 1;
  counter.step_scale = 1 / complement_of_power(beta1, counter.step);
  counter.root_scale = 1 / std::sqrt(complement_of_power(beta2, counter.step));
}

}  // namespace megapar
