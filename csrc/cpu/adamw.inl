// Formula and bytes: megapar/ops/adamw.py.

namespace megapar::MEGAPAR_ISA {

#include "../common/adamw.inl"

// Random bits of LANES elements from index `index` of the logical tensor on.
static inline U32 noise_at(uint64_t index, uint64_t key) {
  const U32 low = uint32_t(index) + U32{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const U32 wrapped = low < uint32_t(index) ? U32{} + 1u : U32{};
  return noise(low, uint32_t(index >> 32) + wrapped, key);
}

// Stores what is kept in T alone: fp32 whole, 16 bits to nearest or, in bf16, with the low 16 of `random`.
template <class T>
static inline void store_state(T* p, F32 x, int64_t n, bool stochastic, U32 random) {
  if constexpr (std::is_same_v<T, bf16>) {
    if (stochastic) return store_bits(p, round_stochastically((U32)x, random & 0xFFFFu), n);
  }
  store_upto(p, x, n);
}

// A write-only stream past the cache: a plain store would read the line first. p is a multiple of 32.
template <class T>
static inline void store_past_cache(T* p, F32 x) {
  alignas(32) T h[LANES];
  store(h, x);
#if MEGAPAR_LEVEL >= 2
  _mm256_stream_si256((__m256i*)p, _mm256_load_si256((const __m256i*)h));
#else
  std::memcpy(p, h, sizeof h);
#endif
}

template <class G, class W, class Master, class Moment>
struct Adamw {
  static constexpr bool SPLIT = std::is_same_v<Master, int16_t>, WIDE = std::is_same_v<Master, float>;

  const G* grad;
  W* weight;
  Master* master;
  Moment *exp_avg, *exp_avg_sq;
  // Copies: through a reference they would be read again for each vector, the stores might have changed them.
  Coefficients coefficients;
  bool past_cache, stochastic;
  uint64_t key;

  // Elements [i, i + n); the first of them is element `index` of the logical tensor.
  inline __attribute__((always_inline)) void step(int64_t i, int64_t n, uint64_t index) const {
    F32 m = load_upto(exp_avg + i, n), v = load_upto(exp_avg_sq + i, n), w;
    if constexpr (SPLIT) {
      w = (F32)join(load_bits(weight + i, n), load_bits(master + i, n));
    } else if constexpr (WIDE) {
      w = load_upto(master + i, n);
    } else {
      w = load_upto(weight + i, n);
    }
    w = adamw_update(load_upto(grad + i, n), w, m, v, coefficients);
    const U32 random = stochastic ? noise_at(index, key) : U32{};
    store_state(exp_avg + i, m, n, stochastic, random >> 16);
    store_state(exp_avg_sq + i, v, n, stochastic, stochastic ? mix(random) : random);
    if constexpr (SPLIT) {
      store_bits(weight + i, split_high(w, (U32)w), n);
      store_bits(master + i, (U32)w & 0xFFFFu, n);
    } else if constexpr (WIDE) {
      store_upto(master + i, w, n);
      if constexpr (sizeof(W) == 2) {
        if (past_cache && n == LANES) return store_past_cache(weight + i, w);
      }
      store_upto(weight + i, w, n);
    } else {
      store_state(weight + i, w, n, stochastic, random);
    }
  }

  // Elements [begin, end) of the entry, row by row of its place in the logical tensor.
  static void run(const AdamwEntry& e, int64_t begin, int64_t end) {
    const Adamw update = {static_cast<const G*>(e.grad),       static_cast<W*>(e.weight),
                          static_cast<Master*>(e.master),      static_cast<Moment*>(e.exp_avg),
                          static_cast<Moment*>(e.exp_avg_sq), e.coefficients,
                          e.past_cache,                        e.stochastic,
                          e.key};
    while (begin < end) {
      const int64_t row = begin / e.columns, column = begin % e.columns, stop = std::min(end, (row + 1) * e.columns);
      const uint64_t first = uint64_t(e.base) + uint64_t(row) * uint64_t(e.stride) + uint64_t(column);
      for_each_vector(begin, stop, [=](int64_t i, int64_t n) { update.step(i, n, first + uint64_t(i - begin)); });
      begin = stop;
    }
  }
};

template <class G, class W, class Master, class Moment>
AdamwBody adamw_body(G, W, Master, Moment) {
  return Adamw<G, W, Master, Moment>::run;
}

}  // namespace megapar::MEGAPAR_ISA
