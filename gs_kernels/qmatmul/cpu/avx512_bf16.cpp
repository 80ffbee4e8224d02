// y = x W^T of bf16 rows x with a row-interleaved weight (interleaved.py), by AVX-512's dot products of bf16 pairs.
//
// A thread takes PANEL blocks of 16 rows of the weight at a time. It dequantizes a stretch of K, in fp32 and rounded
// once to bf16, into a panel that stays in its cache: pairs of neighbours along K, a row to a 32-bit lane. Tiles of up
// to TILE rows of x then run over the panel, with their fp32 sums in registers.
#if defined(__x86_64__)
#include <immintrin.h>
#include <algorithm>
#include <cstdint>
#include <vector>

#include "parallel.h"

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,avx512vbmi")))
#define INLINE TARGET inline __attribute__((always_inline))

namespace {

constexpr int LANES = 16, STEP = 8, PAIRS = STEP / 2;
constexpr int PANEL = 2;        // blocks of 16 rows
constexpr int TILE = 12;        // rows of x: their sums with a panel fill 24 of 32 registers
constexpr int STRETCH = 128;    // steps of K in a panel: 64 KB
constexpr int SHORT = 32;       // the same for a single tile, which reads a panel once: 16 KB
constexpr int64_t CHUNK = 512;  // rows of x of which a stretch stays in the cache: 1 MB

struct Weight {
  const uint8_t* codes;  // [B, G, S, bits * 16]
  const float* grid;     // [B, G, 32]
  int64_t blocks, groups, steps;
};

// The codes of 8 rows, from row `half * 8`, at two neighbours along K: row l in dwords 2l and 2l + 1.
// `low`: the bit of a step at which the first one begins.
template <int BITS>
INLINE __m512 unpack(const uint8_t* codes, int low, int half) {
  alignas(64) uint8_t at[64] = {};
  if (BITS == 8) {
    for (int l = 0; l < 8; ++l) at[8 * l] = 8 * half + l, at[8 * l + 4] = LANES + 8 * half + l;
    const __m512i bytes = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)(codes + low / 8 * LANES)));
    return _mm512_cvtepi32_ps(_mm512_maskz_permutexvar_epi8(0x1111111111111111, _mm512_load_si512(at), bytes));
  }
  alignas(64) float values[16];
  for (int i = 0; i < 16; ++i) values[i] = i % (1 << BITS);
  for (int l = 0; l < 8; ++l) at[8 * l] = 8 * l + low % 8, at[8 * l + 4] = 8 * l + (low + BITS) % 8;
  int64_t bytes;
  __builtin_memcpy(&bytes, codes + low / 8 * LANES + 8 * half, 8);
  const __m512i code = _mm512_multishift_epi64_epi8(_mm512_load_si512(at), _mm512_set1_epi64(bytes));
  return _mm512_permutexvar_ps(code, _mm512_load_ps(values));  // which reads the lowest 4 bits
}

INLINE __m512 twice(__m512 v, int first) {
  alignas(64) int32_t at[16];
  for (int i = 0; i < 16; ++i) at[i] = first + i / 2;
  return _mm512_permutexvar_ps(_mm512_load_si512(at), v);
}

// Fills panel[steps][PAIRS][stride][32] with one block of the weight, from step `first`.
template <int BITS>
TARGET void dequantize(const Weight& w, int64_t block, int64_t first, int64_t steps, int64_t stride, __m512i* panel) {
  const uint8_t* codes = w.codes + (block * w.groups * w.steps + first) * BITS * LANES;
  for (int64_t s = 0; s < steps;) {
    const int64_t group = (first + s) / w.steps;
    const int64_t until = std::min(steps, (group + 1) * w.steps - first);
    const float* grid = w.grid + (block * w.groups + group) * 2 * LANES;
    const __m512 scale = _mm512_loadu_ps(grid), zero = _mm512_loadu_ps(grid + LANES);
    const __m512 scales[2] = {twice(scale, 0), twice(scale, 8)}, zeros[2] = {twice(zero, 0), twice(zero, 8)};
    for (; s < until; ++s, codes += BITS * LANES)
#pragma GCC unroll 4
      for (int p = 0; p < PAIRS; ++p) {
        __m512 real[2];
        for (int half = 0; half < 2; ++half) {
          const __m512 code = unpack<BITS>(codes, 2 * p * BITS, half);
          real[half] = _mm512_mul_ps(_mm512_sub_ps(code, zeros[half]), scales[half]);
        }
        panel[(s * PAIRS + p) * stride] = (__m512i)_mm512_cvtne2ps_pbh(real[1], real[0]);
      }
  }
}

// Adds ROWS rows of x times a panel to y, or sets it to them at the `start`; k, n: from row to row of x and y.
template <int ROWS, int BLOCKS>
TARGET void multiply(const uint16_t* x, int64_t k, const __m512i* panel, int64_t pairs, float* y, int64_t n,
                     bool start) {
  __m512 acc[ROWS][BLOCKS];
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; ++b) acc[m][b] = start ? _mm512_setzero_ps() : _mm512_loadu_ps(y + m * n + b * LANES);
  for (int64_t p = 0; p < pairs; ++p) {
    __m512bh w[BLOCKS];
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; ++b) w[b] = (__m512bh)panel[p * BLOCKS + b];
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m) {
      int32_t pair;
      __builtin_memcpy(&pair, x + m * k + 2 * p, sizeof(pair));
      const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int b = 0; b < BLOCKS; ++b) acc[m][b] = _mm512_dpbf16_ps(acc[m][b], w[b], both);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
    for (int b = 0; b < BLOCKS; ++b) _mm512_storeu_ps(y + m * n + b * LANES, acc[m][b]);
}

using Multiply = void (*)(const uint16_t*, int64_t, const __m512i*, int64_t, float*, int64_t, bool);

template <int BLOCKS>
constexpr Multiply MULTIPLY[TILE + 1] = {
    nullptr,             multiply<1, BLOCKS>, multiply<2, BLOCKS>,  multiply<3, BLOCKS>,  multiply<4, BLOCKS>,
    multiply<5, BLOCKS>, multiply<6, BLOCKS>, multiply<7, BLOCKS>,  multiply<8, BLOCKS>,  multiply<9, BLOCKS>,
    multiply<10, BLOCKS>, multiply<11, BLOCKS>, multiply<12, BLOCKS>};

// A stretch of m rows x, `apart` elements from row to row, times that of BLOCKS blocks of the weight, added to y.
template <int BITS, int BLOCKS>
void add(const uint16_t* x, int64_t m, int64_t apart, const Weight& w, int64_t block, int64_t first, int64_t steps,
         float* y, __m512i* panel) {
  const int64_t n = w.blocks * LANES, tiles = (m + TILE - 1) / TILE;
  for (int b = 0; b < BLOCKS; ++b) dequantize<BITS>(w, block + b, first, steps, BLOCKS, panel + b);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t from = t * m / tiles, rows = (t + 1) * m / tiles - from;
    float* sums = y + from * n + block * LANES;
    MULTIPLY<BLOCKS>[rows](x + from * apart, apart, panel, steps * PAIRS, sums, n, first == 0);
  }
}

// One thread's share: the panels from `begin` to `end`, for all rows. A stretch of x is copied to rows that do not lie
// a multiple of the cache's size apart, as those of x often do.
template <int BITS>
void share(const uint16_t* x, int64_t m, const Weight& w, float* y, int64_t begin, int64_t end) {
  const int64_t all = w.groups * w.steps, k = all * STEP, stretch = m <= TILE ? SHORT : STRETCH;
  const int64_t apart = stretch * STEP + 32;
  auto* panel = static_cast<__m512i*>(_mm_malloc(stretch * PAIRS * PANEL * sizeof(__m512i), sizeof(__m512i)));
  std::vector<uint16_t> near(std::min(m, CHUNK) * apart);
  for (int64_t from = 0; from < m; from += CHUNK) {
    const int64_t rows = std::min(CHUNK, m - from);
    for (int64_t first = 0; first < all; first += stretch) {
      const int64_t steps = std::min(stretch, all - first);
      for (int64_t i = 0; i < rows; ++i)
        std::copy_n(x + (from + i) * k + first * STEP, steps * STEP, near.data() + i * apart);
      for (int64_t block = begin * PANEL; block < end * PANEL; block += PANEL) {
        const auto add_panel = block + PANEL <= w.blocks ? add<BITS, PANEL> : add<BITS, 1>;
        add_panel(near.data(), rows, apart, w, block, first, steps, y + from * w.blocks * LANES, panel);
      }
    }
  }
  _mm_free(panel);
}

template <int BITS>
void run(const uint16_t* x, int64_t m, const Weight& w, float* y, int threads) {
  const int64_t panels = (w.blocks + PANEL - 1) / PANEL;
  in_parallel(threads, [&](int64_t t, int64_t of) { share<BITS>(x, m, w, y, panels * t / of, panels * (t + 1) / of); });
}

}  // namespace

// x: bf16 `[m, K]`, K as the codes are padded; y: fp32 `[m, 16 * blocks]`; bits: 1, 2, 4 or 8.
EXPORT void qmatmul_bf16(const void* x, int64_t m, const void* codes, const void* grid, int64_t blocks,
                             int64_t groups, int64_t steps, int bits, void* y, int threads) {
  const Weight w{static_cast<const uint8_t*>(codes), static_cast<const float*>(grid), blocks, groups, steps};
  const auto run_bits = bits == 1 ? run<1> : bits == 2 ? run<2> : bits == 4 ? run<4> : run<8>;
  run_bits(static_cast<const uint16_t*>(x), m, w, static_cast<float*>(y), threads);
}
#endif
