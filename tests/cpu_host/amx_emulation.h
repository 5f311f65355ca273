// The AMX instructions of csrc/cpu/gemm_amx.inl by plain loops, with the results that Intel's manual (Instruction Set Extensions Programming
// Reference, chapter on AMX) defines: TDPBF16PS keeps two fp32 sums, of the even and of the odd numbers of a pair, adds them, and adds the
// sum to the tile; each step rounds to nearest even, denormal numbers count as zeros on the way in and out.
//
// Included after <immintrin.h>, whose names it takes. What the processor answers with a fault stops the program.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace amx_emulation {

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t column_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

struct Tile {
  uint8_t bytes[16][64];
};

inline thread_local Config config;
inline thread_local Tile tiles[8];

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "AMX fault: %s\n", what);
  std::exit(3);
}

inline void load_config(const void* from) {
  std::memcpy(&config, from, sizeof config);
  require(config.palette == 1, "palette");
  for (uint8_t byte : config.reserved) require(byte == 0, "reserved bytes of the configuration");
  for (int t = 0; t < 16; ++t) {
    const bool none = config.rows[t] == 0 && config.column_bytes[t] == 0;
    require(t < 8 ? none || (config.rows[t] <= 16 && config.column_bytes[t] <= 64 && config.rows[t] && config.column_bytes[t]) : none,
            "shape of a tile");
  }
  std::memset(tiles, 0, sizeof tiles);
}

inline void release() { config = {}; }

inline Tile& configured(int t) {
  require(config.palette == 1 && t >= 0 && t < 8 && config.rows[t] > 0, "a tile that is not configured");
  return tiles[t];
}

inline void zero(int t) { configured(t) = {}; }

inline void load(int t, const void* base, int64_t stride) {
  Tile& tile = configured(t);
  tile = {};
  for (int row = 0; row < config.rows[t]; ++row)
    std::memcpy(tile.bytes[row], static_cast<const char*>(base) + row * stride, config.column_bytes[t]);
}

inline void store(int t, void* base, int64_t stride) {
  const Tile& tile = configured(t);
  for (int row = 0; row < config.rows[t]; ++row)
    std::memcpy(static_cast<char*>(base) + row * stride, tile.bytes[row], config.column_bytes[t]);
}

inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

inline float number_of(const Tile& tile, int row, int index) {
  uint16_t half;
  std::memcpy(&half, tile.bytes[row] + 2 * index, sizeof half);
  const uint32_t bits = uint32_t(half) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return flushed(x);
}

// c += a b: a holds rows of pairs along k, b a row for each pair.
inline void multiply(int c, int a, int b) {
  Tile& sum = configured(c);
  const Tile &left = configured(a), &right = configured(b);
  const int rows = config.rows[c], columns = config.column_bytes[c] / 4, pairs = config.column_bytes[a] / 4;
  require(c != a && c != b && a != b, "the same tile twice");
  require(config.rows[a] == rows && config.column_bytes[b] == config.column_bytes[c] && config.rows[b] == pairs, "shapes of a product");
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < columns; ++n) {
      float even = 0.0f, odd = 0.0f, before;
      for (int k = 0; k < pairs; ++k) {
        even = flushed(std::fma(number_of(left, m, 2 * k), number_of(right, k, 2 * n), even));
        odd = flushed(std::fma(number_of(left, m, 2 * k + 1), number_of(right, k, 2 * n + 1), odd));
      }
      std::memcpy(&before, sum.bytes[m] + 4 * n, sizeof before);
      const float after = flushed(flushed(before) + flushed(even + odd));
      std::memcpy(sum.bytes[m] + 4 * n, &after, sizeof after);
    }
}

}  // namespace amx_emulation

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(from) ::amx_emulation::load_config(from)
#define _tile_release() ::amx_emulation::release()
#define _tile_zero(t) ::amx_emulation::zero(t)
#define _tile_loadd(t, base, stride) ::amx_emulation::load(t, base, stride)
#define _tile_stored(t, base, stride) ::amx_emulation::store(t, base, stride)
#define _tile_dpbf16ps(c, a, b) ::amx_emulation::multiply(c, a, b)
