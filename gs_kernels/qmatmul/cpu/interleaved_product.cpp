// Multiplies with a row-interleaved weight (interleaved.py) and unpacks codes on the way: few rows of x in fp32 or int32;
// dequantizes blocks of the weight; adds one group of a product of int8 matrices.
#include "parallel.h"
#include "simd.h"
#include "interleaved_product.h"
#include "row_digits.h"

#include <algorithm>
#include <functional>
#include <vector>

using namespace lanes;

namespace {

constexpr int STEP = 8;
constexpr int ROWS = 4;  // of x, to which codes are multiplied as they are unpacked
#ifdef LANES_LOOK_UP
constexpr int TILE = 12, PANEL = 2;  // rows of x and blocks of a panel: their sums fill 24 of 32 registers
#else
constexpr int TILE = 6, PANEL = 1;  // 12 of 16
#endif
constexpr int64_t STRETCH = 64;  // steps of K in a panel: 64 KB or 32
constexpr int64_t SHORT = 16;    // where up to two tiles of rows read it
constexpr int64_t CHUNK = 512;   // rows of x at a time


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

#ifdef LANES_LOOK_UP
constexpr bool LOOKS_UP = true;
#else
constexpr bool LOOKS_UP = false;
LANE_FN F look_up(F values, I at) { return values; }
#endif

// Code j of a step in fp32, `less` lower, which is 0 unless a table gives the code.
template <int BITS>
LANE_FN F code(const uint8_t* codes, int j, int less = 0) {
  if (!LOOKS_UP || BITS == 8) return in_fp32(field<BITS>(codes, j));
  alignas(64) float values[LANES];
  for (int i = 0; i < LANES; ++i) values[i] = i % (1 << BITS) - less;
  constexpr int PER = 8 / BITS;
  return look_up(load(values), right(load(codes + j / PER * LANES), j % PER * BITS));
}

// One block times one row: the sum of codes times x, less the zero point times x_sums `[groups]`. That takes one
// operation less for each code; a table has taken off half of their range, so that both sums are small.
template <int BITS>
LANE_FN F dot_row(const float* x, const float* x_sums, const Weight& w, int64_t block) {
  constexpr int LESS = LOOKS_UP && BITS < 8 ? 1 << (BITS - 1) : 0;
  const uint8_t* codes = w.codes + block * w.groups * w.steps * BITS * LANES;
  F total = all(0.0f);
  for (int64_t g = 0; g < w.groups; ++g) {
    const float* grid = w.grid + (block * w.groups + g) * 2 * LANES;
    F part[4];  // one sum waits for each product
    for (int c = 0; c < 4; ++c) part[c] = all(0.0f);
    for (int64_t s = 0; s < w.steps; ++s, codes += BITS * LANES, x += STEP) {
#pragma GCC unroll 8
      for (int j = 0; j < STEP; ++j) part[j % 4] = fma(code<BITS>(codes, j, LESS), all(x[j]), part[j % 4]);
    }
    const F sum = (part[0] + part[1]) + (part[2] + part[3]);
    total = fma(sum - (load(grid + LANES) - all((float)LESS)) * all(x_sums[g]), load(grid), total);
  }
  return total;
}

// One block times M rows of x `[groups, steps, 8]` that lie `apart`: sums `[M]`.
template <int BITS, int M>
LANE_FN void dot_block(const float* x, int64_t apart, const Weight& w, int64_t block, F* sums) {
  const uint8_t* codes = w.codes + block * w.groups * w.steps * BITS * LANES;
  constexpr int ACCUMULATORS = M == 2 ? 2 : 1;  // of sums: one waits for each product
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
        const F real = code<BITS>(codes, j) - zero;
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) part[m][j % ACCUMULATORS] = fma(real, all(x[m * apart + j]), part[m][j % ACCUMULATORS]);
      }
    }
    for (int m = 0; m < M; ++m) {
      for (int c = 1; c < ACCUMULATORS; ++c) part[m][0] = part[m][0] + part[m][c];
      total[m] = fma(part[m][0], scale, total[m]);
    }
  }
  for (int m = 0; m < M; ++m) sums[m] = total[m];
}

// `(sums - zero * x_sums) * scale`: whole zero points in integers, exactly.
LANE_FN F real_sums(I sums, int32_t x_sums, const float* grid) {
  const F zero = load(grid + LANES);
  const F near = min(max(round(zero), all(-256.0f)), all(256.0f));  // more would overflow; the rest goes as fractions
  const I centered = sums - whole(near) * all(x_sums);
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
      total[m] = total[m] + real_sums(part[m], x_sum[m], w.grid + (block * w.groups + g) * 2 * LANES);
      part[m] = all(0), x_sum[m] = 0;
    }
  }
  for (int m = 0; m < M; ++m) store(y + m * wide + block * LANES, total[m]);
}

inline float in_fp32(uint16_t bf16) {
  const uint32_t bits = (uint32_t)bf16 << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Rows of x as the weight has them: fp32, groups padded with zeros, each row `apart` from the next.
void spread(const Product& p, const void* x, int64_t rows, float* out, int64_t apart) {
  const int64_t width = p.w.groups * p.w.steps * STEP / (p.k / p.group);  // of a padded group
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t from = 0, to = 0; from < p.k; from += p.group, to += width) {
      float* row = out + m * apart + to;
      if (p.x_bf16) {
        const uint16_t* halves = static_cast<const uint16_t*>(x) + m * p.k + from;
        for (int64_t i = 0; i < p.group; ++i) row[i] = in_fp32(halves[i]);
      } else {
        std::memcpy(row, static_cast<const float*>(x) + m * p.k + from, p.group * sizeof(float));
      }
      for (int64_t i = p.group; i < width; ++i) row[i] = 0;
    }
  }
}

// Writes one row's sums with a block of the weight, and the bias `[n]`, if any.
LANE_FN void epilogue(const Product& p, F sums, const void* bias, int64_t block, void* y, int64_t row) {
  const int64_t first = block * LANES, at = row * p.n + first, rest = p.n - first;
  if (bias && p.bias_bf16) {
    float near[LANES] = {};
    for (int64_t i = 0; i < std::min(rest, LANES); ++i) near[i] = in_fp32(static_cast<const uint16_t*>(bias)[first + i]);
    sums = sums + load(near);
  } else if (bias) {
    sums = sums + load(static_cast<const float*>(bias) + first, rest);
  }
  if (!p.y_bf16) return store(static_cast<float*>(y) + at, sums, rest);
  uint16_t* halves = static_cast<uint16_t*>(y) + at;
  if (rest >= LANES) return store(halves, rounded_bf16(sums));
  uint16_t near[LANES];
  store(near, rounded_bf16(sums));
  std::memcpy(halves, near, rest * sizeof(uint16_t));
}

template <int BITS, int M>
LANE_FN void dot_rows(const Product& p, const float* x, int64_t apart, int64_t block, const void* bias, void* y, int64_t row) {
  F sums[M];
  dot_block<BITS, M>(x + row * apart, apart, p.w, block, sums);
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) epilogue(p, sums[m], bias, block, y, row + m);
}

// Sums each group of one row x.
Floats sums_of(const Weight& w, const float* x) {
  Floats sums(w.groups);
  for (int64_t g = 0, size = w.steps * STEP; g < w.groups; ++g) {
    F part = all(0.0f);
    for (int64_t i = 0; i < size; i += LANES) part = part + load(x + g * size + i, size - i);
    sums.data[g] = sum(part);
  }
  return sums;
}

// Calls body with the number as a constant.
template <class Body>
void of_bits(int bits, const Body& body) {
  if (bits == 1) body(std::integral_constant<int, 1>{});
  if (bits == 2) body(std::integral_constant<int, 2>{});
  if (bits == 4) body(std::integral_constant<int, 4>{});
  if (bits == 8) body(std::integral_constant<int, 8>{});
}

// One row of x, prepared for all blocks of a weight, or of another whose groups are the same.
template <int BITS>
struct Row {
  Row(const Weight& w, const float* x) : x(x), sums(sums_of(w, x)) {
#ifdef HAS_ROW_DIGITS
    if constexpr (BITS == 2 || BITS == 4) has_digits = find_digits<BITS>(w, x, digits);
#endif
  }
  LANE_FN_OF F dot(const Weight& w, int64_t block) const {
#ifdef HAS_ROW_DIGITS
    if constexpr (BITS == 2 || BITS == 4) {
      if (has_digits) return dot_digits<BITS>(digits, w, block);
    }
#endif
    return dot_row<BITS>(x, sums.data, w, block);
  }
  const float* x;
  Floats sums;
#ifdef HAS_ROW_DIGITS
  RowDigits digits;
  bool has_digits = false;
#endif
};

// Few rows: codes are multiplied as they are unpacked.
template <int BITS>
void dot(const Product& p, const float* x, int64_t m, int64_t apart, const void* bias, void* y, int threads) {
  const Row<BITS> last(p.w, x + (m - 1) * apart);
  parallel_for(threads, p.w.blocks, [&](int64_t block) {
    int64_t row = 0;
    for (; row + ROWS <= m; row += ROWS) dot_rows<BITS, ROWS>(p, x, apart, block, bias, y, row);
    if (row + 2 <= m) dot_rows<BITS, 2>(p, x, apart, block, bias, y, row), row += 2;
    if (row < m) epilogue(p, last.dot(p.w, block), bias, block, y, row);
  });
}

// Dequantizes steps of one block into panel[step][8][PANEL][16].
template <int BITS>
void dequantize(const Weight& w, int64_t block, int64_t first, int64_t steps, float* panel) {
  const uint8_t* codes = w.codes + (block * w.groups * w.steps + first) * BITS * LANES;
  for (int64_t s = 0; s < steps;) {
    const int64_t group = (first + s) / w.steps, until = std::min(steps, (group + 1) * w.steps - first);
    const float* grid = w.grid + (block * w.groups + group) * 2 * LANES;
    const F scale = load(grid), zero = load(grid + LANES);
    for (; s < until; ++s, codes += BITS * LANES)
#pragma GCC unroll 8
      for (int j = 0; j < STEP; ++j) store(panel + (s * STEP + j) * PANEL * LANES, (code<BITS>(codes, j) - zero) * scale);
  }
}

// Adds M rows of x times a panel of k rows to sums[M][PANEL][16].
template <int M>
void multiply(const float* x, int64_t apart, const float* panel, int64_t k, float* sums) {
  F acc[M][PANEL];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int b = 0; b < PANEL; ++b) acc[m][b] = all(0.0f);
  for (int64_t i = 0; i < k; ++i) {
    F w[PANEL];
#pragma GCC unroll 2
    for (int b = 0; b < PANEL; ++b) w[b] = load(panel + (i * PANEL + b) * LANES);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const F one = all(x[m * apart + i]);
#pragma GCC unroll 2
      for (int b = 0; b < PANEL; ++b) acc[m][b] = fma(one, w[b], acc[m][b]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
    for (int b = 0; b < PANEL; ++b) {
      float* sum = sums + (m * PANEL + b) * LANES;
      store(sum, load(sum) + acc[m][b]);
    }
}

template <int M>
void multiply_rows(int64_t rows, const float* x, int64_t apart, const float* panel, int64_t k, float* sums) {
  if (rows == M) return multiply<M>(x, apart, panel, k, sums);
  if constexpr (M > 1) multiply_rows<M - 1>(rows, x, apart, panel, k, sums);
}

// Many rows: PANEL blocks of the weight at a time are dequantized, a stretch of K that stays in the cache after the
// other, and multiplied with all rows.
template <int BITS>
void product(const Product& p, const float* x, int64_t m, int64_t apart, const void* bias, void* y, int threads) {
  const int64_t all_steps = p.w.groups * p.w.steps, panels = (p.w.blocks + PANEL - 1) / PANEL;
  const int64_t tiles = (m + TILE - 1) / TILE, stretch = tiles <= 2 ? SHORT : STRETCH;
  in_parallel(threads, [&](int64_t index, int64_t of) {
    const Floats panel_of(stretch * STEP * PANEL * LANES), sums_of(m * PANEL * LANES);
    float *panel = panel_of.data, *sums = sums_of.data;
    for (int64_t at = panels * index / of; at < panels * (index + 1) / of; ++at) {
      const int64_t block = at * PANEL, blocks = std::min<int64_t>(PANEL, p.w.blocks - block);
      std::fill_n(sums, m * PANEL * LANES, 0.0f);
      for (int64_t first = 0; first < all_steps; first += stretch) {
        const int64_t steps = std::min(stretch, all_steps - first);
        for (int64_t b = 0; b < blocks; ++b) dequantize<BITS>(p.w, block + b, first, steps, panel + b * LANES);
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t from = t * m / tiles, rows = (t + 1) * m / tiles - from;
          const float* near = x + from * apart + first * STEP;
          multiply_rows<TILE>(rows, near, apart, panel, steps * STEP, sums + from * PANEL * LANES);
        }
      }
      for (int64_t row = 0; row < m; ++row)
        for (int64_t b = 0; b < blocks; ++b) epilogue(p, load(sums + (row * PANEL + b) * LANES), bias, block + b, y, row);
    }
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

}  // namespace

void products_of_row(
    const Product* const* products, const void* const* biases, float* const* ys, int64_t count, const float* x, int threads) {
  std::vector<std::function<F(const Weight&, int64_t)>> dots;
  for (int64_t i = 0; i < count; ++i) {
    const Product &p = *products[i], &before = *products[i ? i - 1 : 0];
    if (i && p.bits == before.bits && p.w.groups == before.w.groups && p.w.steps == before.w.steps) {
      dots.push_back(dots.back());
    } else {
      of_bits(p.bits, [&](auto bits) {
        const auto row = std::make_shared<Row<bits>>(p.w, x);
        dots.push_back([row](const Weight& w, int64_t block) { return row->dot(w, block); });
      });
    }
  }
  in_parallel(threads, [&](int64_t index, int64_t of) {
    for (int64_t i = 0; i < count; ++i) {
      const Product& p = *products[i];
      for (int64_t block = p.w.blocks * index / of; block < p.w.blocks * (index + 1) / of; ++block)
        epilogue(p, dots[i](p.w, block), biases[i], block, ys[i], 0);
    }
  });
}

EXPORT const int64_t sizeof_Product = sizeof(Product);

// y `[m, n]`: x `[m, k]` times the weight, plus the bias, summed in fp32; both in fp32 or in bf16.
EXPORT void interleaved_product(
    const Product* fixed, const void* x, int64_t m, const void* bias, void* y, int threads) {
  const Product& p = *fixed;
  const int64_t k = p.w.groups * p.w.steps * STEP;
  const bool few = m <= ROWS;
  const auto run = few ? p.bits == 1 ? dot<1> : p.bits == 2 ? dot<2> : p.bits == 4 ? dot<4> : dot<8>
                       : p.bits == 1 ? product<1> : p.bits == 2 ? product<2> : p.bits == 4 ? product<4> : product<8>;
  if (few && !p.x_bf16 && k == p.k) return run(p, static_cast<const float*>(x), m, k, bias, y, threads);
  const int64_t apart = k + LANES;  // rows that are a power of two apart would share few lines of the cache
  const Floats rows(std::min(m, CHUNK) * apart);
  const int64_t x_size = p.x_bf16 ? sizeof(uint16_t) : sizeof(float), y_size = p.y_bf16 ? sizeof(uint16_t) : sizeof(float);
  for (int64_t first = 0; first < m; first += CHUNK) {
    const int64_t count = std::min(CHUNK, m - first);
    spread(p, static_cast<const uint8_t*>(x) + first * p.k * x_size, count, rows.data, apart);
    run(p, rows.data, count, apart, bias, static_cast<uint8_t*>(y) + first * p.n * y_size, threads);
  }
}

EXPORT void interleaved_int_dot(
    const int16_t* x, int64_t m, const int32_t* x_sums, const uint8_t* codes, const float* grid, int64_t blocks,
    int64_t groups, int64_t steps, int bits, int one, float* y, int threads) {
  const Weight w{codes, grid, blocks, groups, steps};
  const auto run = bits == 1 ? int_dot<1> : bits == 2 ? int_dot<2> : bits == 4 ? int_dot<4> : int_dot<8>;
  run(x, m, x_sums, w, one, y, threads);
}
