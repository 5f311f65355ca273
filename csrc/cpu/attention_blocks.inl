// What both passes of attention are made of: a tile, operands, blocks of queries and of keys.
//
// Operands are in gemm.inl's units of 4 bytes: those of a product's A lie as they come, along rows or across them; B's are packed in panels
// of NR columns.

#include "gemm.inl"

namespace megapar::MEGAPAR_ISA {

#if MEGAPAR_LEVEL >= 512
constexpr int64_t MR = 6, NR = 64;
#elif MEGAPAR_LEVEL >= 2
constexpr int64_t MR = 6, NR = 16;
#else
constexpr int64_t MR = 2, NR = 16;
#endif
// Multiples of MR, NR, and of 16 units. Their scores and what is made of them share L2 with the keys.
constexpr int64_t QUERIES = 48, KEYS = 192;

// Numbers in a unit.
template <class T>
constexpr int per_unit = 1;
#if MEGAPAR_LEVEL >= 513
template <>
constexpr int per_unit<bf16> = 2;
#endif

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// c [MR, NR], rows ldc apart, = (first ? 0 : c) + a b over `units`: unit u of row i of A at a[i * row + u * unit], those of B NR apart.
template <int k>
static inline void tile(const uint32_t* a, int64_t row, int64_t unit, const uint32_t* b, float* c, int64_t ldc, int64_t units, bool first) {
  constexpr int64_t V = NR / LANES;
  F32 acc[MR][V];
#pragma GCC unroll 16
  for (int64_t i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int64_t j = 0; j < V; ++j) acc[i][j] = first ? F32{} : load(c + i * ldc + j * LANES);
  for (int64_t u = 0; u < units; ++u, a += unit, b += NR) {
    U32 columns[V];
#pragma GCC unroll 4
    for (int64_t j = 0; j < V; ++j) std::memcpy(&columns[j], b + j * LANES, sizeof columns[j]);
#pragma GCC unroll 16
    for (int64_t i = 0; i < MR; ++i) {
      const U32 splat = a[i * row] - U32{};
#pragma GCC unroll 4
      for (int64_t j = 0; j < V; ++j) acc[i][j] = multiply_add(acc[i][j], splat, columns[j], std::integral_constant<int, k>{});
    }
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int64_t j = 0; j < V; ++j) store(c + i * ldc + j * LANES, acc[i][j]);
}

// A row of numbers that a product reads as units of its A.
template <int k>
struct Row;

template <>
struct Row<1> {
  static void put(uint32_t* row, int64_t j, F32 x) { store(reinterpret_cast<float*>(row) + j, x); }
};

#if MEGAPAR_LEVEL >= 513
static inline U16 narrow(F32 x) { return (U16)_mm512_cvtneps_pbh((__m512)x); }

template <>
struct Row<2> {
  static void put(uint32_t* row, int64_t j, F32 x) {
    const U16 h = narrow(x);
    std::memcpy(reinterpret_cast<uint16_t*>(row) + j, &h, sizeof h);
  }
};
#endif

// A thread's part of the workspace, cut in pieces; from nullptr on, only their size.
struct Space {
  uint32_t* begin;
  int64_t used = 0;

  uint32_t* units(int64_t n) {
    uint32_t* at = begin ? begin + used : nullptr;
    used += round_up(n, LANES);
    return at;
  }
  float* floats(int64_t n) { return reinterpret_cast<float*>(units(n)); }
};

// Sizes in units.
template <int k>
struct Widths {
  int64_t d, of_d, of_s, padded_d;

  Widths(int64_t s, int64_t d) : d(d), of_d(padded_units<k>(d)), of_s(padded_units<k>(s)), padded_d(round_up(d, NR)) {}
};

// x [rows, d], as A reads it along d: rows of `width` units, zeros beyond d and in rows up to QUERIES.
template <int k, class T>
static void copy_rows(const T* x, int64_t stride, int64_t rows, int64_t d, int64_t width, uint32_t* out) {
  for (int64_t i = 0; i < QUERIES; ++i)
    for (int64_t u = 0; u < width; u += LANES) {
      const U32 units = i < rows && u * k < d ? Reader<k>::along(x + i * stride + u * k, d - u * k) : U32{};
      std::memcpy(out + i * width + u, &units, sizeof units);
    }
}

// x [rows, d] as B: its rows as columns, d deep; or its columns, `rows` deep.
template <int k, class T>
static void pack_transposed(const T* x, int64_t stride, int64_t rows, int64_t d, uint32_t* out) {
  pack_panels<k, NR, false>(Operand<T>{x, rows, d, stride, 1}, 0, ceil_div(rows, NR), out);
}
template <int k, class T>
static void pack_straight(const T* x, int64_t stride, int64_t rows, int64_t d, uint32_t* out) {
  pack_panels<k, NR, false>(Operand<T>{x, d, rows, 1, stride}, 0, ceil_div(d, NR), out);
}

// Queries [row, row + rows) of a sequence.
struct Block {
  int64_t row, rows;
  Range attended[QUERIES];

  Block(Spans spans, int64_t row, int64_t s) : row(row), rows(std::min(QUERIES, s - row)) {
    for (int64_t i = 0; i < QUERIES; ++i) attended[i] = i < rows ? spans.of(row + i) : Range{0, 0};
  }

  // From the first to the last of the keys in [key, key + KEYS) that queries [i, i + count) attend to, counted from `key`.
  Range keys(int64_t i, int64_t count, int64_t key) const {
    Range found = {KEYS, 0};
    for (const Range* at = attended + i; at < attended + i + count; ++at) {
      const Range here = {std::max<int64_t>(at->begin - key, 0), std::min(at->end - key, KEYS)};
      if (here.begin < here.end) found = {std::min(found.begin, here.begin), std::max(found.end, here.end)};
    }
    return found.begin < found.end ? found : Range{0, 0};
  }

  // The same of all queries and keys.
  Range keys() const {
    Range found = {std::numeric_limits<int64_t>::max(), 0};
    for (const Range& one : attended)
      if (one.begin < one.end) found = {std::min(found.begin, one.begin), std::max(found.end, one.end)};
    return found;
  }

  int64_t panels() const { return ceil_div(rows, MR); }
};

// Runs body(key, keys) for each block of keys that one of the queries attends to.
template <class Body>
static inline void for_each_keys(const Block& block, const Body& body) {
  const Range all = block.keys();
  for (int64_t key = all.begin / KEYS * KEYS; key < all.end; key += KEYS) {
    const Range keys = block.keys(0, QUERIES, key);
    if (keys.begin < keys.end) body(key, keys);
  }
}

// Whether one of [j, j + 16) is attended to.
static inline bool overlaps(int64_t j, Range keys) { return j < keys.end && j + LANES > keys.begin; }

// x where a key is attended to, else `outside`; x is at keys [j, j + 16).
static inline F32 masked(F32 x, int64_t j, Range keys, float outside) {
  if (j >= keys.begin && j + LANES <= keys.end) return x;
  const I32 lane = I32{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + int32_t(j);
  return select((lane >= int32_t(keys.begin)) & (lane < int32_t(keys.end)), x, splat(outside));
}

// out [QUERIES, KEYS] = rows of A, `of_d` units wide, times the panels of the keys from `key` on: where something is attended to.
template <int k>
static void scores(const Block& block, const uint32_t* a, const uint32_t* panels, const Widths<k>& width, int64_t key, float* out) {
  for (int64_t j = 0; j < KEYS; j += NR)
    for (int64_t i = 0; i < block.panels() * MR; i += MR) {
      const Range keys = block.keys(i, MR, key);
      if (keys.begin < j + NR && keys.end > j)
        tile<k>(a + i * width.of_d, width.of_d, 1, panels + (key + j) * width.of_d, out + i * KEYS + j, KEYS, ceil_div(width.d, k), true);
    }
}

// out [QUERIES, padded_d] += weights [QUERIES, KEYS] times rows of the keys from `key` on, packed straight.
template <int k>
static void weigh(const Block& block, const uint32_t* weights, const uint32_t* panels, const Widths<k>& width, int64_t key, float* out) {
  for (int64_t column = 0; column < width.padded_d; column += NR)
    for (int64_t i = 0; i < block.panels() * MR; i += MR) {
      const Range keys = block.keys(i, MR, key);
      if (keys.begin == keys.end) continue;
      const int64_t from = keys.begin / k, units = ceil_div(keys.end, k) - from;
      tile<k>(weights + i * (KEYS / k) + from, KEYS / k, 1, panels + column * width.of_s + (key / k + from) * NR,
              out + i * width.padded_d + column, width.padded_d, units, false);
    }
}

static inline Range whole_vectors(Range keys) { return {keys.begin / LANES * LANES, round_up(keys.end, LANES)}; }

}  // namespace megapar::MEGAPAR_ISA
