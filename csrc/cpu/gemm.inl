// C = A B in blocks that fit the caches, for every dtype and layout; the tile in the middle is the only part that knows the instructions.
//
// Both operands are packed first, into panels of MR rows of A or NR columns of B, in units of 4 bytes. A unit is an fp32 number (fp32 and
// fp16 inputs, and bf16 where there is no dot product of bf16) or a pair of bf16 of neighbouring k. So packing, blocking and edges are one
// code, and a tile is  acc[i][j] += a[i] b[j]  with a product of two numbers, of two pairs, or of two AMX tiles of pairs.
//
// An element of C is one fp32 sum over ascending k, whatever the number of threads and wherever the element lies.

namespace megapar::MEGAPAR_ISA {

// Units of 16 lanes and 16 steps of k, either r[lane] along k or r[step] across lanes.
using Units = U32[LANES];

// At each distance half of every row changes places with its partner's.
template <int distance>
static inline void exchange(Units& r) {
  I32 low, high;
  for (int i = 0; i < LANES; ++i) {
    low[i] = i & distance ? i - distance + LANES : i;
    high[i] = i & distance ? i + LANES : i + distance;
  }
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) {
    if (i & distance) continue;
    const U32 a = r[i], b = r[i + distance];
    r[i] = __builtin_shuffle(a, b, low);
    r[i + distance] = __builtin_shuffle(a, b, high);
  }
}

static inline void transpose(Units& r) {
  exchange<8>(r);
  exchange<4>(r);
  exchange<2>(r);
  exchange<1>(r);
}

// The pieces of a unit: how 16 of them are read along k (of which `n` numbers exist), and across lanes from row p and the one behind it.
template <int k>
struct Reader;

template <>
struct Reader<1> {
  template <class T>
  static U32 along(const T* p, int64_t n) {
    return (U32)(n >= LANES ? load(p) : load(p, n));
  }
  template <class T>
  static U32 across(const T* p, const T*, int64_t n) {
    return (U32)load_upto(p, n);
  }
};

template <>
struct Reader<2> {
  static U32 along(const bf16* p, int64_t n) {
    U32 u = {};
    // A size that is known lets the compiler load a register; any other is a call.
    n >= 2 * LANES ? std::memcpy(&u, p, sizeof u) : std::memcpy(&u, p, n * sizeof(bf16));
    return u;
  }
  static U32 across(const bf16* p, const bf16* next, int64_t n) {
    const F32 low = load_upto(p, n), high = next ? load_upto(next, n) : F32{};
    return (U32)low >> 16 | (U32)high;
  }
};

// Units of a panel: whole groups of 16, the last one filled with zeros.
template <int k>
constexpr int64_t padded_units(int64_t depth) {
  return (depth + k * LANES - 1) / (k * LANES) * LANES;
}

// Reads lanes [w, w + 16) at units [u, u + 16), zeros past the width and the depth: r[lane] along k where x lies so, else r[step] across.
template <int k, class T>
static inline void read_units(const Operand<T>& x, int64_t w, int64_t u, Units& r) {
  const int64_t lanes = std::clamp<int64_t>(x.width - w, 0, LANES), rest = std::max<int64_t>(x.depth - u * k, 0);
  const T* p = x.data + w * x.stride_w + u * k * x.stride_k;
  if (x.stride_k == 1) {
    for (int64_t j = 0; j < LANES; ++j) {
      // Too many streams, too far apart, for the processor to foresee. Asked for in L2: in L1, rows a multiple of 4 KB apart would push
      // each other out before they are read.
      __builtin_prefetch(p + j * x.stride_w + 4 * k * LANES, 0, 2);
      r[j] = j < lanes ? Reader<k>::along(p + j * x.stride_w, rest) : U32{};
    }
    return;
  }
  for (int64_t i = 0; i < LANES; ++i) {
    const T* row = p + i * k * x.stride_k;
    for (int64_t ahead = 0; ahead < k; ++ahead) __builtin_prefetch(row + (k * LANES + ahead) * x.stride_k, 0, 2);
    r[i] = lanes > 0 && i * k < rest ? Reader<k>::across(row, i * k + 1 < rest ? row + x.stride_k : nullptr, lanes) : U32{};
  }
}

// Lays out W lanes from w on: unit u of lane j at out[u * W + j]; with `by_rows`, at out[(u / 16 * W + j) * 16 + u % 16].
template <int k, int64_t W, bool by_rows, class T>
static inline void pack_units(const Operand<T>& x, int64_t w, int64_t u, uint32_t* out) {
  for (int64_t group = 0; group < W; group += LANES) {
    const int64_t lanes = std::min(W - group, LANES);
    Units r;
    read_units<k>(x, w + group, u, r);
    if ((x.stride_k == 1) != by_rows) transpose(r);
    for (int64_t i = 0; i < (by_rows ? lanes : LANES); ++i)
      std::memcpy(by_rows ? out + u * W + (group + i) * LANES : out + (u + i) * W + group, &r[i], (by_rows ? LANES : lanes) * 4);
  }
}

// Packs `count` panels from panel `first` on, walking memory in the order in which it lies.
template <int k, int64_t W, bool by_rows, class T>
void pack_panels(const Operand<T>& x, int64_t first, int64_t count, uint32_t* out) {
  const int64_t units = padded_units<k>(x.depth);
  if (x.stride_k == 1) {
    for (int64_t p = 0; p < count; ++p)
      for (int64_t u = 0; u < units; u += LANES) pack_units<k, W, by_rows>(x, (first + p) * W, u, out + p * W * units);
  } else {
    for (int64_t u = 0; u < units; u += LANES)
      for (int64_t p = 0; p < count; ++p) pack_units<k, W, by_rows>(x, (first + p) * W, u, out + p * W * units);
  }
}

// Accumulators that fill the registers: 24 of 32 zmm, 12 of 16 ymm, 8 of 16 xmm.
#if MEGAPAR_LEVEL >= 512
constexpr int64_t REGISTER_ROWS = 8, REGISTER_COLUMNS = 48;
#elif MEGAPAR_LEVEL >= 2
constexpr int64_t REGISTER_ROWS = 6, REGISTER_COLUMNS = 16;
#else
constexpr int64_t REGISTER_ROWS = 2, REGISTER_COLUMNS = 16;
#endif

static inline F32 multiply_add(F32 acc, U32 a, U32 b, std::integral_constant<int, 1>) {
#if MEGAPAR_LEVEL >= 512
  return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)acc);
#else
  return acc + (F32)a * (F32)b;
#endif
}

#if MEGAPAR_LEVEL >= 513
static inline F32 multiply_add(F32 acc, U32 a, U32 b, std::integral_constant<int, 2>) {
  return (F32)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
}
#endif

// The tile on vector registers, k numbers a unit. A is read unit by unit and keeps the order in which it comes: by rows, or across them.
template <int numbers>
struct Vectors {
  static constexpr int64_t MR = REGISTER_ROWS, NR = REGISTER_COLUMNS;
  static constexpr int k = numbers;

  static bool by_rows(int64_t stride_k) { return stride_k == 1; }
  static void begin() {}
  static void end() {}

  // c [MR, NR], rows ldc apart, = (first ? 0 : c) + a b over `units`.
  template <bool by_rows>
  static void tile(const uint32_t* a, const uint32_t* b, float* c, int64_t ldc, int64_t units, bool first) {
    constexpr int64_t V = NR / LANES;
    F32 acc[MR][V];
#pragma GCC unroll 16
    for (int64_t i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int64_t j = 0; j < V; ++j) acc[i][j] = first ? F32{} : load(c + i * ldc + j * LANES);
    for (int64_t u = 0; u < units; u += LANES, a += MR * LANES) {
      for (int64_t step = 0; step < LANES; ++step, b += NR) {
        U32 row[V];
#pragma GCC unroll 4
        for (int64_t j = 0; j < V; ++j) std::memcpy(&row[j], b + j * LANES, sizeof row[j]);
#pragma GCC unroll 16
        for (int64_t i = 0; i < MR; ++i) {
          const U32 splat = (by_rows ? a[i * LANES + step] : a[step * MR + i]) - U32{};
#pragma GCC unroll 4
          for (int64_t j = 0; j < V; ++j) acc[i][j] = multiply_add(acc[i][j], splat, row[j], std::integral_constant<int, k>{});
        }
      }
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int64_t j = 0; j < V; ++j) store(c + i * ldc + j * LANES, acc[i][j]);
  }
};

// A panel of B, KC units deep, stays in half of L1 while panels of A pass; a block of C, NC wide, shares L2 with both.
constexpr int64_t KC = 128, NC = 384;

// One block of C in `scratch`, rows NC apart: `units` of k are added, or with `first` written.
template <class Kernel, bool by_rows>
void block(const uint32_t* a, int64_t a_panels, const uint32_t* b, int64_t b_panels, int64_t units, bool first, float* scratch) {
  // An empty sum. Not to the end of the last row: the second of two parts starts in its middle (tests/ops/test_amx.py).
  if (units == 0) std::memset(scratch, 0, ((a_panels * Kernel::MR - 1) * NC + b_panels * Kernel::NR) * sizeof(float));
  for (int64_t u = 0; u < units; u += KC)
    for (int64_t j = 0; j < b_panels; ++j)
      for (int64_t i = 0; i < a_panels; ++i)
        Kernel::template tile<by_rows>(a + (i * units + u) * Kernel::MR, b + (j * units + u) * Kernel::NR, scratch + i * Kernel::MR * NC + j * Kernel::NR,
                                       NC, std::min(KC, units - u), first && u == 0);
}

}  // namespace megapar::MEGAPAR_ISA
