// Attention in blocks of queries and keys whose scores stay in cache (FlashAttention-2, arXiv:2307.08691). Formulas: megapar/ops/attention.py.

#include "attention_blocks.inl"

namespace megapar::MEGAPAR_ISA {

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
  // exp(-inf - 0) = 0 is the right weight while all scores have been -inf, exp(-inf + inf) would be NaN
  // (tests/ops/test_attention.py::test_infinitely_far_keys).
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

}  // namespace megapar::MEGAPAR_ISA

#include "attention_backward.inl"

namespace megapar::MEGAPAR_ISA {

// In units, of a thread.
template <class T>
int64_t attention_workspace(int64_t s, int64_t d, bool backward) {
  constexpr int k = per_unit<T>;
  const Widths<k> width(s, d);
  return backward ? BackwardSpace<k>(nullptr, width, s).used : ForwardSpace<k>(nullptr, width, s).used;
}

}  // namespace megapar::MEGAPAR_ISA
