// Formula and bytes: megapar/ops/rope.py.

namespace megapar::MEGAPAR_ISA {

// in and out [2 half]: a rotation by the angle, or back.
template <bool BACK, class T>
static inline void rotate(const T* in, T* out, const float* cos, const float* sin, int64_t half) {
  for_each_vector(0, half, [=](int64_t i, int64_t n) {
    const F32 a = load_upto(in + i, n), b = load_upto(in + half + i, n), c = load_upto(cos + i, n), s = load_upto(sin + i, n);
    store_upto(out + i, BACK ? a * c + b * s : a * c - b * s, n);
    store_upto(out + half + i, BACK ? b * c - a * s : b * c + a * s, n);
  });
}

// Tokens [begin, end) of one part of qkv, whose first is `packed`: to its heads, or BACK from them.
template <bool BACK, class T>
static inline void move_heads(T* packed, int64_t stride, Heads<T> heads, const float* cos, const float* sin, Range tokens, int64_t s,
                              int64_t half) {
  for (int64_t head = 0; head < heads.n; ++head)
    for (int64_t token = tokens.begin; token < tokens.end; ++token) {
      T* row = packed + token * stride + head * 2 * half;
      T* apart = heads.data + token / s * heads.b_stride + head * heads.n_stride + token % s * heads.s_stride;
      const T* from = BACK ? apart : row;
      T* to = BACK ? row : apart;
      if (heads.turns)
        rotate<BACK>(from, to, cos + token * half, sin + token * half, half);
      else
        std::memcpy(to, from, 2 * half * sizeof(T));
    }
}

// qkv: rows `stride` apart of q, k and v heads of 2 half elements each; cos, sin [t, half].
template <bool BACK, class T>
void rope_qkv(T* qkv, int64_t stride, Heads<T> q, Heads<T> k, Heads<T> v, const float* cos, const float* sin, int64_t t, int64_t s,
              int64_t half, int threads) {
  // So many tokens of one head that it is written in pieces of a page, and so few that their rows stay in cache for the other heads.
  constexpr int64_t TOKENS = 16;
  parallel(threads, [=](int thread, int count) {
    const Range mine = share(t, thread, count, TOKENS);
    for (int64_t begin = mine.begin; begin < mine.end; begin += TOKENS) {
      const Range tokens = {begin, std::min(begin + TOKENS, mine.end)};
      T* packed = qkv;
      for (const Heads<T>& heads : {q, k, v}) {
        move_heads<BACK>(packed, stride, heads, cos, sin, tokens, s, half);
        packed += heads.n * 2 * half;
      }
    }
  });
}

}  // namespace megapar::MEGAPAR_ISA
