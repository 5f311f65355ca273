// Functions of 16 fp32 lanes. No include guard: see every_isa.h, and tests/ops/test_cross_entropy.py::test_exp for the error stated here.

namespace megapar::MEGAPAR_ISA {

// e^x within 2.3 ulp, 3.1 x 2^-24 of itself; 0 below -103.97, infinity above 88.73. Cody and Waite's range reduction, then a polynomial fitted to the
// least relative error on |r| <= ln(2) / 2.
static inline F32 exp(F32 x) {
  const F32 clamped = max(splat(-104.0f), min(splat(89.0f), x));
  const F32 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  const F32 shifted = clamped * 1.44269504088896341f + magic;
  const F32 whole = shifted - magic;
  const F32 r = (clamped - whole * 0.693359375f) - whole * -2.12194440e-4f;
  // Degree 5, exact at 0, off by at most 9.2e-8 of e^r.
  F32 p = splat(8.289230987e-3f);
  p = p * r + 4.189817235e-2f;
  p = p * r + 1.666765362e-1f;
  p = p * r + 4.999914765e-1f;
  p = p * r + 9.999997020e-1f;
  p = p * r + 1.0f;
#if MEGAPAR_LEVEL >= 512
  return (F32)_mm512_maskz_scalef_ps(0xFFFF, (__m512)p, (__m512)whole);  // GCC 12 warns of the form without a mask
#else
  // 2^n in two factors, so that neither leaves the range of exponents before the product does.
  const I32 n = (I32)shifted - (I32)magic, half = n >> 1, rest = n - half;
  return p * (F32)((half + 127) << 23) * (F32)((rest + 127) << 23);
#endif
}

static inline F32 sigmoid(F32 x) { return 1.0f / (1.0f + exp(-x)); }

}  // namespace megapar::MEGAPAR_ISA
