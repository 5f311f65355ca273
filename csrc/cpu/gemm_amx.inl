// The tile of a GEMM on AMX (TDPBF16PS): 32 x 32 of C in four tiles of 16 x 16; a step multiplies 16 pairs of k.
//
// Tried on the CPU without AMX through tests/cpu_host/amx_emulation.h, which gives the instructions' results by plain loops.

namespace megapar::MEGAPAR_ISA {

struct Tiles {
  static constexpr int64_t MR = 32, NR = 32;
  static constexpr int k = 2;

  static bool by_rows(int64_t) { return true; }
  static void begin() {
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    // GCC 12 declares that _tile_loadconfig reads 8 bytes, and drops the stores to the rest without this.
    asm volatile("" ::"m"(config) : "memory");
    _tile_loadconfig(&config);
  }
  static void end() { _tile_release(); }

  template <bool>
  static void tile(const uint32_t* a, const uint32_t* b, float* c, int64_t ldc, int64_t units, bool first) {
    if (first) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      _tile_loadd(0, c, ldc * 4);
      _tile_loadd(1, c + 16, ldc * 4);
      _tile_loadd(2, c + 16 * ldc, ldc * 4);
      _tile_loadd(3, c + 16 * ldc + 16, ldc * 4);
    }
    for (int64_t u = 0; u < units; u += LANES) {
      _tile_loadd(4, a + u * MR, 64);
      _tile_loadd(5, a + u * MR + 16 * LANES, 64);
      _tile_loadd(6, b + u * NR, NR * 4);
      _tile_loadd(7, b + u * NR + 16, NR * 4);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, ldc * 4);
    _tile_stored(1, c + 16, ldc * 4);
    _tile_stored(2, c + 16 * ldc, ldc * 4);
    _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
  }
};

}  // namespace megapar::MEGAPAR_ISA
