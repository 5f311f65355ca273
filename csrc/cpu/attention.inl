// Attention in blocks of queries and keys whose scores stay in cache (FlashAttention-2, arXiv:2307.08691). Formulas: megapar/ops/attention.py.
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

// The softmax of a query so far: the largest score and the sum of exp(score - top).
struct Softmax {
  float top = -std::numeric_limits<float>::infinity(), sum = 0;
};

// Turns a row of scores at `keys` into weights relative to the largest score so far, in `row` over all of `vectors`. Returns by what earlier
// weights must be multiplied.
template <int k>
static float soften(const float* scores, Range keys, Range vectors, float scale, Softmax& so_far, uint32_t* row) {
  F32 most = splat(so_far.top);
  for (int64_t j = vectors.begin; j < vectors.end; j += LANES)
    if (overlaps(j, keys)) most = max(most, masked(load(scores + j) * scale, j, keys, so_far.top));
  const float top = max(most);
  // exp(-inf - 0) = 0 is the right weight while all scores have been -inf, exp(-inf + inf) would be NaN.
  const float base = top == -std::numeric_limits<float>::infinity() ? 0.0f : top;
  F32 total = {};
  for (int64_t j = vectors.begin; j < vectors.end; j += LANES) {
    const F32 weight = overlaps(j, keys) ? masked(exp(load(scores + j) * scale - base), j, keys, 0.0f) : F32{};
    total += weight;
    Row<k>::put(row, j, weight);
  }
  const float fade = keys.begin < keys.end ? exp(splat(so_far.top - base))[0] : 1.0f;
  so_far = {top, so_far.sum * fade + sum(total)};
  return fade;
}

static inline Range whole_vectors(Range keys) { return {keys.begin / LANES * LANES, round_up(keys.end, LANES)}; }

template <int k>
struct ForwardSpace : Space {
  uint32_t *keys, *values, *q, *weights;
  float *scores, *y;

  ForwardSpace(uint32_t* begin, const Widths<k>& width, int64_t s) : Space{begin} {
    keys = units(round_up(s, NR) * width.of_d);
    values = units(width.padded_d * width.of_s);
    q = units(QUERIES * width.of_d);
    weights = units(QUERIES * KEYS / k);
    scores = floats(QUERIES * KEYS);
    y = floats(QUERIES * width.padded_d);
  }
};

// y and lse: of the block's first query.
template <int k, class T>
static void attend(const Block& block, const Widths<k>& width, const ForwardSpace<k>& space, float scale, T* y, int64_t y_stride, float* lse) {
  Softmax softmax[QUERIES];
  std::memset(space.y, 0, QUERIES * width.padded_d * sizeof(float));
  for_each_keys(block, [&](int64_t key, Range) {
    scores<k>(block, space.q, space.keys, width, key, space.scores);
    for (int64_t i = 0; i < block.panels() * MR; ++i) {
      const Range vectors = whole_vectors(block.keys(i / MR * MR, MR, key));
      const float fade = soften<k>(space.scores + i * KEYS, block.keys(i, 1, key), vectors, scale, softmax[i], space.weights + i * (KEYS / k));
      float* row = space.y + i * width.padded_d;
      if (fade != 1.0f)
        for (int64_t j = 0; j < width.padded_d; j += LANES) store(row + j, load(row + j) * fade);
    }
    weigh<k>(block, space.weights, space.values, width, key, space.y);
  });
  for (int64_t i = 0; i < block.rows; ++i) {
    const float sum = softmax[i].sum, share = sum != 0.0f ? 1.0f / sum : 0.0f;
    lse[i] = softmax[i].top + std::log(sum);
    for_each_vector(0, width.d, [&](int64_t j, int64_t n) { store_upto(y + i * y_stride + j, load(space.y + i * width.padded_d + j) * share, n); });
  }
}

template <class T>
void attention(const AttentionArgs<T>& p) {
  constexpr int k = per_unit<T>;
  const auto [b, heads, kv_heads, s, d] = p.sizes;
  const Widths<k> width(s, d);
  parallel(p.threads, [&](int thread, int count) {
    const ForwardSpace<k> space(p.workspace + thread * ForwardSpace<k>(nullptr, width, s).used, width, s);
    const Range mine = share(b * heads, thread, count);
    for (int64_t i = mine.begin, packed = -1; i < mine.end; ++i) {
      const int64_t sequence = i / heads, head = i % heads, kv_head = head / (heads / kv_heads), wanted = sequence * kv_heads + kv_head;
      if (wanted != packed) {
        pack_transposed<k>(p.k.at(sequence, kv_head), p.k.s_stride, s, d, space.keys);
        pack_straight<k>(p.v.at(sequence, kv_head), p.v.s_stride, s, d, space.values);
        packed = wanted;
      }
      const T* q = p.q.at(sequence, head);
      T* y = p.y.at(sequence, head);
      for (int64_t row = 0; row < s; row += QUERIES) {
        const Block block(p.spans.sequence(sequence, s), row, s);
        copy_rows<k>(q + row * p.q.s_stride, p.q.s_stride, block.rows, d, width.of_d, space.q);
        attend<k>(block, width, space, p.scale, y + row * p.y.s_stride, p.y.s_stride, p.lse + i * s + row);
      }
    }
  });
}

template <int k>
struct BackwardSpace : Space {
  // Of the sequence: panels of the keys and values, and of the keys' rows; [s, padded_d], sums of their gradients.
  uint32_t *keys, *values, *key_rows;
  float *dk, *dv;
  // Of a block of queries: rows of q and dy, as A and as B; [QUERIES, padded_d], its gradient.
  uint32_t *q, *dy, *q_rows, *dy_rows;
  float* dq;
  // [QUERIES, KEYS]: scores and the gradients of weights, then in their place weights and the gradients of scores.
  float *weights, *dscores;
  // The latter two in units: [QUERIES, KEYS / k], a unit being k keys, and [QUERIES / k, KEYS], a unit being k queries.
  uint32_t *by_query, *weights_by_key, *by_key;

  BackwardSpace(uint32_t* begin, const Widths<k>& width, int64_t s) : Space{begin} {
    keys = units(round_up(s, NR) * width.of_d);
    values = units(round_up(s, NR) * width.of_d);
    key_rows = units(width.padded_d * width.of_s);
    dk = floats(round_up(s, KEYS) * width.padded_d);
    dv = floats(round_up(s, KEYS) * width.padded_d);
    q = units(QUERIES * width.of_d);
    dy = units(QUERIES * width.of_d);
    q_rows = units(width.padded_d * padded_units<k>(QUERIES));
    dy_rows = units(width.padded_d * padded_units<k>(QUERIES));
    weights = floats(QUERIES * KEYS);
    dscores = floats(QUERIES * KEYS);
    dq = floats(QUERIES * width.padded_d);
    if constexpr (k == 1) {
      // Units are numbers, and one layout serves both ways.
      weights_by_key = reinterpret_cast<uint32_t*>(weights);
      by_query = by_key = reinterpret_cast<uint32_t*>(dscores);
    } else {
      weights_by_key = units(QUERIES / k * KEYS);
      by_key = units(QUERIES / k * KEYS);
      by_query = units(QUERIES * KEYS / k);
    }
  }
};

// Query i's weights and gradients of scores at keys [j, j + 16).
struct Slope {
  F32 weight, dscore;
};

static inline Slope slope(const float* scores, const float* dweights, int64_t j, Range keys, float scale, float lse, float delta) {
  if (!overlaps(j, keys)) return {F32{}, F32{}};
  const F32 weight = masked(exp(load(scores + j) * scale - lse), j, keys, 0.0f);
  // The products outside were not computed: anything may stand there.
  return {weight, masked(weight * (load(dweights + j) - delta), j, keys, 0.0f)};
}

// From scores and the gradients of weights to weights and the gradients of scores, at `vectors` of the keys from `key` on.
template <int k>
static void differentiate(const Block& block, const BackwardSpace<k>& space, int64_t key, Range vectors, float scale, const float* lse,
                          const float* delta) {
  for (int64_t i = 0; i < round_up(block.panels() * MR, k); i += k) {
    float *weights = space.weights + i * KEYS, *dscores = space.dscores + i * KEYS;
    const Range keys = block.keys(i, 1, key);
    for (int64_t j = vectors.begin; j < vectors.end; j += LANES) {
      const Slope one = slope(weights, dscores, j, keys, scale, lse[i], delta[i]);
      if constexpr (k == 1) {
        store(weights + j, one.weight);
        store(dscores + j, one.dscore);
      } else {
#if MEGAPAR_LEVEL >= 513
        const Slope next = slope(weights + KEYS, dscores + KEYS, j, block.keys(i + 1, 1, key), scale, lse[i + 1], delta[i + 1]);
        Row<2>::put(space.by_query + i * (KEYS / 2), j, one.dscore);
        Row<2>::put(space.by_query + (i + 1) * (KEYS / 2), j, next.dscore);
        const U32 pairs = widen(narrow(one.weight)) | widen(narrow(next.weight)) << 16;
        const U32 dpairs = widen(narrow(one.dscore)) | widen(narrow(next.dscore)) << 16;
        std::memcpy(space.weights_by_key + i / 2 * KEYS + j, &pairs, sizeof pairs);
        std::memcpy(space.by_key + i / 2 * KEYS + j, &dpairs, sizeof dpairs);
#endif
      }
    }
  }
}

// out [keys, padded_d] += weights [queries, keys]^T times the queries' rows.
template <int k>
static void collect(const Block& block, Range keys, const uint32_t* weights, const uint32_t* panels, const Widths<k>& width, float* out) {
  for (int64_t column = 0; column < width.padded_d; column += NR)
    for (int64_t i = keys.begin / MR * MR; i < keys.end; i += MR)
      tile<k>(weights + i, 1, KEYS, panels + column * padded_units<k>(block.rows), out + i * width.padded_d + column, width.padded_d,
              ceil_div(block.rows, k), false);
}

// Adds the block's part to dk and dv, and leaves that of dq in `space.dq`.
template <int k>
static void attend_backward(const Block& block, const Widths<k>& width, const BackwardSpace<k>& space, float scale, const float* lse,
                            const float* delta) {
  std::memset(space.dq, 0, QUERIES * width.padded_d * sizeof(float));
  for_each_keys(block, [&](int64_t key, Range keys) {
    scores<k>(block, space.q, space.keys, width, key, space.weights);
    scores<k>(block, space.dy, space.values, width, key, space.dscores);
    // As far as collect() reads: to whole tiles.
    const Range vectors = whole_vectors({keys.begin / MR * MR, round_up(keys.end, MR)});
    differentiate<k>(block, space, key, vectors, scale, lse, delta);
    collect<k>(block, keys, space.weights_by_key, space.dy_rows, width, space.dv + key * width.padded_d);
    collect<k>(block, keys, space.by_key, space.q_rows, width, space.dk + key * width.padded_d);
    weigh<k>(block, space.by_query, space.key_rows, width, key, space.dq);
  });
}

// [rows, d] of fp32 rows padded_d apart, times `scale`.
template <class T>
static void write_rows(const float* from, int64_t padded_d, float scale, T* to, int64_t stride, int64_t rows, int64_t d) {
  for (int64_t i = 0; i < rows; ++i)
    for_each_vector(0, d, [&](int64_t j, int64_t n) { store_upto(to + i * stride + j, load(from + i * padded_d + j) * scale, n); });
}

// All queries of a head, whose keys are packed.
template <int k, class T>
static void backward_of_head(const AttentionBackwardArgs<T>& p, const Widths<k>& width, const BackwardSpace<k>& space, int64_t sequence,
                             int64_t head) {
  const auto [b, heads, kv_heads, s, d] = p.sizes;
  const T *q = p.q.at(sequence, head), *dy = p.dy.at(sequence, head), *y = p.y.at(sequence, head);
  for (int64_t row = 0; row < s; row += QUERIES) {
    const Block block(p.spans.sequence(sequence, s), row, s);
    const T *q_rows = q + row * p.q.s_stride, *dy_rows = dy + row * p.dy.s_stride, *y_rows = y + row * p.y.s_stride;
    float lse[QUERIES] = {}, delta[QUERIES] = {};
    for (int64_t i = 0; i < block.rows; ++i) {
      lse[i] = p.lse[(sequence * heads + head) * s + row + i];
      delta[i] = sum_over(d, [&](int64_t j, int64_t n) {
        return load_upto(dy_rows + i * p.dy.s_stride + j, n) * load_upto(y_rows + i * p.y.s_stride + j, n);
      });
    }
    copy_rows<k>(q_rows, p.q.s_stride, block.rows, d, width.of_d, space.q);
    copy_rows<k>(dy_rows, p.dy.s_stride, block.rows, d, width.of_d, space.dy);
    pack_straight<k>(q_rows, p.q.s_stride, block.rows, d, space.q_rows);
    pack_straight<k>(dy_rows, p.dy.s_stride, block.rows, d, space.dy_rows);
    attend_backward<k>(block, width, space, p.scale, lse, delta);
    write_rows(space.dq, width.padded_d, p.scale, p.dq.at(sequence, head) + row * p.dq.s_stride, p.dq.s_stride, block.rows, d);
  }
}

template <class T>
void attention_backward(const AttentionBackwardArgs<T>& p) {
  constexpr int k = per_unit<T>;
  const auto [b, heads, kv_heads, s, d] = p.sizes;
  const int64_t group = heads / kv_heads;
  const Widths<k> width(s, d);
  parallel(p.threads, [&](int thread, int count) {
    const BackwardSpace<k> space(p.workspace + thread * BackwardSpace<k>(nullptr, width, s).used, width, s);
    const Range mine = share(b * kv_heads, thread, count);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const int64_t sequence = i / kv_heads, kv_head = i % kv_heads;
      const T *keys = p.k.at(sequence, kv_head), *values = p.v.at(sequence, kv_head);
      pack_transposed<k>(keys, p.k.s_stride, s, d, space.keys);
      pack_transposed<k>(values, p.v.s_stride, s, d, space.values);
      pack_straight<k>(keys, p.k.s_stride, s, d, space.key_rows);
      std::memset(space.dk, 0, s * width.padded_d * sizeof(float));
      std::memset(space.dv, 0, s * width.padded_d * sizeof(float));
      for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) backward_of_head<k>(p, width, space, sequence, head);
      write_rows(space.dk, width.padded_d, p.scale, p.dk.at(sequence, kv_head), p.dk.s_stride, s, d);
      write_rows(space.dv, width.padded_d, 1.0f, p.dv.at(sequence, kv_head), p.dv.s_stride, s, d);
    }
  });
}

// In units, of a thread.
template <class T>
int64_t attention_workspace(int64_t s, int64_t d, bool backward) {
  constexpr int k = per_unit<T>;
  const Widths<k> width(s, d);
  return backward ? BackwardSpace<k>(nullptr, width, s).used : ForwardSpace<k>(nullptr, width, s).used;
}

}  // namespace megapar::MEGAPAR_ISA
