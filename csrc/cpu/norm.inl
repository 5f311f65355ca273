// RMSNorm, and LayerNorm where CENTRED. Formulas and bytes: megapar/ops/rms_norm.py and layer_norm.py. A row comes from memory once; its
// later passes find it in cache.

namespace megapar::MEGAPAR_ISA {

// Mean (0 unless CENTRED) of a row, and 1 / sqrt of its mean square about it.
struct Moments {
  float mean, rstd;
};

// In fp64, for rows whose squares leave the range of fp32 although their norm does not (tests/ops/test_rms_norm.py::test_range).
template <bool CENTRED, class T>
static __attribute__((noinline)) Moments wide_moments(const T* x, int64_t h, float eps) {
  double mean = 0, square = 0;
  if (CENTRED)
    for (int64_t i = 0; i < h; ++i) mean += double(to_float(x[i])) / double(h);
  for (int64_t i = 0; i < h; ++i) square += (double(to_float(x[i])) - mean) * (double(to_float(x[i])) - mean);
  return {float(mean), float(1 / std::sqrt(square / double(h) + double(eps)))};
}

template <bool CENTRED, class T>
static inline Moments moments(const T* x, int64_t h, float eps) {
  const float mean = CENTRED ? sum_over(h, [=](int64_t i, int64_t n) { return load_upto(x + i, n); }) / float(h) : 0.0f;
  const float square = sum_over(h, [=](int64_t i, int64_t n) {
    const F32 centred = CENTRED ? pad(load_upto(x + i, n) - mean, n, 0.0f) : load_upto(x + i, n);
    return centred * centred;
  });
  if (!(square > 1e-25f && square < 1e38f)) return wide_moments<CENTRED>(x, h, eps);
  return {mean, 1 / std::sqrt(square / float(h) + eps)};
}

// x, residual (or null), y and s (written where there is a residual) [t, h]; weight and bias (or null) [h]; mean (CENTRED) and rstd [t].
template <bool CENTRED, class T, class W>
void norm(const T* x, const T* residual, const W* weight, const W* bias, T* y, T* s, float* mean, float* rstd, int64_t t, int64_t h,
          float eps, int threads) {
  parallel(threads, [=](int thread, int count) {
    const Range rows = share(t, thread, count);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const T* in = x + row * h;
      if (residual != nullptr) {
        T* added = s + row * h;
        for_each_vector(0, h, [=](int64_t i, int64_t n) {
          store_upto(added + i, load_upto(in + i, n) + load_upto(residual + row * h + i, n), n);
        });
        in = added;
      }
      const Moments m = moments<CENTRED>(in, h, eps);
      if (CENTRED) mean[row] = m.mean;
      rstd[row] = m.rstd;
      for_each_vector(0, h, [=](int64_t i, int64_t n) {
        const F32 z = CENTRED ? load_upto(in + i, n) - m.mean : load_upto(in + i, n);
        const F32 scaled = z * m.rstd * load_upto(weight + i, n);
        store_upto(y + row * h + i, CENTRED && bias != nullptr ? scaled + load_upto(bias + i, n) : scaled, n);
      });
    }
  });
}

// One row of the gradient; adds to dw, and to db [h] behind it where CENTRED.
template <bool CENTRED, class T, class W>
static inline void norm_backward_row(const T* dy, const T* ds, const T* s, const W* weight, Moments m, T* dx, float* dw, int64_t h) {
  const auto normalised = [=](int64_t i, int64_t n) {
    return (CENTRED ? pad(load_upto(s + i, n) - m.mean, n, 0.0f) : load_upto(s + i, n)) * m.rstd;
  };
  const auto grad = [=](int64_t i, int64_t n) { return load_upto(dy + i, n) * load_upto(weight + i, n); };
  const float slope = sum_over(h, [=](int64_t i, int64_t n) { return grad(i, n) * normalised(i, n); }) / float(h);
  const float shift = CENTRED ? sum_over(h, grad) / float(h) : 0.0f;
  for_each_vector(0, h, [=](int64_t i, int64_t n) {
    const F32 d = load_upto(dy + i, n), z = normalised(i, n);
    store_upto(dw + i, load_upto(dw + i, n) + d * z, n);
    if (CENTRED) store_upto(dw + h + i, load_upto(dw + h + i, n) + d, n);
    const F32 dz = (d * load_upto(weight + i, n) - shift - z * slope) * m.rstd;
    store_upto(dx + i, ds == nullptr ? dz : dz + load_upto(ds + i, n), n);
  });
}

// dy, ds (or null), s and dx [t, h]; mean (CENTRED) and rstd [t]; partial [blocks, h], or [blocks, 2 h] where CENTRED: sums over the rows of
// each block. Blocks are cut by t alone, so that the sums are the same bits for every number of threads.
template <bool CENTRED, class T, class W>
void norm_backward(const T* dy, const T* ds, const T* s, const W* weight, const float* mean, const float* rstd, T* dx, float* partial,
                   int64_t t, int64_t h, int blocks, int threads) {
  const int64_t width = CENTRED ? 2 * h : h;
  parallel(threads, [=](int thread, int count) {
    const Range mine = share(blocks, thread, count);
    for (int64_t block = mine.begin; block < mine.end; ++block) {
      float* dw = partial + block * width;
      std::memset(dw, 0, width * sizeof(float));
      const Range rows = share(t, int(block), blocks);
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        const Moments m = {CENTRED ? mean[row] : 0.0f, rstd[row]};
        norm_backward_row<CENTRED>(dy + row * h, ds == nullptr ? ds : ds + row * h, s + row * h, weight, m, dx + row * h, dw, h);
      }
    }
  });
}

// out [h] = the sum over the blocks, in their order, of partial[block * width + i].
template <class W>
void sum_blocks(const float* partial, W* out, int64_t h, int64_t width, int blocks, int threads) {
  parallel(threads, [=](int thread, int count) {
    const Range columns = share(h, thread, count, LANES);
    for_each_vector(columns.begin, columns.end, [=](int64_t i, int64_t n) {
      F32 total = {};
      for (int64_t block = 0; block < blocks; ++block) total += load_upto(partial + block * width + i, n);
      store_upto(out + i, total, n);
    });
  });
}

}  // namespace megapar::MEGAPAR_ISA
