// The gradients of attention.inl, over the same blocks. Formulas: megapar/ops/attention.py.

namespace megapar::MEGAPAR_ISA {

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
  // The products outside were not computed: anything may stand there (tests/ops/test_attention.py::test_nothing_to_attend_to).
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

}  // namespace megapar::MEGAPAR_ISA
