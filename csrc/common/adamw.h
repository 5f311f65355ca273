// The scalars of AdamW, computed once a tensor: see adamw.inl and megapar/ops/adamw.py.

#pragma once

#include <cstdint>

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

// splitmix64's finaliser.
inline uint64_t mix64(uint64_t x) {
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

// What the noise of one tensor in one step depends on.
inline uint64_t noise_key(uint64_t seed, uint64_t step, uint64_t id) {
  return mix64(mix64(mix64(seed + 0x9E3779B97F4A7C15u) + step) + id);
}

}  // namespace megapar
