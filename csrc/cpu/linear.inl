// The GEMMs of a linear layer and what is done with a block of C while it is in L2. Formulas: megapar/ops/linear.py.

#include "gemm.inl"
#if MEGAPAR_LEVEL >= 514
#include "gemm_amx.inl"
#endif

namespace megapar::MEGAPAR_ISA {

template <class T>
struct BestKernel {
  using type = Vectors<1>;
};
#if MEGAPAR_LEVEL >= 514
template <>
struct BestKernel<bf16> {
  using type = Tiles;
};
#elif MEGAPAR_LEVEL >= 513
template <>
struct BestKernel<bf16> {
  using type = Vectors<2>;
};
#endif
template <class T>
using Kernel = typename BestKernel<T>::type;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A block of C is about 128 rows by NC columns.
template <class K>
constexpr int64_t block_rows = 128 / K::MR * K::MR;

// What a GEMM does with its operands: the smaller one is packed whole, once, for all threads; the other block by block, by the thread that
// uses it next, so that it stays in that thread's cache and nothing of its size is allocated.
//
// Where k is so long that a block would not stay there, and C so small that all of it can wait, both are packed a slice of k at a time.
template <class T>
struct Plan {
  using K = Kernel<T>;
  static constexpr int64_t HALF_L2 = (512 << 10) / 4;
  static constexpr int64_t DEEP = 2048, SLICE = 1024, MOST_WAITING = 8;
  static constexpr int64_t most_rows = block_rows<K> / K::MR;
  int64_t rows, columns, units, parts, threads, row_panels, column_panels;
  bool a_whole;
  // Units of k at a time; blocks of C that a thread keeps.
  int64_t slice, waiting = 1;
  int64_t along_rows = 1, along_columns = 1, most_columns = NC / K::NR / parts;

  Plan(int64_t rows, int64_t columns, int64_t depth, int64_t parts, int64_t threads)
      : rows(rows), columns(columns), units(padded_units<K::k>(depth)), parts(parts), threads(threads),
        row_panels(ceil_div(rows, K::MR)), column_panels(ceil_div(columns, K::NR)), a_whole(rows < columns * parts),
        slice(units) {
    // The grid of threads with the least work for the busiest; of equal ones that in which the fewest threads pack the same.
    int64_t least = std::numeric_limits<int64_t>::max();
    for (int64_t few = 1; few <= threads; ++few) {
      if (threads % few) continue;
      const int64_t down = a_whole ? few : threads / few, across = threads / down;
      const int64_t work = ceil_div(row_panels, down) * ceil_div(column_panels, across);
      if (work >= least) continue;
      least = work;
      along_rows = down;
      along_columns = across;
    }
    if (units <= DEEP) return;
    slice = SLICE;
    waiting = ceil_div(ceil_div(row_panels, along_rows), tall()) * ceil_div(ceil_div(column_panels, along_columns), wide());
    if (waiting <= MOST_WAITING) return;
    slice = units;
    waiting = 1;
  }

  // Panels of A, and of one part of B, in a block of C. What is packed block by block fills half of L2 at most, so that it is still there
  // for every block of the other; but three panels of B, or reading all of A again for each would cost more.
  int64_t tall() const {
    return std::clamp<int64_t>(a_whole ? most_rows : HALF_L2 / (K::MR * slice + 1), 1, most_rows);
  }
  int64_t wide() const {
    return std::clamp<int64_t>(a_whole ? HALF_L2 / (K::NR * parts * slice + 1) : most_columns, std::min<int64_t>(3, most_columns), most_columns);
  }

  // In units: of the operand that is packed whole; of one thread's blocks of the other and of C.
  int64_t whole_size() const { return slice * (a_whole ? row_panels * K::MR : parts * column_panels * K::NR); }
  int64_t block_size() const { return slice * (a_whole ? NC : block_rows<K>) + waiting * block_rows<K> * NC; }
};

template <class T>
int64_t workspace_size(int64_t rows, int64_t columns, int64_t depth, int64_t parts, int64_t threads) {
  const Plan<T> plan(rows, columns, depth, parts, threads);
  return plan.whole_size() + threads * plan.block_size();
}

template <class T>
void pack_a(const Operand<T>& a, int64_t first, int64_t count, uint32_t* out) {
  using K = Kernel<T>;
  (K::by_rows(a.stride_k) ? pack_panels<K::k, K::MR, true, T> : pack_panels<K::k, K::MR, false, T>)(a, first, count, out);
}

// The second of two parts (gate and up, one after the other along the width) starts a full set of panels, or half a block, later.
template <class T>
void pack_b(const Operand<T>& b, int64_t parts, int64_t first, int64_t count, uint32_t* out, int64_t next_part) {
  using K = Kernel<T>;
  const int64_t width = b.width / parts;
  for (int64_t part = 0; part < parts; ++part) {
    const Operand<T> here{b.data + part * width * b.stride_w, width, b.depth, b.stride_w, b.stride_k};
    pack_panels<K::k, K::NR, false>(here, first, count, out + part * next_part);
  }
}

// Units [u, u + units) of k of an operand.
template <class T>
Operand<T> slice_of(const Operand<T>& x, int64_t u, int64_t units) {
  constexpr int64_t k = Kernel<T>::k;
  return {x.data + u * k * x.stride_k, x.width, std::min(x.depth - u * k, units * k), x.stride_w, x.stride_k};
}

// finish(c, row, rows, column, columns): c holds the block of C there, rows NC apart; with two parts, the second one's at c + NC / 2.
template <class T, class Finish>
void gemm(const Operand<T>& a, const Operand<T>& b, int64_t parts, uint32_t* workspace, int64_t threads, const Finish& finish) {
  using K = Kernel<T>;
  const Plan<T> plan(a.width, b.width / parts, a.depth, parts, threads);
  const int64_t units = plan.units, tall = plan.tall(), wide = plan.wide();
  // From one part of B to the next, in panels: among its panels, and in a block of them.
  const int64_t next_part = plan.a_whole ? wide : plan.column_panels;
  const auto pack_whole = [&](int thread, int count, int64_t u, int64_t depth) {
    const Range mine = share(plan.a_whole ? plan.row_panels : plan.column_panels, thread, count);
    uint32_t* out = workspace + mine.begin * (plan.a_whole ? K::MR : K::NR) * depth;
    plan.a_whole ? pack_a(slice_of(a, u, depth), mine.begin, mine.end - mine.begin, out)
                 : pack_b(slice_of(b, u, depth), parts, mine.begin, mine.end - mine.begin, out, next_part * K::NR * depth);
  };
  // One share of C, as far as units [u, u + depth) of k go.
  const auto work = [&](int64_t thread, int64_t u, int64_t depth) {
    const Range down = share(plan.row_panels, int(thread / plan.along_columns), int(plan.along_rows));
    const Range across = share(plan.column_panels, int(thread % plan.along_columns), int(plan.along_columns));
    uint32_t* packed = workspace + plan.whole_size() + thread * plan.block_size();
    float* c = reinterpret_cast<float*>(packed) + plan.block_size() - plan.waiting * block_rows<K> * NC;
    const auto compute = [&](int64_t i, int64_t j) {
      const int64_t high = std::min(tall, down.end - i), broad = std::min(wide, across.end - j);
      const uint32_t* panels_a = plan.a_whole ? workspace + i * K::MR * depth : packed;
      const uint32_t* panels_b = plan.a_whole ? packed : workspace + j * K::NR * depth;
      for (int64_t part = 0; part < parts; ++part)
        (K::by_rows(a.stride_k) ? block<K, true> : block<K, false>)(panels_a, high, panels_b + part * next_part * K::NR * depth, broad, depth,
                                                                    u == 0, c + part * (NC / 2));
      if (u + depth == units)
        finish(c, i * K::MR, std::min(a.width - i * K::MR, high * K::MR), j * K::NR, std::min(plan.columns - j * K::NR, broad * K::NR));
      if (plan.waiting > 1) c += block_rows<K> * NC;
    };
    K::begin();
    if (plan.a_whole) {
      for (int64_t j = across.begin; j < across.end; j += wide) {
        pack_b(slice_of(b, u, depth), parts, j, std::min(wide, across.end - j), packed, next_part * K::NR * depth);
        for (int64_t i = down.begin; i < down.end; i += tall) compute(i, j);
      }
    } else {
      for (int64_t i = down.begin; i < down.end; i += tall) {
        pack_a(slice_of(a, u, depth), i, std::min(tall, down.end - i), packed);
        for (int64_t j = across.begin; j < across.end; j += wide) compute(i, j);
      }
    }
    K::end();
  };
  parallel(int(threads), [&](int thread, int count) {
    int64_t u = 0;
    do {
      const int64_t depth = std::min(plan.slice, units - u);
      if (u > 0) barrier(count);  // others may still read the last slice
      pack_whole(thread, count, u, depth);
      barrier(count);
      // More than one share for each where there are fewer threads than asked for.
      for (int64_t part = thread; part < threads; part += count) work(part, u, depth);
      u += depth;
    } while (u < units);
  });
}

// Element i of an activation and its derivative at z. GELU is the tanh form: tanh(u) = 2 sigmoid(2 u) - 1.
static inline F32 gelu_gate(F32 z) { return sigmoid(1.5957691216057308f * (z + 0.044715f * z * z * z)); }

static inline __attribute__((always_inline)) F32 activate(Activation kind, F32 z) {
  if (kind == Activation::gelu) return z * gelu_gate(z);
  if (kind == Activation::silu) return z * sigmoid(z);
  return z;
}

static inline __attribute__((always_inline)) F32 slope(Activation kind, F32 z) {
  if (kind == Activation::gelu) {
    // Beyond 100 the slope is 0 or 1, and z^2 could overflow: 0 times infinity (tests/ops/test_linear_numbers.py::test_every_gate).
    z = select(z > 100.0f, splat(100.0f), select(z < -100.0f, splat(-100.0f), z));
    const F32 s = gelu_gate(z);
    return s + z * s * (1.0f - s) * (1.5957691216057308f + 3.0f * 0.044715f * 1.5957691216057308f * z * z);
  }
  const F32 s = sigmoid(z);
  return s * (1.0f + z * (1.0f - s));
}

template <class T>
void linear(const LinearArgs<T>& p) {
  const int64_t parts = p.activation == Activation::swiglu ? 2 : 1, n = p.out / parts;
  const Operand<T> x{p.x, p.t, p.in, p.x_stride, 1}, w{p.weight, p.out, p.in, p.in, 1};
  gemm(x, w, parts, p.workspace, p.threads, [&](const float* c, int64_t row, int64_t rows, int64_t column, int64_t columns) {
    for (int64_t i = 0; i < rows; ++i, c += NC) {
      T *y = p.y + (row + i) * n + column, *z = p.z ? p.z + (row + i) * p.out + column : nullptr;
      const T* bias = p.bias ? p.bias + column : nullptr;
      for_each_vector(0, columns, [&](int64_t j, int64_t m) {
        F32 value = load(c + j);
        if (p.activation == Activation::none && !bias && !z) return store_upto(y + j, value, m);
        if (bias) value += load_upto(bias + j, m);
        if (z) store_upto(z + j, value, m);
        // What backward reads is the rounded pre-activation: forward must have used the same.
        if (parts == 1) return store_upto(y + j, z ? activate(p.activation, load_upto(z + j, m)) : activate(p.activation, value), m);
        F32 up = load(c + NC / 2 + j);
        if (bias) up += load_upto(bias + n + j, m);
        if (z) {
          store_upto(z + n + j, up, m);
          value = load_upto(z + j, m);
          up = load_upto(z + n + j, m);
        }
        store_upto(y + j, value * sigmoid(value) * up, m);
      });
    }
  });
}

template <class T>
void linear_input_grad(const LinearInputGradArgs<T>& p) {
  const Operand<T> dy{p.dy, p.t, p.out, p.dy_stride, 1}, other{p.weight, p.in, p.out, 1, p.in};
  const bool paired = p.activation == Activation::swiglu;
  gemm(dy, other, 1, p.workspace, p.threads, [&](const float* c, int64_t row, int64_t rows, int64_t column, int64_t columns) {
    for (int64_t i = 0; i < rows; ++i, c += NC) {
      const int64_t start = (row + i) * (paired ? 2 * p.in : p.in) + column;
      T* dx = p.dx + start;
      const T* z = p.z ? p.z + start : nullptr;
      for_each_vector(0, columns, [&](int64_t j, int64_t m) {
        const F32 d = load(c + j);
        if (p.activation == Activation::none) return store_upto(dx + j, d, m);
        const F32 gate = load_upto(z + j, m);
        if (!paired) return store_upto(dx + j, d * slope(p.activation, gate), m);
        const F32 up = load_upto(z + p.in + j, m), s = sigmoid(gate);
        store_upto(dx + j, d * up * s * (1.0f + gate * (1.0f - s)), m);
        store_upto(dx + p.in + j, d * gate * s, m);
      });
    }
  });
}

// out = beta out + alpha dy^T x, rows of `out` contiguous. Returns whether an element of the result is not finite, if asked.
template <class T, class Out>
bool linear_weight_grad(const LinearWeightGradArgs<T, Out>& p) {
  const Operand<T> dy{p.dy, p.out, p.t, 1, p.dy_stride}, other{p.x, p.in, p.t, 1, p.x_stride};
  bool bad = false;
  gemm(dy, other, 1, p.workspace, p.threads, [&](const float* c, int64_t row, int64_t rows, int64_t column, int64_t columns) {
    F32 worst = {};
    for (int64_t i = 0; i < rows; ++i, c += NC) {
      Out* target = p.target + (row + i) * p.in + column;
      for_each_vector(0, columns, [&](int64_t j, int64_t m) {
        F32 value = p.alpha * load(c + j);
        if (p.beta != 0.0f) value += p.beta * load_upto(target + j, m);
        store_upto(target + j, value, m);
        if (p.check_finite) worst += load_upto(target + j, m) * 0.0f;
      });
    }
    // 0 times an infinity or a NaN is a NaN, and a sum keeps it.
    const float total = sum(worst);
    if (total != total) __atomic_store_n(&bad, true, __ATOMIC_RELAXED);
  });
  return bad;
}

// target [n] = beta target + sum over t of dy [t, n], in fp32 by blocks of 256 rows that no thread count changes.
template <class T, class Out>
void linear_bias_grad(const T* dy, int64_t t, int64_t n, int64_t stride, Out* target, float beta, int threads) {
  parallel(threads, [&](int thread, int count) {
    const Range mine = share(n, thread, count, LANES);
    for_each_vector(mine.begin, mine.end, [&](int64_t j, int64_t m) {
      F32 total = {};
      for (int64_t row = 0; row < t; row += 256) {
        F32 part = {};
        for (int64_t i = row; i < std::min(row + 256, t); ++i) part += load_upto(dy + i * stride + j, m);
        total += part;
      }
      if (beta != 0.0f) total += beta * load_upto(target + j, m);
      store_upto(target + j, total, m);
    });
  });
}

}  // namespace megapar::MEGAPAR_ISA
