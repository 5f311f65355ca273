// The scalars of AdamW, computed once a tensor: see adamw.inl and megapar/ops/adamw.py.

#pragma once

#include <cstdint>

#include "function.h"
#include "step_state.h"

namespace megapar {

// What the formula multiplies by, each computed in fp64 and rounded once.
struct Coefficients {
  float grad_scale;  // clip coefficient / (loss scale * count)
  float rate1;       // 1 - beta1
  float rate2;       // 1 - beta2
  float step_size;   // lr / (1 - beta1^t)
  float root_scale;  // 1 / sqrt(1 - beta2^t)
  float eps;
  float decay;  // lr * weight_decay where decoupled, else 0
  float l2;     // weight_decay where not
};

struct AdamwOptions {
  double lr, beta1, beta2, eps, weight_decay;
  bool decoupled;
};

// lr_scale multiplies lr: a number on the device may so move a learning rate that was given as a constant.
MEGAPAR_FN Coefficients coefficients_of(const AdamwOptions& o, const StepScalars& state, const StepCounter& counter, double lr_scale) {
  const double lr = o.lr * lr_scale;
  return {.grad_scale = float(state.grad_scale),
          .rate1 = float(1 - o.beta1),
          .rate2 = float(1 - o.beta2),
          .step_size = float(lr * counter.step_scale),
          .root_scale = float(counter.root_scale),
          .eps = float(o.eps),
          .decay = o.decoupled ? float(lr * o.weight_decay) : 0.0f,
          .l2 = o.decoupled ? 0.0f : float(o.weight_decay)};
}

// splitmix64's finaliser.
MEGAPAR_FN uint64_t mix64(uint64_t x) {
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

// What the noise of one tensor in one step depends on.
MEGAPAR_FN uint64_t noise_key(uint64_t seed, uint64_t step, uint64_t id) {
  return mix64(mix64(mix64(seed + 0x9E3779B97F4A7C15u) + step) + id);
}

}  // namespace megapar
