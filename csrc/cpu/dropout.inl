// Formula and bytes: megapar/ops/dropout.py.

namespace megapar::MEGAPAR_ISA {

// x and y [t, h]; rows [t]; element i of a row is kept where its hash is `least` or more.
template <class T>
void dropout(const T* x, const int64_t* rows, T* y, int64_t t, int64_t h, uint64_t key, uint32_t column, uint32_t least, float scale,
             int threads) {
  const U32 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  parallel(threads, [=](int thread, int count) {
    const Range mine = share(t, thread, count);
    for (int64_t row = mine.begin; row < mine.end; ++row) {
      const uint64_t mixed = mix64(uint64_t(rows[row]) ^ key);
      const uint32_t low = uint32_t(mixed), high = uint32_t(mixed >> 32);
      for_each_vector(0, h, [=](int64_t i, int64_t n) {
        const U32 hash = mix32(mix32(lane + (column + uint32_t(i)) + low) ^ high);
        store_upto(y + row * h + i, select((I32)(hash >= least), load_upto(x + row * h + i, n) * scale, F32{}), n);
      });
    }
  });
}

}  // namespace megapar::MEGAPAR_ISA
