// Formula and bytes: megapar/ops/grad_norm.py.

namespace megapar::MEGAPAR_ISA {

// a and b += the squares of the first and the last eight of LANES elements, in fp64.
template <class T>
static inline void add_squares(const T* x, F64& a, F64& b) {
  F64 low, high;
  if constexpr (std::is_same_v<T, float>) {
    // Loaded as halves: to take a register of sixteen apart costs half of the speed.
    typedef float Half __attribute__((vector_size(32)));
    Half half;
    std::memcpy(&half, x, sizeof half);
    low = __builtin_convertvector(half, F64);
    std::memcpy(&half, x + LANES / 2, sizeof half);
    high = __builtin_convertvector(half, F64);
  } else {
    low = low_half(load(x)), high = high_half(load(x));
  }
  a += low * low;
  b += high * high;
}

// a and b += the squares of two vectors of elements: of bf16, those at even and those at odd places, whose fp32 are a shift or a mask away.
template <class T>
static inline void add_squares(const T* x, F32& a, F32& b) {
  F32 first, second;
  if constexpr (std::is_same_v<T, bf16>) {
    U32 pairs;
    std::memcpy(&pairs, x, sizeof pairs);
    first = (F32)(pairs << 16), second = (F32)(pairs & 0xFFFF0000u);
  } else {
    first = load(x), second = load(x + LANES);
  }
  a += first * first;
  b += second * second;
}

// Sum of squares of n elements in fp64. There the square of any element is exact and cannot overflow, and the lanes are fixed by index: the
// same bits with and without fused multiply-add.
template <class T>
double squares_wide(const T* x, int64_t n) {
  constexpr int64_t UNROLL = 4;
  F64 sums[2 * UNROLL] = {};
  int64_t i = 0;
  for (; i + UNROLL * LANES <= n; i += UNROLL * LANES)
    for (int64_t k = 0; k < UNROLL; ++k) add_squares(x + i + k * LANES, sums[2 * k], sums[2 * k + 1]);
  for (; i < n; i += LANES) {
    T rest[LANES] = {};
    std::memcpy(rest, x + i, std::min(LANES, n - i) * sizeof(T));
    add_squares(rest, sums[0], sums[1]);
  }
  for (int64_t k = 1; k < 2 * UNROLL; ++k) sums[0] += sums[k];
  return sum(sums[0]);
}

// The same of a whole chunk of 16-bit elements in fp32 lanes, which two conversions an element would make slower than memory is.
constexpr int64_t CHUNK = 4096, STREAMS = 8;
template <class T>
double squares_of_chunk(const T* x) {
  F32 sums[STREAMS] = {};
  for (int64_t i = 0; i < CHUNK; i += STREAMS * LANES)
    for (int64_t k = 0; k < STREAMS; k += 2) add_squares(x + i + k * LANES, sums[k], sums[k + 1]);
  // At most CHUNK / 128 + 3 = 35 roundings a lane, then fp64.
  const F32 lanes = ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
  const double found = sum(low_half(lanes) + high_half(lanes));
  // Below, the fp32 squares that underflow (each loses less than 2^-126) would count; above, one has overflowed or is not finite
  // (tests/ops/test_grad_norm.py::test_extremes).
  return found > 0x1p-90 && found < 0x1p120 ? found : squares_wide(x, CHUNK);
}

template <class T>
double sum_of_squares(const void* data, int64_t n) {
  const T* x = static_cast<const T*>(data);
  if constexpr (sizeof(T) == 4) {
    return squares_wide(x, n);
  } else {
    double total = 0;
    int64_t i = 0;
    for (; i + CHUNK <= n; i += CHUNK) total += squares_of_chunk(x + i);
    return total + squares_wide(x + i, n - i);
  }
}

// How many of n elements are neither inf nor nan, and how many are 0.
template <class T>
void count_elements(const void* data, int64_t n, int64_t& finite, int64_t& zeros) {
  const T* x = static_cast<const T*>(data);
  I32 finite_lanes = {}, zero_lanes = {};
  const auto add = [&](F32 values) {
    const U32 magnitude = (U32)values & 0x7FFFFFFFu;
    finite_lanes -= magnitude < 0x7F800000u;
    zero_lanes -= magnitude == 0u;
  };
  const int64_t whole = n / LANES * LANES;
  for (int64_t i = 0; i < whole; i += LANES) add(load(x + i));
  finite = zeros = 0;
  for (int64_t k = 0; k < LANES; ++k) finite += finite_lanes[k], zeros += zero_lanes[k];
  for (int64_t i = whole; i < n; ++i) finite += std::isfinite(to_float(x[i])), zeros += to_float(x[i]) == 0;
}

template <class T>
NormBodies norm_bodies(T) {
  return {sum_of_squares<T>, count_elements<T>};
}

}  // namespace megapar::MEGAPAR_ISA
