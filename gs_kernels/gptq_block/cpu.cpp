// Rounds a block of columns in turn. Rows are lanes: some of them go through all columns, and what the columns before are
// worth in the next few is summed in registers, column by column and without fused products, as the reference does.
#include "parallel.h"
#include "simd.h"

using namespace lanes;

namespace {

constexpr int64_t COLUMNS_MAX = 128;
#ifdef __AVX512F__
constexpr int VECTORS = 2, FEW = 8;  // of rows; columns: their products fit the registers
#else
constexpr int VECTORS = 1, FEW = 4;
#endif
constexpr int64_t ROWS = VECTORS * LANES;

struct Block {
  float* change;                              // [columns, groups, rows]
  const float *values, *start, *factor;       // the same; [groups, columns, columns]
  const float *scale, *zero;                  // as values; zero may be null
  int64_t columns, groups, rows;
  float least, largest;
  int threads;
};

LANE_FN F inverse(F scale) {
  float s[LANES];
  store(s, scale);
  for (int i = 0; i < LANES; ++i) s[i] = s[i] == 0.0f ? 0.0f : 1.0f / s[i];
  return load(s);
}

// Some rows of a group, as many as ROWS.
struct Rows {
  const Block& b;
  const float* factor;
  int64_t first, step, count;
  float changes[COLUMNS_MAX * ROWS];

  LANE_FN int64_t lanes_of(int64_t count, int v) {
    const int64_t left = count - v * LANES;
    return left < 0 ? 0 : left < LANES ? left : LANES;
  }

  // Rounds `few` columns from k on.
  template <int few>
  __attribute__((always_inline)) inline void round_few(int64_t k) {
    F sums[few][VECTORS];
    for (int c = 0; c < few; ++c) {
      for (int v = 0; v < VECTORS; ++v) sums[c][v] = load(b.values + (k + c) * step + first + v * LANES, lanes_of(count, v));
    }
    for (int64_t i = 0; i < k; ++i) subtract<few>(sums, i, k, 0);
    for (int c = 0; c < few; ++c) {
      for (int v = 0; v < VECTORS; ++v) {
        const int64_t at = (k + c) * step + first + v * LANES, n = lanes_of(count, v);
        const F scale = load(b.scale + at, n);
        F code = sums[c][v] * inverse(scale);
        // a NaN stays: it is the second operand
        if (b.zero) {
          const F zero = load(b.zero + at, n);
          code = round(min(all(b.largest), max(all(b.least), code + zero))) - zero;
        } else {
          code = round(min(all(b.largest), max(all(b.least), code)));
        }
        const F change = code * scale - load(b.start + at, n);
        store(b.change + at, change, n);
        store(changes + (k + c) * ROWS + v * LANES, change);
      }
      subtract<few>(sums, k + c, k, c + 1);
    }
  }

  // Takes off what column i is worth in those from k + begin to k + few.
  template <int few>
  __attribute__((always_inline)) inline void subtract(F (&sums)[few][VECTORS], int64_t i, int64_t k, int begin) {
    F change[VECTORS];
    for (int v = 0; v < VECTORS; ++v) change[v] = load(changes + i * ROWS + v * LANES);
    for (int c = 0; c < few; ++c) {
      if (c < begin) continue;
      const F worth = all(factor[i * b.columns + k + c]);
      for (int v = 0; v < VECTORS; ++v) sums[c][v] = sums[c][v] - worth * change[v];
    }
  }
};

}  // namespace

EXPORT void gptq_block(const Block* block) {
  const Block& b = *block;
  const int64_t tiles = (b.rows + ROWS - 1) / ROWS;
  parallel_for(b.threads, b.groups * tiles, [&](int64_t tile) {
    const int64_t group = tile / tiles, row = tile % tiles * ROWS;
    Rows rows{b, b.factor + group * b.columns * b.columns, group * b.rows + row, b.groups * b.rows, b.rows - row, {}};
    int64_t k = 0;
    for (; k + FEW <= b.columns; k += FEW) rows.round_few<FEW>(k);
    for (; k < b.columns; ++k) rows.round_few<1>(k);
  });
}

EXPORT const int64_t sizeof_Block = sizeof(Block);
