// One row of x times a row-interleaved weight (interleaved.py) of 2 or 4 bits with AVX2, in integers.
//
// x is rounded to 24 bits below the largest of its group, and written in three digits of 8 bits, from -128 to 127. Codes
// and digits are bytes that one instruction multiplies and adds in pairs; in fp32, each code would be widened and converted.
// The sums of a group are exact; what x loses is of the size of what sums in fp32 lose, twice that beside outliers of 300x.
#pragma once
#if defined(__AVX2__) && !defined(__AVX512F__)
#define HAS_ROW_DIGITS
#include <algorithm>
#include <cmath>
#include <vector>

#include "floats.h"
#include "interleaved_product.h"

namespace {
namespace lanes {

constexpr int DIGITS = 3;
constexpr int AHEAD = 4096;  // bytes of codes that are asked for before they are read
constexpr float MOST = 127 * 65536 + 127 * 256 + 127;

// Of one row x, as a weight reads it: digits `[groups, steps, 4, DIGITS]` of two elements, twice; for each group what the
// last digit counts, and the sum of x.
struct RowDigits {
  std::vector<int32_t> pairs;
  std::vector<float> units, sums;
};

// Which elements of a step of 8 meet in pair i: those of one field of two neighboring vectors of bytes.
template <int BITS>
constexpr int first_of(int i) {
  constexpr int PER = 8 / BITS;
  return i / PER * 2 * PER + i % PER;
}

// False where x has no digits: it is not finite, or too large or small.
template <int BITS>
bool find_digits(const Weight& w, const float* x, RowDigits& found) {
  const int64_t size = w.steps * 8;
  found.pairs.resize(w.groups * w.steps * 4 * DIGITS), found.units.resize(w.groups), found.sums.resize(w.groups);
  std::vector<int32_t> whole(size);
  int32_t* pairs = found.pairs.data();
  for (int64_t g = 0; g < w.groups; ++g, x += size) {
    Range range;
    for (int64_t i = 0; i < size; i += LANES) range.add(load(x + i, size - i), size - i);
    const float most = larger(-smallest(range.low()), largest(range.high()));
    if (!(most < 0x1p100f) || (most > 0 && most < 0x1p-100f)) return false;
    int exponent;
    std::frexp(most, &exponent);
    float unit = std::ldexp(1.0f, exponent - 23);
    if (most / unit > MOST) unit *= 2;
    const float inverse = 1 / unit;
    int64_t sum = 0;
    for (int64_t i = 0; i < size; i += LANES) {
      const int64_t n = std::min(LANES, size - i);
      store(whole.data() + i, lanes::whole(round(load(x + i, n) * all(inverse))), n);
    }
    for (int64_t i = 0; i < size; ++i) sum += whole[i];
    found.units[g] = unit, found.sums[g] = (float)sum * unit;
    for (int64_t s = 0; s < w.steps; ++s)
      for (int i = 0; i < 4; ++i, pairs += DIGITS) {
        const int32_t* near = whole.data() + s * 8 + first_of<BITS>(i);
        int32_t a = near[0], b = near[8 / BITS];
        for (int d = 0; d < DIGITS; ++d) {
          const int32_t a_digit = (int8_t)a, b_digit = (int8_t)b;
          pairs[d] = (int32_t)(0x10001u * ((uint32_t)(a_digit & 0xff) | (uint32_t)(b_digit & 0xff) << 8));
          a = (a - a_digit) / 256, b = (b - b_digit) / 256;
        }
      }
  }
  return true;
}

// Sums of 16 rows of the weight, of which even and odd ones lie apart: in fp32, of all digits.
LANE_FN __m256 joined(const __m256i* sums) {
  const __m256 low = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[1]), _mm256_set1_ps(256), _mm256_cvtepi32_ps(sums[0]));
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[2]), _mm256_set1_ps(65536), low);
}

// The sum of a and b, here: GCC adds up products of several steps first otherwise, more than there are registers for.
LANE_FN __m256i add_now(__m256i a, __m256i b) {
  a = _mm256_add_epi16(a, b);
  asm("" : "+x"(a));
  return a;
}

// One block of the weight times the row.
template <int BITS>
LANE_FN F dot_digits(const RowDigits& row, const Weight& w, int64_t block) {
  constexpr int PER = 8 / BITS;
  constexpr int AT_ONCE = BITS == 4 ? 2 : 8;  // steps whose sums of two products, of 15 * 128 each, 16 bits hold
  const uint8_t* codes = w.codes + block * w.groups * w.steps * BITS * LANES;
  const int32_t* x = row.pairs.data();
  const __m256i mask = _mm256_set1_epi8((1 << BITS) - 1), even_ones = _mm256_set1_epi32(1);
  const __m256i odd_ones = _mm256_set1_epi32(1 << 16), zeros = _mm256_setzero_si256();
  const __m256i interleave = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
  F total = all(0.0f);
  for (int64_t g = 0; g < w.groups; ++g) {
    __m256i even[DIGITS] = {zeros, zeros, zeros}, odd[DIGITS] = {zeros, zeros, zeros};
    const auto add_steps = [&](int count) INLINE {
      __m256i shorts[DIGITS] = {zeros, zeros, zeros};
#pragma GCC unroll 8
      for (int s = 0; s < count; ++s) {
        each<BITS / 2>([&](auto) INLINE {
          __m256i bytes = _mm256_loadu_si256((const __m256i*)codes);
          _mm_prefetch((const char*)codes + AHEAD, _MM_HINT_T0);
          bytes = _mm256_shuffle_epi8(_mm256_permute4x64_epi64(bytes, 0xd8), interleave);
          codes += 2 * LANES;
          each<PER>([&](auto f) INLINE {
            const __m256i field = _mm256_and_si256(f ? _mm256_srli_epi16(bytes, f * BITS) : bytes, mask);
            each<DIGITS>([&](auto d) INLINE {
              shorts[d] = add_now(shorts[d], _mm256_maddubs_epi16(field, _mm256_set1_epi32(x[d])));
            });
            x += DIGITS;
          });
        });
      }
      each<DIGITS>([&](auto d) INLINE {
        even[d] = _mm256_add_epi32(even[d], _mm256_madd_epi16(shorts[d], even_ones));
        odd[d] = _mm256_add_epi32(odd[d], _mm256_madd_epi16(shorts[d], odd_ones));
      });
    };
    int64_t s = 0;
    for (; s + AT_ONCE <= w.steps; s += AT_ONCE) add_steps(AT_ONCE);
    for (; s < w.steps; ++s) add_steps(1);
    const __m256 evens = joined(even), odds = joined(odd);
    const __m256 low = _mm256_unpacklo_ps(evens, odds), high = _mm256_unpackhi_ps(evens, odds);
    const F sum = {_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
    const float* grid = w.grid + (block * w.groups + g) * 2 * LANES;
    total = fma(sum * all(row.units[g]) - load(grid + LANES) * all(row.sums[g]), load(grid), total);
  }
  return total;
}

}  // namespace lanes
}  // namespace
#endif
