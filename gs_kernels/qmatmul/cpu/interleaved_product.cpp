// Multiplies with a row-interleaved weight (interleaved.py) and unpacks codes on the way: few rows of x in fp32 or int32;
// dequantizes blocks of the weight; adds one group of a product of int8 matrices.
#include "parallel.h"
#include "simd.h"

using namespace lanes;

namespace {

constexpr int STEP = 8, ROWS = 4;

struct Weight {
  const uint8_t* codes;  // [B, G, S, bits * 16]
  const float* grid;     // [B, G, 32]
  int64_t blocks, groups, steps;
};

// Code j of a step.
template <int BITS>
LANE_FN I field(const uint8_t* codes, int j) {
  constexpr int PER = 8 / BITS;
  const I byte = load(codes + j / PER * LANES);
  const int low = j % PER * BITS;
  const I above = low ? right(byte, low) : byte;
  return low + BITS < 8 ? above & all((1 << BITS) - 1) : above;
}

// Codes 2p and 2p + 1 of a step, as 16-bit halves.
template <int BITS>
LANE_FN I pair(const uint8_t* codes, int p) {
  return field<BITS>(codes, 2 * p) | left(field<BITS>(codes, 2 * p + 1), 16);
}

// One block times M rows of x `[groups, steps, 8]` that lie `apart`: y `[M]` rows of 16, `wide` apart.
template <int BITS, int M>
LANE_FN void dot_block(const float* x, int64_t apart, const Weight& w, int64_t block, float* y, int64_t wide) {
  const uint8_t* codes = w.codes + block * w.groups * w.steps * BITS * LANES;
  constexpr int ACCUMULATORS = M == 1 ? 4 : M == 2 ? 2 : 1;  // of sums: one waits for each product
  F total[M];
  for (int m = 0; m < M; ++m) total[m] = all(0.0f);
  for (int64_t g = 0; g < w.groups; ++g) {
    const float* grid = w.grid + (block * w.groups + g) * 2 * LANES;
    const F scale = load(grid), zero = load(grid + LANES);
    F part[M][ACCUMULATORS];
    for (int m = 0; m < M; ++m)
      for (int c = 0; c < ACCUMULATORS; ++c) part[m][c] = all(0.0f);
    for (int64_t s = 0; s < w.steps; ++s, codes += BITS * LANES, x += STEP) {
#pragma GCC unroll 8
      for (int j = 0; j < STEP; ++j) {
        // the zero point is taken off each code: nothing large cancels
        const F real = in_fp32(field<BITS>(codes, j)) - zero;
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) part[m][j % ACCUMULATORS] = fma(real, all(x[m * apart + j]), part[m][j % ACCUMULATORS]);
      }
    }
    for (int m = 0; m < M; ++m) {
      for (int c = 1; c < ACCUMULATORS; ++c) part[m][0] = part[m][0] + part[m][c];
      total[m] = fma(part[m][0], scale, total[m]);
    }
  }
  for (int m = 0; m < M; ++m) store(y + m * wide + block * LANES, total[m]);
}

// `(sums - zero * x_sums) * scale`, of codes that were `offset` lower: whole zero points in integers, exactly.
LANE_FN F real_sums(I sums, int32_t x_sums, const float* grid, int32_t offset) {
  const F zero = load(grid + LANES);
  const F near = min(max(round(zero), all(-256.0f)), all(256.0f));  // more would overflow; the rest goes as fractions
  const I centered = sums - (whole(near) - all(offset)) * all(x_sums);
  return (in_fp32(centered) - (zero - near) * all((float)x_sums)) * load(grid);
}

// The same of whole numbers: x int16 `[groups, steps, 8]`, x_sums `[M, groups]`. one: all groups have one scale.
template <int BITS, int M>
LANE_FN void int_dot_block(
    const int16_t* x, int64_t apart, const int32_t* x_sums, const Weight& w, int64_t block, int one, float* y, int64_t wide) {
  const uint8_t* codes = w.codes + block * w.groups * w.steps * BITS * LANES;
  F total[M];
  I part[M];
  int32_t x_sum[M];
  for (int m = 0; m < M; ++m) total[m] = all(0.0f), part[m] = all(0), x_sum[m] = 0;
  for (int64_t g = 0; g < w.groups; ++g) {
    for (int64_t s = 0; s < w.steps; ++s, codes += BITS * LANES, x += STEP) {
#pragma GCC unroll 4
      for (int p = 0; p < STEP / 2; ++p) {
        const I both = pair<BITS>(codes, p);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          int32_t two;
          std::memcpy(&two, x + m * apart + 2 * p, sizeof(two));
          part[m] = part[m] + pairs(both, all(two));
        }
      }
    }
    for (int m = 0; m < M; ++m) x_sum[m] += x_sums[m * w.groups + g];
    if (one && g + 1 < w.groups) continue;
    for (int m = 0; m < M; ++m) {
      total[m] = total[m] + real_sums(part[m], x_sum[m], w.grid + (block * w.groups + g) * 2 * LANES, 0);
      part[m] = all(0), x_sum[m] = 0;
    }
  }
  for (int m = 0; m < M; ++m) store(y + m * wide + block * LANES, total[m]);
}

template <int BITS>
void dot(const float* x, int64_t m, const Weight& w, float* y, int threads) {
  const int64_t apart = w.groups * w.steps * STEP, wide = w.blocks * LANES;
  parallel_for(threads, w.blocks, [&](int64_t block) {
    int64_t row = 0;
    for (; row + ROWS <= m; row += ROWS) dot_block<BITS, ROWS>(x + row * apart, apart, w, block, y + row * wide, wide);
    if (row + 2 <= m) dot_block<BITS, 2>(x + row * apart, apart, w, block, y + row * wide, wide), row += 2;
    if (row < m) dot_block<BITS, 1>(x + row * apart, apart, w, block, y + row * wide, wide);
  });
}

template <int BITS>
void int_dot(const int16_t* x, int64_t m, const int32_t* x_sums, const Weight& w, int one, float* y, int threads) {
  const int64_t apart = w.groups * w.steps * STEP, wide = w.blocks * LANES;
  parallel_for(threads, w.blocks, [&](int64_t block) {
    int64_t row = 0;
    for (; row + ROWS <= m; row += ROWS) {
      int_dot_block<BITS, ROWS>(x + row * apart, apart, x_sums + row * w.groups, w, block, one, y + row * wide, wide);
    }
    for (; row < m; ++row) {
      int_dot_block<BITS, 1>(x + row * apart, apart, x_sums + row * w.groups, w, block, one, y + row * wide, wide);
    }
  });
}

enum Kind { FP32, BF16, INT8, CODES };  // CODES: as INT8, in fp32

LANE_FN I rounded_bf16(F v) {
  const I bits = bits_of(v);
  const I even = bits + all(0x7fff) + (right(bits, 16) & all(1));
  return where_nan(v, all(0x7fc0), right(even, 16));
}

// out `[groups, steps, 8, blocks, 16]`: the weight, transposed; INT8 is its codes, those of 8 bits 128 lower.
template <int BITS>
void unpack(const Weight& w, void* out, int kind, int threads) {
  const int64_t all_steps = w.groups * w.steps;
  const I offset = all(BITS == 8 ? 128 : 0);
  parallel_for(threads, all_steps, [&](int64_t step) {
    const int64_t g = step / w.steps;
    for (int64_t block = 0; block < w.blocks; ++block) {
      const uint8_t* codes = w.codes + (block * all_steps + step) * BITS * LANES;
      const float* grid = w.grid + (block * w.groups + g) * 2 * LANES;
      const F scale = load(grid), zero = load(grid + LANES);
#pragma GCC unroll 8
      for (int j = 0; j < STEP; ++j) {
        const int64_t at = ((step * STEP + j) * w.blocks + block) * LANES;
        const I code = field<BITS>(codes, j);
        if (kind == INT8) {
          store(static_cast<int8_t*>(out) + at, code - offset);
        } else if (kind == CODES) {
          store(static_cast<float*>(out) + at, in_fp32(code - offset));
        } else {
          const F real = (in_fp32(code) - zero) * scale;
          if (kind == FP32) store(static_cast<float*>(out) + at, real);
          if (kind == BF16) store(static_cast<uint16_t*>(out) + at, rounded_bf16(real));
        }
      }
    }
  });
}

}  // namespace

// y `[m, 16 * blocks]`: x `[m, groups, steps, 8]` times the weight, in fp32. bits: 1, 2, 4 or 8.
EXPORT void interleaved_dot(
    const float* x, int64_t m, const uint8_t* codes, const float* grid, int64_t blocks, int64_t groups, int64_t steps,
    int bits, float* y, int threads) {
  const Weight w{codes, grid, blocks, groups, steps};
  const auto run = bits == 1 ? dot<1> : bits == 2 ? dot<2> : bits == 4 ? dot<4> : dot<8>;
  run(x, m, w, y, threads);
}

EXPORT void interleaved_int_dot(
    const int16_t* x, int64_t m, const int32_t* x_sums, const uint8_t* codes, const float* grid, int64_t blocks,
    int64_t groups, int64_t steps, int bits, int one, float* y, int threads) {
  const Weight w{codes, grid, blocks, groups, steps};
  const auto run = bits == 1 ? int_dot<1> : bits == 2 ? int_dot<2> : bits == 4 ? int_dot<4> : int_dot<8>;
  run(x, m, x_sums, w, one, y, threads);
}

EXPORT void interleaved_unpack(
    const uint8_t* codes, const float* grid, int64_t blocks, int64_t groups, int64_t steps, int bits, void* out, int kind,
    int threads) {
  const Weight w{codes, grid, blocks, groups, steps};
  const auto run = bits == 1 ? unpack<1> : bits == 2 ? unpack<2> : bits == 4 ? unpack<4> : unpack<8>;
  run(w, out, kind, threads);
}

// Adds one group to y `[m, blocks, 16]`: from int32 sums of products `[m, blocks, 16]`, sums of x `[m]`, and the group's
// grid, `apart` floats from block to block.
EXPORT void interleaved_add(
    float* y, const int32_t* sums, const int32_t* x_sums, const float* grid, int64_t apart, int64_t m, int64_t blocks,
    int offset, int threads) {
  parallel_for(threads, m, [&](int64_t row) {
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t at = (row * blocks + block) * LANES;
      store(y + at, load(y + at) + real_sums(load(sums + at), x_sums[row], grid + block * apart, offset));
    }
  });
}
