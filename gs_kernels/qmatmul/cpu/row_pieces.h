// Rows of x times a row-interleaved weight (interleaved.py) in integers: a pair of codes and a pair of 16-bit numbers are
// multiplied and added by one instruction, where fp32 would widen and convert each code.
//
// x is written in units of 2**-30 of the power of two above the largest of its group, in two pieces of 16 bits:
// x = (high * 2**15 + low) * unit. Sums of a group are exact, so what a product loses there is at most 2**-31 of that power
// times the sum of |w|: less than what sums in fp32 lose.
// One piece does where x has no more digits; and where x comes from 16-bit floats (`x_short`) also where rounding takes little
// from the group, see LOSS. Which holds is decided for each group of each row by itself.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "floats.h"
#include "interleaved_product.h"
#include "parallel.h"

namespace {
namespace lanes {

constexpr int LOW_BITS = 15, DIGITS = 2 * LOW_BITS;
// One piece loses Σ|x - rounded x|, which may be 2**-12 of Σ min(|x|, 512 of its steps), an eighth of what the rounding of a
// bf16 result loses. The minimum keeps single large elements from covering for the others.
constexpr float LOSS = 0x1p-12f;
constexpr int32_t COUNTED = 512;
constexpr int64_t MOST_WORDS = 64;  // whose sums int32 holds: 128 pairs of 255 * 2**15 each, or as many codes times 2**bits
constexpr int AHEAD = 4096;         // bytes of codes that are asked for before they are read

// Rows of x, groups padded as those of the weight.
struct Pieces {
  int64_t apart, size, groups;     // of rows and groups: numbers; groups of a row
  std::vector<int16_t> high, low;  // [m, apart]
  std::vector<float> units, sums;  // [m, groups]: what 1 of low counts; the sum of x as it is written
  std::vector<uint8_t> two;        // [m, groups]: whether low is not 0
  std::vector<uint8_t> exist;      // [m]: false where x is not finite, too large or too small
};

// Writes one group of one row, and up to 15 zeros behind it; returns whether it can be written so.
inline bool write_group(const float* x, int64_t size, bool x_short, Pieces& to, int64_t at, int64_t group) {
  Range range;
  for (int64_t i = 0; i < size; i += LANES) range.add(load(x + i, size - i), size - i);
  const float most = larger(-smallest(range.low()), lanes::largest(range.high()));
  if (!(most < 0x1p100f) || (most > 0 && most < 0x1p-90f)) return false;
  int exponent = 0;
  std::frexp(most, &exponent);
  const F inverse = all(std::ldexp(1.0f, DIGITS - exponent));
  const I low_bits = all((1 << LOW_BITS) - 1), half = all(1 << (LOW_BITS - 1));
  const auto write = [&](std::vector<int16_t>& piece, int64_t i, I v) INLINE {
    store(reinterpret_cast<uint16_t*>(piece.data() + at + i), v & all(0xffff));
  };
  F lost = all(0.0f), kept = lost, largest = lost, highs = lost, lows = lost;
  for (int64_t i = 0; i < size; i += LANES) {
    const I whole = nearest(load(x + i, size - i) * inverse), high = quotient(whole + half, LOW_BITS);
    const F steps = in_fp32(high), size_of = absolute(steps);
    write(to.high, i, high);
    lost = lost + absolute(in_fp32(whole - left(high, LOW_BITS)));
    kept = kept + min(size_of, all((float)COUNTED));
    largest = max(largest, size_of), highs = highs + steps;
  }
  const float allowed = x_short ? sum(kept) * (LOSS * (1 << LOW_BITS)) : 0.0f;
  const bool two = sum(lost) > allowed || lanes::largest(largest) > INT16_MAX;
  if (two) {
    highs = all(0.0f);
    for (int64_t i = 0; i < size; i += LANES) {
      const I whole = nearest(load(x + i, size - i) * inverse), high = quotient(whole, LOW_BITS), low = whole & low_bits;
      write(to.high, i, high), write(to.low, i, low);
      highs = highs + in_fp32(high), lows = lows + in_fp32(low);
    }
  }
  to.units[group] = std::ldexp(1.0f, exponent - DIGITS), to.two[group] = two;
  to.sums[group] = (sum(highs) * (1 << LOW_BITS) + sum(lows)) * to.units[group];
  return true;
}

// x: m rows that lie `apart`.
inline Pieces in_pieces(const Weight& w, int64_t k, const float* x, int64_t m, int64_t apart, bool x_short, int threads) {
  const int64_t size = k / w.groups, between = k + 2 * LANES, all_groups = m * w.groups;  // see interleaved_product: apart
  Pieces to{between, size, w.groups, std::vector<int16_t>(m * between), std::vector<int16_t>(m * between),
            std::vector<float>(all_groups), std::vector<float>(all_groups), std::vector<uint8_t>(all_groups),
            std::vector<uint8_t>(m, 1)};
  parallel_for(m == 1 ? 1 : threads, m, [&](int64_t row) {
    for (int64_t g = 0; g < w.groups && to.exist[row]; ++g)
      to.exist[row] = write_group(x + row * apart + g * size, size, x_short, to, row * between + g * size, row * w.groups + g);
  });
  return to;
}

// Adds the sums of a group's codes times V rows of whole numbers, exact unless fp32 cannot hold one.
template <int BITS, int V>
LANE_FN void add_group(const int32_t* codes, int64_t words, const int16_t* const* x, F* sums) {
  constexpr int PAIRS = 16 / BITS;
  constexpr bool IN_PLACE = BITS < 8 && 2 * V <= WIDE;  // every second pair is not shifted, and has sums of its own
  for (int64_t first = 0; first < words; first += MOST_WORDS) {
    I parts[V][2];
    each<V>([&](auto v) INLINE { parts[v][0] = parts[v][1] = all(0); });
    for (int64_t i = first; i < std::min(words, first + MOST_WORDS); ++i) {
      const I word = load(codes + i * LANES);
      __builtin_prefetch(reinterpret_cast<const char*>(codes + i * LANES) + AHEAD);
      each<PAIRS>([&](auto j) INLINE {
        constexpr int above = IN_PLACE && j % 2, down = (j - above) * BITS;
        const I two = (down ? right(word, down) : word) & all(((1 << BITS) - 1) * 0x10001 << above * BITS);
        each<V>([&](auto v) INLINE {
          int32_t pair;
          std::memcpy(&pair, x[v] + 2 * (i * PAIRS + j), sizeof(pair));
          parts[v][above] = add_pairs(parts[v][above], two, all(pair));
        });
      });
    }
    each<V>([&](auto v) INLINE { sums[v] = sums[v] + in_fp32(parts[v][0] + quotient(parts[v][1], BITS)); });
  }
}

// One block of the weight times M rows from `row`: sums `[M]`. A row's bits are those that it has alone.
template <int BITS, int M>
LANE_FN void dot_pieces(const Pieces& rows, int64_t row, const Weight& w, int64_t block, F* sums) {
  F total[M];
  each<M>([&](auto m) INLINE { total[m] = all(0.0f); });
  for (int64_t g = 0; g < w.groups; ++g) {
    const int32_t* codes = w.codes + (block * w.groups + g) * w.words * LANES;
    const int64_t first = row * rows.groups + g;
    bool two = false;
    each<M>([&](auto m) INLINE { two |= rows.two[first + m * rows.groups]; });
    const int16_t* x[2 * M];  // high pieces, low ones
    F sums_of[2 * M];
    each<M>([&](auto m) INLINE {
      const int64_t at = (row + m) * rows.apart + g * rows.size;
      x[m] = rows.high.data() + at, x[M + m] = rows.low.data() + at;
    });
    each<2 * M>([&](auto v) INLINE { sums_of[v] = all(0.0f); });
    constexpr bool BOTH = 2 * M <= WIDE;
    if (two && BOTH) {
      add_group<BITS, BOTH ? 2 * M : M>(codes, w.words, x, sums_of);
    } else {
      add_group<BITS, M>(codes, w.words, x, sums_of);
      if (two) add_group<BITS, M>(codes, w.words, x + M, sums_of + M);
    }
    const float* grid = w.grid + (block * w.groups + g) * 2 * LANES;
    const F scale = load(grid), zero = load(grid + LANES);
    each<M>([&](auto m) INLINE {
      const F sum = fma(sums_of[m], all((float)(1 << LOW_BITS)), sums_of[M + m]) * all(rows.units[first + m * rows.groups]);
      total[m] = fma(sum - zero * all(rows.sums[first + m * rows.groups]), scale, total[m]);
    });
  }
  each<M>([&](auto m) INLINE { sums[m] = total[m]; });
}

}  // namespace lanes
}  // namespace
