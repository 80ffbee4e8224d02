// Multiplies with a row-interleaved weight (interleaved.py): rows of x in whole numbers (row_pieces.h); many in fp32, for
// which it dequantizes blocks of the weight; and those of a product of int8 matrices.
#include "parallel.h"
#include "simd.h"
#include "interleaved_product.h"
#include "row_pieces.h"

#include <algorithm>
#include <functional>
#include <vector>

using namespace lanes;

namespace {

constexpr int ROWS = 4;  // of x, that are multiplied with codes as they are unpacked
#ifdef LANES_LOOK_UP
constexpr int TILE = 12, PANEL = 2;  // rows of x and blocks of a panel: their sums fill 24 of 32 registers
#else
constexpr int TILE = 6, PANEL = 1;  // 12 of 16
#endif
constexpr int64_t STRETCH = 512;  // of K in a panel: 64 KB or 32
constexpr int64_t SHORT = 128;    // where up to two tiles of rows read it
constexpr int64_t CHUNK = 512;    // rows of x at a time

template <int BITS>
constexpr int PER_WORD = 32 / BITS;  // codes

// Code j of words.
template <int BITS>
LANE_FN I field(I words, int j) {
  const int low = 16 * (j % 2) + BITS * (j / 2);
  const I above = low ? right(words, low) : words;
  return low + BITS < 32 ? above & all((1 << BITS) - 1) : above;
}

// Codes 2p and 2p + 1 of words, as 16-bit halves.
template <int BITS>
LANE_FN I pair(I words, int p) {
  return (p ? right(words, BITS * p) : words) & all(((1 << BITS) - 1) * 0x10001);
}

// Code j of words in fp32.
template <int BITS>
LANE_FN F code(I words, int j) {
#ifdef LANES_LOOK_UP
  if (BITS < 8) {
    alignas(64) float values[LANES];
    for (int i = 0; i < LANES; ++i) values[i] = i % (1 << BITS);
    const int low = 16 * (j % 2) + BITS * (j / 2);
    return look_up(load(values), low ? right(words, low) : words);
  }
#endif
  return in_fp32(field<BITS>(words, j));
}

// One block times one row of x, padded, in fp32.
template <int BITS>
__attribute__((noinline)) F dot_block(const float* x, const Weight& w, int64_t block) {
  const int32_t* codes = w.codes + block * w.groups * w.words * LANES;
  F total = all(0.0f);
  for (int64_t g = 0; g < w.groups; ++g) {
    const float* grid = w.grid + (block * w.groups + g) * 2 * LANES;
    const F scale = load(grid), zero = load(grid + LANES);
    F part = all(0.0f);
    for (int64_t i = 0; i < w.words; ++i, codes += LANES, x += PER_WORD<BITS>) {
      const I words = load(codes);
#pragma GCC unroll 8
      for (int j = 0; j < PER_WORD<BITS>; ++j) part = fma(code<BITS>(words, j) - zero, all(x[j]), part);
    }
    total = fma(part, scale, total);
  }
  return total;
}

// `(sums - zero * x_sums) * scale`: whole zero points in integers, exactly.
LANE_FN F real_sums(I sums, int32_t x_sums, const float* grid) {
  const F zero = load(grid + LANES);
  const F near = min(max(round(zero), all(-256.0f)), all(256.0f));  // more would overflow; the rest goes as fractions
  const I centered = sums - whole(near) * all(x_sums);
  return (in_fp32(centered) - (zero - near) * all((float)x_sums)) * load(grid);
}

// The same of whole numbers: x int16, padded, x_sums `[M, groups]`. one: all groups have one scale.
template <int BITS, int M>
LANE_FN void int_dot_block(
    const int16_t* x, int64_t apart, const int32_t* x_sums, const Weight& w, int64_t block, int one, float* y, int64_t wide) {
  const int32_t* codes = w.codes + block * w.groups * w.words * LANES;
  F total[M];
  I part[M];
  int32_t x_sum[M];
  for (int m = 0; m < M; ++m) total[m] = all(0.0f), part[m] = all(0), x_sum[m] = 0;
  for (int64_t g = 0; g < w.groups; ++g) {
    for (int64_t i = 0; i < w.words; ++i, codes += LANES, x += PER_WORD<BITS>) {
      const I words = load(codes);
#pragma GCC unroll 4
      for (int p = 0; p < PER_WORD<BITS> / 2; ++p) {
        const I both = pair<BITS>(words, p);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          int32_t two;
          std::memcpy(&two, x + m * apart + 2 * p, sizeof(two));
          part[m] = add_pairs(part[m], both, all(two));
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

// Columns of x, groups padded.
inline int64_t padded(const Product& p) { return p.w.groups * p.w.words * 32 / p.bits; }

// Rows of x as the weight has them: fp32, groups padded with zeros, each row `apart` from the next.
void spread(const Product& p, const void* x, int64_t rows, float* out, int64_t apart) {
  const int64_t width = padded(p) / p.w.groups;
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

// Some rows of x, prepared for all blocks of a weight, or of another whose groups are the same.
struct Rows {
  Rows(const Product& p, const float* x, int64_t m, int64_t apart, int threads)
      : x(x), apart(apart), pieces(in_pieces(p.w, padded(p), x, m, apart, p.x_short, threads)) {}

  // Passes sums of M rows from `row` on with one block: take(sums, row).
  template <int BITS, int M, class Take>
  LANE_FN_OF void dot(const Weight& w, int64_t block, int64_t row, const Take& take) const {
    F sums[M];
    dot_pieces<BITS, M>(pieces, row, w, block, sums);
    for (int m = 0; m < M; ++m) {
      if (!pieces.exist[row + m]) sums[m] = dot_block<BITS>(x + (row + m) * apart, w, block);
      take(sums[m], row + m);
    }
  }

  const float* x;
  int64_t apart;
  Pieces pieces;
};

// Codes are multiplied as they are unpacked.
template <int BITS>
void dot(const Product& p, const float* x, int64_t m, int64_t apart, const void* bias, void* y, int threads) {
  const Rows rows(p, x, m, apart, threads);
  parallel_for(threads, p.w.blocks, [&](int64_t block) {
    const auto take = [&](F sums, int64_t row) INLINE { epilogue(p, sums, bias, block, y, row); };
    int64_t row = 0;
    for (; row + ROWS <= m; row += ROWS) rows.dot<BITS, ROWS>(p.w, block, row, take);
    if (row + 2 <= m) rows.dot<BITS, 2>(p.w, block, row, take), row += 2;
    if (row < m) rows.dot<BITS, 1>(p.w, block, row, take);
  });
}

// Dequantizes words of one block into panel[word][PER_WORD][PANEL][16].
template <int BITS>
void dequantize(const Weight& w, int64_t block, int64_t first, int64_t words, float* panel) {
  const int32_t* codes = w.codes + (block * w.groups * w.words + first) * LANES;
  for (int64_t i = 0; i < words;) {
    const int64_t group = (first + i) / w.words, until = std::min(words, (group + 1) * w.words - first);
    const float* grid = w.grid + (block * w.groups + group) * 2 * LANES;
    const F scale = load(grid), zero = load(grid + LANES);
    for (; i < until; ++i, codes += LANES) {
      const I word = load(codes);
#pragma GCC unroll 8
      for (int j = 0; j < PER_WORD<BITS>; ++j)
        store(panel + (i * PER_WORD<BITS> + j) * PANEL * LANES, (code<BITS>(word, j) - zero) * scale);
    }
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
  const int64_t all_words = p.w.groups * p.w.words, panels = (p.w.blocks + PANEL - 1) / PANEL;
  const int64_t tiles = (m + TILE - 1) / TILE, stretch = (tiles <= 2 ? SHORT : STRETCH) / PER_WORD<BITS>;
  in_parallel(threads, [&](int64_t index, int64_t of) {
    const Floats panel_of(stretch * PER_WORD<BITS> * PANEL * LANES), sums_of(m * PANEL * LANES);
    float *panel = panel_of.data, *sums = sums_of.data;
    for (int64_t at = panels * index / of; at < panels * (index + 1) / of; ++at) {
      const int64_t block = at * PANEL, blocks = std::min<int64_t>(PANEL, p.w.blocks - block);
      std::fill_n(sums, m * PANEL * LANES, 0.0f);
      for (int64_t first = 0; first < all_words; first += stretch) {
        const int64_t words = std::min(stretch, all_words - first);
        for (int64_t b = 0; b < blocks; ++b) dequantize<BITS>(p.w, block + b, first, words, panel + b * LANES);
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t from = t * m / tiles, rows = (t + 1) * m / tiles - from;
          const float* near = x + from * apart + first * PER_WORD<BITS>;
          multiply_rows<TILE>(rows, near, apart, panel, words * PER_WORD<BITS>, sums + from * PANEL * LANES);
        }
      }
      for (int64_t row = 0; row < m; ++row)
        for (int64_t b = 0; b < blocks; ++b) epilogue(p, load(sums + (row * PANEL + b) * LANES), bias, block + b, y, row);
    }
  });
}

template <int BITS>
void int_dot(const int16_t* x, int64_t m, const int32_t* x_sums, const Weight& w, int one, float* y, int threads) {
  const int64_t apart = w.groups * w.words * PER_WORD<BITS>, wide = w.blocks * LANES;
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

// Calls body with the number as a constant.
template <class Body>
void of_bits(int bits, const Body& body) {
  if (bits == 1) body(std::integral_constant<int, 1>{});
  if (bits == 2) body(std::integral_constant<int, 2>{});
  if (bits == 4) body(std::integral_constant<int, 4>{});
  if (bits == 8) body(std::integral_constant<int, 8>{});
}

}  // namespace

void products_of_row(
    const Product* const* products, const void* const* biases, float* const* ys, int64_t count, const float* x, int threads) {
  std::vector<Floats> held;
  std::vector<std::shared_ptr<const Rows>> rows;
  for (int64_t i = 0; i < count; ++i) {
    const Product &p = *products[i], &before = *products[i ? i - 1 : 0];
    const bool same = i && padded(p) == padded(before) && p.w.groups == before.w.groups && p.x_short == before.x_short;
    if (same) {
      rows.push_back(rows.back());
      continue;
    }
    held.emplace_back(padded(p));
    spread(p, x, 1, held.back().data, 0);
    rows.push_back(std::make_shared<const Rows>(p, held.back().data, 1, 0, 1));
  }
  in_parallel(threads, [&](int64_t index, int64_t of) {
    for (int64_t i = 0; i < count; ++i) {
      const Product& p = *products[i];
      of_bits(p.bits, [&](auto bits) {
        for (int64_t block = p.w.blocks * index / of; block < p.w.blocks * (index + 1) / of; ++block)
          rows[i]->dot<bits, 1>(p.w, block, 0, [&](F sums, int64_t) { epilogue(p, sums, biases[i], block, ys[i], 0); });
      });
    }
  });
}

EXPORT const int64_t sizeof_Product = sizeof(Product);

// y `[m, n]`: x `[m, k]` times the weight, plus the bias, summed in fp32; both in fp32 or in bf16.
EXPORT void interleaved_product(
    const Product* fixed, const void* x, int64_t m, const void* bias, void* y, int threads) {
  const Product& p = *fixed;
  const int64_t k = padded(p);
  const bool few = m <= ROWS;
  of_bits(p.bits, [&](auto bits) {
    const auto run = few || p.x_short ? dot<bits> : product<bits>;
    if (few && !p.x_bf16 && k == p.k) return run(p, static_cast<const float*>(x), m, k, bias, y, threads);
    const int64_t apart = k + LANES;  // rows that are a power of two apart would share few lines of the cache
    const Floats rows(std::min(m, CHUNK) * apart);
    const int64_t x_size = p.x_bf16 ? sizeof(uint16_t) : sizeof(float), y_size = p.y_bf16 ? sizeof(uint16_t) : sizeof(float);
    for (int64_t first = 0; first < m; first += CHUNK) {
      const int64_t count = std::min(CHUNK, m - first);
      spread(p, static_cast<const uint8_t*>(x) + first * p.k * x_size, count, rows.data, apart);
      run(p, rows.data, count, apart, bias, static_cast<uint8_t*>(y) + first * p.n * y_size, threads);
    }
  });
}

EXPORT void interleaved_int_dot(
    const int16_t* x, int64_t m, const int32_t* x_sums, const int32_t* codes, const float* grid, int64_t blocks,
    int64_t groups, int64_t words, int bits, int one, float* y, int threads) {
  const Weight w{codes, grid, blocks, groups, words};
  of_bits(bits, [&](auto bits) { int_dot<bits>(x, m, x_sums, w, one, y, threads); });
}
