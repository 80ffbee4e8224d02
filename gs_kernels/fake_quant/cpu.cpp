// Fake-quant, its gradient, codes of floats, floats of codes and ranges on a CPU, in the order of operations of ref.py.
//
// A tensor is rows of memory (strided_rows.py), cut into tiles that threads share. What a tile leaves for each scale is
// summed in an order that does not depend on the number of threads.
#include <algorithm>
#include <vector>

#include "floats.h"
#include "parallel.h"

using namespace lanes;

namespace {

constexpr int BY_TENSOR = 0, BY_ROW = 1, BY_COL = 2;  // the last, by cycle, is 3
constexpr int64_t ELEMENTS = 1 << 12;                 // of a tile
constexpr int64_t WIDTH = 256;                        // of one by column, which is higher: its sums are one per column
constexpr float SCALE_MIN = 0x1p-126f, SCALE_MAX = 3.40282347e+38f, ZERO_MAX = 0x1p20f;

struct Rows {
  int64_t by, rows, cols, channels, per, outer, inner;

  int64_t start(int64_t row) const { return row < per ? row * inner : row / per * outer + row % per * inner; }
  int64_t channel(int64_t row) const { return by == BY_TENSOR ? 0 : by == BY_ROW ? row : row % channels; }
};

struct Pass {
  Rows rows;
  const float *scale, *zero;  // [channels]
  float qmin, qmax;
  int32_t floats;     // which, see `of_kind`
  int32_t is_signed;  // of codes
  int32_t threads;
};

// Tiles of rows, `across` beside each other, `down` below.
struct Tiles {
  explicit Tiles(const Rows& rows) : by_col(rows.by == BY_COL) {
    width = std::min(rows.cols, by_col ? WIDTH : ELEMENTS);
    height = std::max<int64_t>(1, (by_col ? 4 : 1) * ELEMENTS / width);
    across = (rows.cols + width - 1) / width, down = (rows.rows + height - 1) / height;
    partials = by_col ? down * rows.cols : rows.rows * across;
  }
  bool by_col;
  int64_t width, height, across, down, partials;
};

struct Grid {
  F scale, zero, inverse, whole, fraction;
};

LANE_FN Grid grid_of(F scale, F zero) {
  F inverse = where_between(scale, all(SCALE_MIN), all(SCALE_MAX), all(1.0f) / scale, all(NAN));
  inverse = where_between(zero, all(-ZERO_MAX), all(ZERO_MAX), inverse, all(NAN));
  const F whole = round(zero);
  return {scale, zero, inverse, whole, zero - whole};
}

// The level of v before it is limited.
LANE_FN F steps(F v, const Grid& grid) { return round(v * grid.inverse + grid.fraction) + grid.whole; }

// Calls op(where in x, where in results, how many, grid) for all elements of a tile, and done(where in partials, how many)
// behind those of one row, of which it is 1, or of up to 16 columns. GRID: whether there is one.
template <bool GRID = true, class Op, class Done>
LANE_FN void visit(const Pass& p, const Tiles& tiles, int64_t tile, const Op& op, const Done& done) {
  const Rows& rows = p.rows;
  const int64_t below = tile / tiles.across, beside = tile % tiles.across;
  const int64_t row = below * tiles.height, row_end = std::min(row + tiles.height, rows.rows);
  const int64_t col = beside * tiles.width, col_end = std::min(col + tiles.width, rows.cols);
  if (tiles.by_col) {
    for (int64_t c = col; c < col_end; c += LANES) {
      const int64_t n = std::min(LANES, col_end - c);
      Grid grid;
      if constexpr (GRID) grid = grid_of(load(p.scale + c, n), load(p.zero + c, n));
      if (n == LANES) {
        for (int64_t r = row; r < row_end; ++r) op(rows.start(r) + c, r * rows.cols + c, LANES, grid);
      } else {
        for (int64_t r = row; r < row_end; ++r) op(rows.start(r) + c, r * rows.cols + c, n, grid);
      }
      done(below * rows.cols + c, n);
    }
    return;
  }
  for (int64_t r = row; r < row_end; ++r) {
    const int64_t channel = rows.channel(r), from = rows.start(r), to = r * rows.cols;
    Grid grid;
    if constexpr (GRID) grid = grid_of(all(p.scale[channel]), all(p.zero[channel]));
    int64_t c = col;
    for (; c + LANES <= col_end; c += LANES) op(from + c, to + c, LANES, grid);
    if (c < col_end) op(from + c, to + c, col_end - c, grid);
    done(r * tiles.across + beside, 1);
  }
}

template <class Body>
void each_tile(const Pass& p, const Tiles& tiles, const Body& body) {
  parallel_for(p.threads, tiles.across * tiles.down, body);
}

// Calls add(i, channel) for all partials.
template <class Add>
void each_partial(const Pass& p, const Tiles& tiles, const Add& add) {
  const int64_t of_one = tiles.by_col ? 1 : tiles.across;  // channel, one after the other
  for (int64_t i = 0, channel = 0; i < tiles.partials; channel = channel + 1 == p.rows.channels ? 0 : channel + 1)
    for (int64_t k = 0; k < of_one; ++k) add(i++, channel);
}

void sum_partials(const Pass& p, const Tiles& tiles, const std::vector<float>& partials, float* sums) {
  std::vector<double> wide(p.rows.channels);
  each_partial(p, tiles, [&](int64_t i, int64_t channel) { wide[channel] += partials[i]; });
  for (int64_t c = 0; c < p.rows.channels; ++c) sums[c] = (float)wide[c];
}

void store_range(const Range& range, bool by_col, float* low, float* high, int64_t n) {
  if (by_col) {
    store(low, range.low(), n), store(high, range.high(), n);
  } else {
    *low = smallest(range.low()), *high = largest(range.high());
  }
}

void join_ranges(
    const Pass& p, const Tiles& tiles, const std::vector<float>& lows, const std::vector<float>& highs, float* low,
    float* high) {
  std::fill_n(low, p.rows.channels, INFINITY), std::fill_n(high, p.rows.channels, -INFINITY);
  each_partial(p, tiles, [&](int64_t i, int64_t c) {
    low[c] = smaller(lows[i], low[c]), high[c] = larger(highs[i], high[c]);
  });
}

}  // namespace

EXPORT const int64_t sizeof_Pass = sizeof(Pass);

// y: x on the grid and back; low and high `[channels]`: its range, unless they are null.
EXPORT void fake_quantize(const Pass* pass, const void* from, void* to, float* low, float* high) {
  const Pass& p = *pass;
  const Tiles tiles(p.rows);
  std::vector<float> lows(low ? tiles.partials : 0), highs(low ? tiles.partials : 0);
  of_kind(p.floats, [&](auto* kind) {
    const auto* x = typed(kind, from);
    auto* y = typed(kind, to);
    const F least = all(p.qmin), largest = all(p.qmax);
    each_tile(p, tiles, [&](int64_t tile) {
      if (!low) {
        return visit(p, tiles, tile, [&](int64_t in, int64_t out, int64_t n, const Grid& grid) INLINE {
          const F level = min(largest, max(least, steps(load_floats(x + in, n), grid)));  // NaN stays
          store_floats(y + out, (level - grid.zero) * grid.scale, n);
        }, [](int64_t, int64_t) {});
      }
      Range range;
      visit(p, tiles, tile, [&](int64_t in, int64_t out, int64_t n, const Grid& grid) INLINE {
        const F v = load_floats(x + in, n), level = min(largest, max(least, steps(v, grid)));
        store_floats(y + out, (level - grid.zero) * grid.scale, n);
        range.add(v, n);
      }, [&](int64_t at, int64_t n) INLINE {
        store_range(range, tiles.by_col, &lows[at], &highs[at], n), range = Range();
      });
    });
  });
  if (low) join_ranges(p, tiles, lows, highs, low, high);
}

// dx: dy inside the grid, else 0; dscale and dzero `[channels]`, unless null: sums of their gradients.
EXPORT void fake_quantize_backward(
    const Pass* pass, const void* gradient, const void* from, void* to, float* dscale, float* dzero) {
  const Pass& p = *pass;
  const Tiles tiles(p.rows);
  std::vector<float> of_scale(dscale ? tiles.partials : 0), of_zero(dzero ? tiles.partials : 0);
  of_kind(p.floats, [&](auto* kind) {
    const auto *dy = typed(kind, gradient), *x = typed(kind, from);
    auto* dx = typed(kind, to);
    const F least = all(p.qmin), largest = all(p.qmax);
    each_tile(p, tiles, [&](int64_t tile) {
      if (!dscale && !dzero) {
        return visit(p, tiles, tile, [&](int64_t in, int64_t out, int64_t n, const Grid& grid) INLINE {
          const F step = steps(load_floats(x + in, n), grid);
          store_floats(dx + out, where_between(step, least, largest, load_floats(dy + out, n), all(0.0f)), n);
        }, [](int64_t, int64_t) {});
      }
      F scale_sum = all(0.0f), zero_sum = all(0.0f);
      visit(p, tiles, tile, [&](int64_t in, int64_t out, int64_t n, const Grid& grid) INLINE {
        const F v = load_floats(x + in, n), g = load_floats(dy + out, n), step = steps(v, grid);
        store_floats(dx + out, where_between(step, least, largest, g, all(0.0f)), n);
        const F level = min(largest, max(least, step)) - grid.zero;
        scale_sum = scale_sum + g * where_between(step, least, largest, level - v * grid.inverse, level);
        zero_sum = zero_sum + g * where_between(step, least, largest, all(0.0f), all(0.0f) - grid.scale);
      }, [&](int64_t at, int64_t n) INLINE {
        if (dscale && tiles.by_col) store(&of_scale[at], scale_sum, n);
        if (dscale && !tiles.by_col) of_scale[at] = sum(scale_sum);
        if (dzero && tiles.by_col) store(&of_zero[at], zero_sum, n);
        if (dzero && !tiles.by_col) of_zero[at] = sum(zero_sum);
        scale_sum = zero_sum = all(0.0f);
      });
    });
  });
  if (dscale) sum_partials(p, tiles, of_scale, dscale);
  if (dzero) sum_partials(p, tiles, of_zero, dzero);
}

// codes int8 or uint8 of x; the least of NaN.
EXPORT void quantize_floats(const Pass* pass, const void* from, uint8_t* codes) {
  const Pass& p = *pass;
  const Tiles tiles(p.rows);
  of_kind(p.floats, [&](auto* kind) {
    const auto* x = typed(kind, from);
    const F least = all(p.qmin), largest = all(p.qmax);
    each_tile(p, tiles, [&](int64_t tile) {
      visit(p, tiles, tile, [&](int64_t in, int64_t out, int64_t n, const Grid& grid) INLINE {
        const I level = whole(min(max(steps(load_floats(x + in, n), grid), least), largest));
        if (p.is_signed) {
          store((int8_t*)codes + out, level, n);
        } else {
          store(codes + out, level, n);
        }
      }, [](int64_t, int64_t) {});
    });
  });
}

// y: what codes int8 or uint8 stand for; levels: of each code, unless it is null, where codes are uint8.
EXPORT void dequantize_codes(const Pass* pass, const uint8_t* codes, const float* levels, void* to) {
  const Pass& p = *pass;
  const Tiles tiles(p.rows);
  of_kind(p.floats, [&](auto* kind) {
    auto* y = typed(kind, to);
    each_tile(p, tiles, [&](int64_t tile) {
      visit(p, tiles, tile, [&](int64_t in, int64_t out, int64_t n, const Grid& grid) INLINE {
        F level;
        if (levels) {
          float near[LANES] = {};
          for (int64_t i = 0; i < n; ++i) near[i] = levels[codes[in + i]];
          level = load(near);
        } else {
          level = in_fp32(p.is_signed ? load((const int8_t*)codes + in, n) : load(codes + in, n));
        }
        store_floats(y + out, (level - grid.zero) * grid.scale, n);
      }, [](int64_t, int64_t) {});
    });
  });
}

// low and high `[channels]` of x.
EXPORT void find_ranges(const Pass* pass, const void* from, float* low, float* high) {
  const Pass& p = *pass;
  const Tiles tiles(p.rows);
  std::vector<float> lows(tiles.partials), highs(tiles.partials);
  of_kind(p.floats, [&](auto* kind) {
    const auto* x = typed(kind, from);
    each_tile(p, tiles, [&](int64_t tile) {
      Range range;
      visit<false>(p, tiles, tile, [&](int64_t in, int64_t, int64_t n, const Grid&) INLINE {
        range.add(load_floats(x + in, n), n);
      }, [&](int64_t at, int64_t n) INLINE {
        store_range(range, tiles.by_col, &lows[at], &highs[at], n), range = Range();
      });
    });
  });
  join_ranges(p, tiles, lows, highs, low, high);
}
