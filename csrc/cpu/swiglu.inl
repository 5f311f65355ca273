// Formula and bytes: megapar/ops/swiglu.py.

namespace megapar::MEGAPAR_ISA {

// gate_up [t, 2 f], y [t, f].
template <class T>
void swiglu(const T* gate_up, T* y, int64_t t, int64_t f, int threads) {
  parallel(threads, [=](int thread, int count) {
    const Range rows = share(t, thread, count);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const T *gate = gate_up + row * 2 * f, *up = gate + f;
      for_each_vector(0, f, [=](int64_t i, int64_t n) {
        const F32 z = load_upto(gate + i, n);
        store_upto(y + row * f + i, z * sigmoid(z) * load_upto(up + i, n), n);
      });
    }
  });
}

// dy [t, f], gate_up and d_gate_up [t, 2 f].
template <class T>
void swiglu_backward(const T* dy, const T* gate_up, T* d_gate_up, int64_t t, int64_t f, int threads) {
  parallel(threads, [=](int thread, int count) {
    const Range rows = share(t, thread, count);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const T *gate = gate_up + row * 2 * f, *up = gate + f;
      T *d_gate = d_gate_up + row * 2 * f, *d_up = d_gate + f;
      for_each_vector(0, f, [=](int64_t i, int64_t n) {
        const F32 z = load_upto(gate + i, n), s = sigmoid(z), d = load_upto(dy + row * f + i, n);
        store_upto(d_gate + i, d * load_upto(up + i, n) * s * (1.0f + z * (1.0f - s)), n);
        store_upto(d_up + i, d * z * s, n);
      });
    }
  });
}

}  // namespace megapar::MEGAPAR_ISA
