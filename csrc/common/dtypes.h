// 16-bit floats as bit patterns, and their conversions to and from fp32 by integer arithmetic, the same on every device.

#pragma once

#include <cstdint>
#include <cstring>

#include "function.h"

namespace megapar {

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

MEGAPAR_FN uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}

MEGAPAR_FN float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

MEGAPAR_FN float to_float(float x) { return x; }

MEGAPAR_FN float to_float(bf16 x) { return float_of(uint32_t(x.bits) << 16); }

MEGAPAR_FN float to_float(fp16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) return float_of(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
  // 2^-24 times the integer is exact for subnormals; shifting the exponent is exact for the rest.
  if (magnitude < 0x400u) return float_of(sign | bits_of(float(magnitude) * 0x1p-24f));
  return float_of(sign | ((magnitude << 13) + 0x38000000u));
}

// To nearest, ties to even; a NaN stays a NaN.
template <class T>
MEGAPAR_FN T round_to(float x);

template <>
MEGAPAR_FN float round_to<float>(float x) {
  return x;
}

template <>
MEGAPAR_FN bf16 round_to<bf16>(float x) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7FFFFFFFu) > 0x7F800000u) return {uint16_t(u >> 16 | 0x40u)};
  return {uint16_t((u + 0x7FFFu + (u >> 16 & 1u)) >> 16)};
}

template <>
MEGAPAR_FN fp16 round_to<fp16>(float x) {
  const uint32_t u = bits_of(x), sign = u >> 16 & 0x8000u, magnitude = u & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return {uint16_t(sign | 0x7E00u)};
  if (magnitude >= 0x477FF000u) return {uint16_t(sign | 0x7C00u)};  // 65520 and above
  if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 leaves the value in units of 2^-24 in the low bits, rounded to even by the addition.
    return {uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)))};
  }
  return {uint16_t(sign | ((magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u)) >> 13))};
}

}  // namespace megapar
