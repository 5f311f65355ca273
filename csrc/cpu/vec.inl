// Vectors of 16 fp32 lanes in the compiler's own vector types: one zmm register, two ymm, or four of 128 bits. No include guard: see
// every_isa.h. Everything is loaded to fp32 and stored by round to nearest even.

namespace megapar::MEGAPAR_ISA {

constexpr int64_t LANES = 16;

typedef float F32 __attribute__((vector_size(64)));
typedef int32_t I32 __attribute__((vector_size(64)));
typedef uint32_t U32 __attribute__((vector_size(64)));
typedef uint16_t U16 __attribute__((vector_size(32)));

static inline F32 splat(float x) { return x - F32{}; }

static inline F32 select(I32 mask, F32 yes, F32 no) { return mask ? yes : no; }

// b where either is NaN. GCC does not find the instruction in the comparison.
static inline F32 max(F32 a, F32 b) {
#if MEGAPAR_LEVEL >= 512
  return (F32)_mm512_maskz_max_ps(0xFFFF, (__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

static inline F32 min(F32 a, F32 b) {
#if MEGAPAR_LEVEL >= 512
  return (F32)_mm512_maskz_min_ps(0xFFFF, (__m512)a, (__m512)b);
#else
  return a < b ? a : b;
#endif
}

static inline F32 sqrt(F32 x) {
#if MEGAPAR_LEVEL >= 512
  return (F32)_mm512_sqrt_ps((__m512)x);
#else
  F32 y;
  for (int i = 0; i < LANES; ++i) y[i] = std::sqrt(x[i]);
  return y;
#endif
}

// Sum of the lanes, always in the same order.
static inline float sum(F32 x) {
  float s[LANES];
  std::memcpy(s, &x, sizeof s);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) s[i] += s[i + width];
  return s[0];
}

static inline float max(F32 x) {
  float most = x[0];
  for (int i = 1; i < LANES; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

static inline F32 load(const float* p) {
  F32 x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

// 16 bits to 32, zeros above. gcc 12 makes five instructions of __builtin_convertvector where one does it.
static inline U32 widen(U16 h) {
#if MEGAPAR_LEVEL >= 512
  return (U32)_mm512_maskz_cvtepu16_epi32(0xFFFF, (__m256i)h);
#else
  return __builtin_convertvector(h, U32);
#endif
}

static inline F32 load(const bf16* p) {
  U16 h;
  std::memcpy(&h, p, sizeof h);
  return (F32)(widen(h) << 16);
}

static inline F32 load(const fp16* p) {
#if MEGAPAR_LEVEL >= 512
  return (F32)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif MEGAPAR_LEVEL >= 2
  F32 x;
  const __m256 half[2] = {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))};
  std::memcpy(&x, half, sizeof x);
  return x;
#else
  F32 x;
  for (int i = 0; i < LANES; ++i) x[i] = to_float(p[i]);
  return x;
#endif
}

static inline void store(float* p, F32 x) { std::memcpy(p, &x, sizeof x); }

static inline void store(bf16* p, F32 x) {
  const U32 u = (U32)x, rounded = u + 0x7FFFu + (u >> 16 & 1u), quiet = u | 0x400000u;
  const U32 bits = x != x ? quiet : rounded;
  const U16 h = __builtin_convertvector(bits >> 16, U16);
  std::memcpy(p, &h, sizeof h);
}

static inline void store(fp16* p, F32 x) {
#if MEGAPAR_LEVEL >= 512
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif MEGAPAR_LEVEL >= 2
  __m256 half[2];
  std::memcpy(half, &x, sizeof x);
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(half[0], _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128((__m128i*)p + 1, _mm256_cvtps_ph(half[1], _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < LANES; ++i) p[i] = round_to<fp16>(x[i]);
#endif
}

// The first n < LANES elements, zeros behind them.
template <class T>
static inline F32 load(const T* p, int64_t n) {
  T part[LANES] = {};
  std::memcpy(part, p, n * sizeof(T));
  return load(part);
}

template <class T>
static inline void store(T* p, F32 x, int64_t n) {
  T part[LANES];
  store(part, x);
  std::memcpy(p, part, n * sizeof(T));
}

// Runs body(offset, count) over [begin, end): whole vectors have count LANES, a compile-time constant after inlining.
template <class Body>
static inline __attribute__((always_inline)) void for_each_vector(int64_t begin, int64_t end, const Body& body) {
  int64_t i = begin;
  for (; i + LANES <= end; i += LANES) body(i, LANES);
  if (i < end) body(i, end - i);
}

template <class T>
static inline F32 load_upto(const T* p, int64_t n) {
  return n == LANES ? load(p) : load(p, n);
}

template <class T>
static inline void store_upto(T* p, F32 x, int64_t n) {
  n == LANES ? store(p, x) : store(p, x, n);
}

// x with `fill` in the lanes from n on.
static inline F32 pad(F32 x, int64_t n, float fill) {
  const I32 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return n == LANES ? x : select(lane < int32_t(n), x, splat(fill));
}

// Sum over [0, size) of body(offset, count), which gives zeros beyond count. Four chains of additions, joined always in the same order.
template <class Body>
static inline __attribute__((always_inline)) float sum_over(int64_t size, const Body& body) {
  F32 s[4] = {};
  int64_t i = 0;
  for (; i + 4 * LANES <= size; i += 4 * LANES)
    for (int64_t j = 0; j < 4; ++j) s[j] += body(i + j * LANES, LANES);
  for_each_vector(i, size, [&](int64_t at, int64_t n) { s[0] += body(at, n); });
  return sum((s[0] + s[1]) + (s[2] + s[3]));
}

// Eight fp64 lanes: half of an F32.
typedef double F64 __attribute__((vector_size(64)));

// The first and the last eight lanes in fp64.
static inline F64 low_half(F32 x) { return __builtin_convertvector(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7), F64); }

static inline F64 high_half(F32 x) { return __builtin_convertvector(__builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15), F64); }

// Sum of the lanes, always in the same order.
static inline double sum(F64 x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

// n 16-bit patterns widened to 32 bits, zeros behind them; and back.
static inline U32 load_bits(const void* p, int64_t n) {
  U16 h = {};
  n == LANES ? std::memcpy(&h, p, sizeof h) : std::memcpy(&h, p, n * sizeof(uint16_t));
  return widen(h);
}

static inline void store_bits(void* p, U32 bits, int64_t n) {
  const U16 h = __builtin_convertvector(bits, U16);
  n == LANES ? std::memcpy(p, &h, sizeof h) : std::memcpy(p, &h, n * sizeof(uint16_t));
}

}  // namespace megapar::MEGAPAR_ISA
