// AdamW (arXiv:1711.05101) of one element, or of a vector of them: formula and bytes in megapar/ops/adamw.py.
//
// No include guard and no includes: every backend includes this inside its own namespace, once per instruction set, so that the compiler
// vectorises it for that one. F is float or a vector of floats, U uint32_t or a vector of those; the backend brings sqrt(F).

// The new weight; updates both moments.
template <class F>
static inline F adamw_update(F g, F w, F& m, F& v, const Coefficients& c) {
  g = g * c.grad_scale + w * c.l2;
  m = m + (g - m) * c.rate1;
  v = v + (g * g - v) * c.rate2;
  return w - w * c.decay - m * c.step_size / (sqrt(v) * c.root_scale + c.eps);
}

// An fp32 pattern u as a bf16 pattern (its upper half, rounded half away from zero) and 16 bits of remainder (its lower half).
//
// A bijection of all 2^32 patterns. NaNs do not round: 0x7FFFFFFF would become -0. The slot of 0x7F80'8000 to 0x7F80'FFFF is that of the
// finite numbers that round to infinity, so these signalling NaNs, which no arithmetic yields, take the one that the others leave free: a
// zero with a negative remainder. benchmarks/optimizer.py --exhaustive runs through all of them.
template <class U>
static inline U split_high(U u) {
  const U high = u >> 16, magnitude = high & 0x7FFFu, carry = u >> 15 & 1u;
  const U rounded = magnitude > 0x7F80u ? high : high + carry;
  return (magnitude == 0x7F80u) & (carry == 1u) ? high & 0x8000u : rounded;
}

// The inverse; `high` and `low` hold 16 bits each.
template <class U>
static inline U join(U high, U low) {
  const U magnitude = high & 0x7FFFu, borrow = low >> 15;
  const U whole = (magnitude > 0x7F80u ? high : high - borrow) << 16 | low;
  return (magnitude == 0u) & (borrow == 1u) ? (high | 0x7F80u) << 16 | low : whole;
}

// MurmurHash3's 32-bit finaliser.
template <class U>
static inline U mix(U x) {
  x = (x ^ x >> 16) * 0x85EBCA6Bu;
  x = (x ^ x >> 13) * 0xC2B2AE35u;
  return x ^ x >> 16;
}

// 32 random bits for the element at 64-bit index (high, low) of the logical tensor.
template <class U>
static inline U noise(U low, U high, uint64_t key) {
  return mix(mix(low ^ uint32_t(key)) + (high ^ uint32_t(key >> 32)));
}

// An fp32 pattern to bf16, up with the probability that the lower half says; `random` holds 16 bits. Infinities and NaNs stay.
template <class U>
static inline U round_stochastically(U u, U random) {
  const U finite = u + random;
  return ((u & 0x7F800000u) == 0x7F800000u ? u : finite) >> 16;
}
