// Formula and bytes: megapar/ops/cross_entropy.py.

namespace megapar::MEGAPAR_ISA {

template <class T>
static inline float max_over(const T* z, int64_t v) {
  constexpr float LEAST = -std::numeric_limits<float>::infinity();
  F32 most[4] = {splat(LEAST), splat(LEAST), splat(LEAST), splat(LEAST)};
  int64_t i = 0;
  for (; i + 4 * LANES <= v; i += 4 * LANES)
    for (int64_t j = 0; j < 4; ++j) most[j] = max(most[j], load(z + i + j * LANES));
  for_each_vector(i, v, [&](int64_t at, int64_t n) { most[0] = max(most[0], pad(load_upto(z + at, n), n, LEAST)); });
  return max(max(max(most[0], most[1]), max(most[2], most[3])));
}

// logits [t, v], rows `stride` apart; index [t], negative where the target is elsewhere; out [4, t].
template <class T>
void cross_entropy_statistics(const T* logits, int64_t stride, const int64_t* index, float* out, int64_t t, int64_t v, bool with_sum,
                              int threads) {
  // A block stays in cache between its maximum and its sum, and bounds the chains of fp32 additions; blocks are joined in fp64.
  constexpr int64_t BLOCK = 4096;
  parallel(threads, [=](int thread, int count) {
    const Range rows = share(t, thread, count);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const T* z = logits + row * stride;
      float most = -std::numeric_limits<float>::infinity();
      double total = 0, sum = 0;
      for (int64_t begin = 0; begin < v; begin += BLOCK) {
        const T* block = z + begin;
        const int64_t size = v - begin < BLOCK ? v - begin : BLOCK;
        const float here = max_over(block, size), top = here > most ? here : most;
        // exp(-inf - 0) = 0 is the right term of a row that has been -inf so far, exp(-inf + inf) would be NaN.
        const float shift = top == -std::numeric_limits<float>::infinity() ? 0.0f : top;
        total = total * std::exp(double(most) - double(shift)) + sum_over(size, [=](int64_t i, int64_t n) {
                  return pad(exp(load_upto(block + i, n) - shift), n, 0.0f);
                });
        if (with_sum) sum += sum_over(size, [=](int64_t i, int64_t n) { return load_upto(block + i, n); });
        most = top;
      }
      out[row] = most;
      out[t + row] = float(total);
      out[2 * t + row] = index[row] < 0 ? 0.0f : to_float(z[index[row]]);
      out[3 * t + row] = float(sum);
    }
  });
}

// logits and out [t, v], rows `stride` and `out_stride` apart, out may be logits; dloss, index, lse and ignored [t].
template <class T>
void cross_entropy_grad(const float* dloss, const T* logits, int64_t stride, T* out, int64_t out_stride, const int64_t* index,
                        const float* lse, const bool* ignored, int64_t t, int64_t v, float smoothing, float uniform, float z_loss,
                        int threads) {
  parallel(threads, [=](int thread, int count) {
    const Range rows = share(t, thread, count);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const T* z = logits + row * stride;
      T* dz = out + row * out_stride;
      if (ignored[row]) {
        // Its logits may hold anything, also inf: 0 * nan must not reach the weights.
        std::memset(dz, 0, v * sizeof(T));
        continue;
      }
      const float shift = lse[row], factor = 1 + 2 * z_loss * shift, scale = dloss[row];
      const auto softmax = [=](F32 x) { return exp(x - shift) * factor; };
      const int64_t target = index[row];
      // Before the loop, which may overwrite the logits.
      const F32 at_target = target < 0 ? F32{} : (softmax(splat(to_float(z[target]))) + (smoothing - 1) - uniform) * scale;
      for_each_vector(0, v, [=](int64_t i, int64_t n) { store_upto(dz + i, (softmax(load_upto(z + i, n)) - uniform) * scale, n); });
      if (target >= 0) dz[target] = round_to<T>(at_target[0]);
    }
  });
}

}  // namespace megapar::MEGAPAR_ISA
