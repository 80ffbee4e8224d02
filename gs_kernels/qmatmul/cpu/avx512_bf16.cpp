// y = x W^T of bf16 rows x with a row-interleaved weight (interleaved.py), by AVX-512's dot products of bf16 pairs.
//
// Codes less half their range are whole numbers that bf16 holds exactly, so nothing but the result is rounded: a table
// gives a pair of them, a row of the weight to a 32-bit lane, which is multiplied with up to TILE rows of x while it is in a
// register. Scales, and zero points times sums of x, follow in fp32 behind each group.
#if defined(__AVX512VNNI__)  // which every CPU with these dot products has
#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "interleaved_product.h"
#include "parallel.h"

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define INLINE TARGET inline __attribute__((always_inline))

namespace {

constexpr int LANES = 16;
constexpr int TILE = 16;  // rows of x: their sums fill half of the registers

// Rows of x, of which tiles lie together: the pairs of one tile at pairs `[K / 2][rows]`, then those of the next.
struct Rows {
  std::vector<int32_t> pairs;
  std::vector<float> sums;  // of each group, in the same order: [groups][rows]
  int64_t m, tiles;

  int64_t first(int64_t tile) const { return tile * m / tiles; }
};

TARGET float sum_of(const uint16_t* x, int64_t n) {
  __m512 sums = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += LANES) {
    const __mmask16 mask = n - i >= LANES ? 0xffff : (1u << (n - i)) - 1;
    const __m512i halves = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x + i));
    sums = _mm512_add_ps(sums, _mm512_castsi512_ps(_mm512_slli_epi32(halves, 16)));
  }
  return _mm512_reduce_add_ps(sums);
}

Rows tiled(const Product& p, const uint16_t* x, int64_t m, int threads) {
  const int64_t size = p.w.words * 32 / p.bits, k = p.w.groups * size;
  Rows rows{std::vector<int32_t>(m * k / 2), std::vector<float>(m * p.w.groups), m, (m + TILE - 1) / TILE};
  parallel_for(threads, rows.tiles, [&](int64_t t) {
    const int64_t first = rows.first(t), count = rows.first(t + 1) - first;
    std::vector<uint16_t> padded(k == p.k ? 0 : k);
    for (int64_t row = 0; row < count; ++row) {
      const uint16_t* near = x + (first + row) * p.k;
      if (k != p.k) {
        for (int64_t g = 0; g * p.group < p.k; ++g) std::copy_n(near + g * p.group, p.group, padded.data() + g * size);
        near = padded.data();
      }
      int32_t* pairs = rows.pairs.data() + first * k / 2 + row;
      for (int64_t i = 0; i < k / 2; ++i) std::memcpy(pairs + i * count, near + 2 * i, sizeof(*pairs));
      float* sums = rows.sums.data() + first * p.w.groups + row;
      for (int64_t g = 0; g < p.w.groups; ++g) sums[g * count] = sum_of(near + g * size, size);
    }
  });
  return rows;
}

// Pair i of words.
template <int BITS>
INLINE __m512bh weights(__m512i words, int i, __m512i table) {
  const __m512i both = i ? _mm512_srli_epi32(words, BITS * i) : words;  // codes at the low ends of the halves
  if (BITS == 8) {
    __m512i f[2];
    for (int j = 0; j < 2; ++j) {
      const __m512i byte = _mm512_and_si512(j ? _mm512_srli_epi32(both, 16) : both, _mm512_set1_epi32(255));
      f[j] = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_sub_epi32(byte, _mm512_set1_epi32(128))));
    }
    return (__m512bh)_mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(f[0], 16), f[1]);
  }
  return (__m512bh)_mm512_permutexvar_epi16(both, table);  // which reads the lowest 5 bits
}

template <int BITS>
INLINE __m512i table_of() {
  alignas(64) uint16_t values[32];
  for (int i = 0; i < 32; ++i) {
    const float value = i % (1 << BITS) - (1 << (BITS - 1));
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    values[i] = bits >> 16;
  }
  return _mm512_load_si512(values);
}

// Writes a row's sums with one block, and the bias, if any.
INLINE void epilogue(const Product& p, __m512 sums, const void* bias, int64_t block, void* y, int64_t row) {
  const int64_t first = block * LANES, at = row * p.n + first, rest = p.n - first;
  const __mmask16 mask = rest >= LANES ? 0xffff : (1u << rest) - 1;
  if (bias && p.bias_bf16) {
    const __m256i halves = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(bias) + first);
    sums = _mm512_add_ps(sums, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)));
  } else if (bias) {
    sums = _mm512_add_ps(sums, _mm512_maskz_loadu_ps(mask, static_cast<const float*>(bias) + first));
  }
  if (p.y_bf16) {
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(y) + at, mask, (__m256i)_mm512_cvtneps_pbh(sums));
  } else {
    _mm512_mask_storeu_ps(static_cast<float*>(y) + at, mask, sums);
  }
}

// One tile of M rows, from row `first`, times one block of the weight.
template <int BITS, int M>
TARGET void multiply(
    const Product& p, const int32_t* x, const float* x_sums, int64_t block, const void* bias, void* y, int64_t first) {
  const Weight& w = p.w;
  const int32_t* codes = w.codes + block * w.groups * w.words * LANES;
  const __m512i table = table_of<BITS>();
  __m512 total[M];
  for (int m = 0; m < M; ++m) total[m] = _mm512_setzero_ps();
  for (int64_t g = 0; g < w.groups; ++g, x_sums += M) {
    __m512 acc[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) acc[m] = _mm512_setzero_ps();
    for (int64_t s = 0; s < w.words; ++s, codes += LANES) {
      const __m512i words = _mm512_loadu_si512(codes);
#pragma GCC unroll 4
      for (int i = 0; i < 16 / BITS; ++i, x += M) {
        const __m512bh pair = weights<BITS>(words, i, table);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) acc[m] = _mm512_dpbf16_ps(acc[m], pair, (__m512bh)_mm512_set1_epi32(x[m]));
      }
    }
    const float* grid = w.grid + (block * w.groups + g) * 2 * LANES;
    const __m512 scale = _mm512_loadu_ps(grid);
    const __m512 zero = _mm512_sub_ps(_mm512_loadu_ps(grid + LANES), _mm512_set1_ps(1 << (BITS - 1)));
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const __m512 sum = _mm512_fnmadd_ps(zero, _mm512_set1_ps(x_sums[m]), acc[m]);
      total[m] = _mm512_fmadd_ps(sum, scale, total[m]);
    }
  }
  for (int m = 0; m < M; ++m) epilogue(p, total[m], bias, block, y, first + m);
}

template <int BITS, int M>
void multiply_rows(int64_t rows, const Product& p, const int32_t* x, const float* x_sums, int64_t block, const void* bias,
                   void* y, int64_t first) {
  if (rows == M) return multiply<BITS, M>(p, x, x_sums, block, bias, y, first);
  if constexpr (M > 1) multiply_rows<BITS, M - 1>(rows, p, x, x_sums, block, bias, y, first);
}

template <int BITS>
void product(const Product& p, const Rows& rows, const void* bias, void* y, int threads) {
  const int64_t k = p.w.groups * p.w.words * 32 / BITS;
  in_parallel(threads, [&](int64_t index, int64_t of) {
    for (int64_t t = 0; t < rows.tiles; ++t) {
      const int64_t first = rows.first(t), count = rows.first(t + 1) - first;
      const int32_t* x = rows.pairs.data() + first * k / 2;
      const float* sums = rows.sums.data() + first * p.w.groups;
      for (int64_t block = p.w.blocks * index / of; block < p.w.blocks * (index + 1) / of; ++block)
        multiply_rows<BITS, TILE>(count, p, x, sums, block, bias, y, first);
    }
  });
}

}  // namespace

// y `[m, n]`, fp32 or bf16: bf16 x `[m, k]` times the weight, plus the bias, if any.
EXPORT void bf16_product(const Product* fixed, const void* x, int64_t m, const void* bias, void* y, int threads) {
  const Product& p = *fixed;
  const Rows rows = tiled(p, static_cast<const uint16_t*>(x), m, threads);
  const auto run = p.bits == 1 ? product<1> : p.bits == 2 ? product<2> : p.bits == 4 ? product<4> : product<8>;
  run(p, rows, bias, y, threads);
}
#endif
