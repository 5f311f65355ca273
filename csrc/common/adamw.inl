// AdamW (arXiv:1711.05101) of one element, or of a vector of them: formula and bytes in megapar/ops/adamw.py.
//
// No include guard and no includes: every backend includes this inside its own namespace, once per instruction set, so that the compiler
// vectorises it for that one. F is float or a vector of floats, U uint32_t or a vector of those; the backend brings sqrt(F).

// The new weight; updates both moments.
template <class F>
static MEGAPAR_FN F adamw_update(F g, F w, F& m, F& v, const Coefficients& c) {
  g = g * c.grad_scale + w * c.l2;
  m = m + (g - m) * c.rate1;
  v = v + (g * g - v) * c.rate2;
  return w - w * c.decay - m * c.step_size / (sqrt(v) * c.root_scale + c.eps);
}

// The pattern u of an fp32 number x as bf16, rounded half away from zero; the remainder is the lower half of u. A NaN does not round:
// 0x7FFFFFFF would become -0.
template <class F, class U>
static MEGAPAR_FN U split_high(F x, U u) {
  return (x != x ? u : u + 0x8000u) >> 16;
}

// The inverse, from 16 bits each: exact for what is no NaN, and for a NaN some NaN, which the arithmetic that follows makes of any.
// megapar/ops/adamw.py has the pair that keeps NaNs' bits too.
template <class U>
static MEGAPAR_FN U join(U high, U low) {
  return (high << 16 | low) - ((low & 0x8000u) << 1);
}

// MurmurHash3's 32-bit finaliser.
template <class U>
static MEGAPAR_FN U mix(U x) {
  x = (x ^ x >> 16) * 0x85EBCA6Bu;
  x = (x ^ x >> 13) * 0xC2B2AE35u;
  return x ^ x >> 16;
}

// 32 random bits for the element at 64-bit index (high, low) of the logical tensor.
template <class U>
static MEGAPAR_FN U noise(U low, U high, uint64_t key) {
  return mix(mix(low ^ uint32_t(key)) + (high ^ uint32_t(key >> 32)));
}

// An fp32 pattern to bf16, up with the probability that the lower half says; `random` holds 16 bits. Infinities and NaNs stay.
template <class U>
static MEGAPAR_FN U round_stochastically(U u, U random) {
  const U finite = u + random;
  return ((u & 0x7F800000u) == 0x7F800000u ? u : finite) >> 16;
}
