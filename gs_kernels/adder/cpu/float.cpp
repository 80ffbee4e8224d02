// L1 products of fp32 images and their gradient. Images are laid out so that what a tap of the filter meets, pixel after
// pixel, lies side by side: padded, and split into the planes of pixels that a stride meets together. A unit of work is
// some vectors of pixels times some channels, whose sums are registers; each sum has its order whatever the threads.
#include <algorithm>

#include "parallel.h"
#include "simd.h"

namespace {
using namespace lanes;

#ifdef __AVX512F__
constexpr int VECTORS = 3, OUTPUTS = 8, INPUTS = 4;  // of a unit: channels of y, and of x in the gradient
#else
constexpr int VECTORS = 1, OUTPUTS = 4, INPUTS = 2;
#endif
constexpr int64_t TILE = VECTORS * LANES, CHUNK = 256;  // differences that are added before their sum is added to others

// planes: [batch, channels, count, rows, columns]. Plane i has pixel (h * stride_h + phases[2 * i] - top, ...) at h, w;
// zeros beside the image.
struct AdderLayout {
  const float* x;
  int64_t stride_xb, stride_xc, stride_xh, stride_xw;
  float* planes;
  const int64_t* phases;
  int64_t batch, channels, h, w, count, rows, columns, stride_h, stride_w, top, left;
};

void lay_row(const AdderLayout& of, const float* from, int64_t phase, float* to) {
  const int64_t first = phase - of.left;  // column of x at 0
  const int64_t low = std::min(std::max<int64_t>(first < 0 ? (of.stride_w - 1 - first) / of.stride_w : 0, 0), of.columns);
  const int64_t high = std::min(std::max((of.w - first + of.stride_w - 1) / of.stride_w, low), of.columns);
  std::fill(to, to + low, 0.0f), std::fill(to + high, to + of.columns, 0.0f);
  const int64_t step = of.stride_w * of.stride_xw;
  const float* p = from + first * of.stride_xw;
  if (step == 1) {
    std::copy(p + low, p + high, to + low);
  } else {
    for (int64_t i = low; i < high; ++i) to[i] = p[i * step];
  }
}

// y, at (row, column) of pixels of a plane: pixel `row * pitch + column` of those that are side by side in a layout.
struct Place {
  float* y;
  int64_t stride_b, stride_c, stride_h, stride_w;
  int64_t pitch, rows, columns;
};

// Writes `n` sums of neighbours, the first being pixel `first`.
void store_pixels(const Place& to, float* y, const float* sums, int64_t first, int64_t n) {
  for (int64_t i = 0; i < n;) {
    const int64_t row = (first + i) / to.pitch, column = (first + i) % to.pitch;
    const int64_t run = std::min(to.pitch - column, n - i), inside = std::min(run, to.columns - column);
    float* at = y + row * to.stride_h + column * to.stride_w;
    if (to.stride_w == 1) {
      for (int64_t j = 0; j < inside; j += LANES) store(at + j, load(sums + i + j), inside - j);
    } else {
      for (int64_t j = 0; j < inside; ++j) at[j * to.stride_w] = sums[i + j];
    }
    i += run;
  }
}

// `planes + offsets[k]` is what term k of a sum meets at pixel 0; weight: [blocks, k, channels of a unit].
struct AdderProduct {
  const float *planes, *weight;
  const int64_t* offsets;
  int64_t batch, stride_planes, k, channels;
  int64_t ends;  // whether nothing may be read behind the pixels, which are a tile at least
  Place y;
  const float* x;  // of the gradient: the pixels themselves, as planes
  int64_t stride_xb, stride_xc;
};

// Sums `-|x - w|` over CHUNK terms or fewer.
template <int V>
struct Forward {
  static constexpr int CHANNELS = OUTPUTS;
  const F minus_one = all(-1.0f);

  LANE_FN_OF Forward(const AdderProduct&, const float*, int64_t) {}
  LANE_FN_OF void add(F (&sums)[CHANNELS][V], const float* p, const float* w) const {
    F x[V];
    each<V>([&](auto v) INLINE { x[v] = load(p + v * LANES); });
    each<CHANNELS>([&](auto c) INLINE {
      const F by = all(w[c]);
      // where there are units for products beside those for sums, each does half
      each<V>([&](auto v) INLINE { sums[c][v] = fma(absolute(x[v] - by), minus_one, sums[c][v]); });
    });
  }
  LANE_FN_OF F final(int, int, F sum) const { return sum; }
};

// Sums `clamp(w - x, -1, 1) * dy`.
template <int V>
struct Gradient {
  static constexpr int CHANNELS = INPUTS;
  const F one = all(1.0f);
  F x[CHANNELS][V];

  LANE_FN_OF Gradient(const AdderProduct& of, const float* from, int64_t channel) {
    for (int c = 0; c < CHANNELS; ++c) {
      const float* p = from + std::min(channel + c, of.channels - 1) * of.stride_xc;
      for (int v = 0; v < V; ++v) x[c][v] = load(p + v * LANES);
    }
  }
  LANE_FN_OF void add(F (&sums)[CHANNELS][V], const float* p, const float* w) const {
    F dy[V];
    each<V>([&](auto v) INLINE { dy[v] = load(p + v * LANES); });
    each<CHANNELS>([&](auto c) INLINE {
      const F by = all(w[c]);
      each<V>([&](auto v) INLINE { sums[c][v] = fma(limited(by - x[c][v], one), dy[v], sums[c][v]); });
    });
  }
  // `limited` may lose NaN
  LANE_FN_OF F final(int c, int v, F sum) const { return where_between(x[c][v], all(-INFINITY), all(INFINITY), sum, x[c][v]); }
};

template <template <int> class Term, int V>
void unit(const AdderProduct& of, int64_t b, int64_t block, int64_t first, int64_t n) {
  using Terms = Term<V>;
  constexpr int CHANNELS = Terms::CHANNELS;
  const int64_t start = of.ends ? std::min(first, first + n - V * LANES) : first;
  const int64_t channel = block * CHANNELS;
  const Terms terms(of, of.x + b * of.stride_xb + start, channel);
  const float* planes = of.planes + b * of.stride_planes + start;
  const float* w = of.weight + block * of.k * CHANNELS;
  F total[CHANNELS][V];
  int64_t k = 0;
  do {
    const bool is_first = k == 0;
    F sums[CHANNELS][V];
    each<CHANNELS>([&](auto c) INLINE { each<V>([&](auto v) INLINE { sums[c][v] = all(0.0f); }); });
    for (const int64_t end = std::min(k + CHUNK, of.k); k < end; ++k, w += CHANNELS) {
      terms.add(sums, planes + of.offsets[k], w);
    }
    each<CHANNELS>([&](auto c) INLINE {
      each<V>([&](auto v) INLINE { total[c][v] = is_first ? sums[c][v] : total[c][v] + sums[c][v]; });
    });
  } while (k < of.k);
  for (int64_t c = 0; c < std::min<int64_t>(CHANNELS, of.channels - channel); ++c) {
    float near[(V + 1) * LANES];  // whole vectors are read from the first pixel on
    for (int v = 0; v < V; ++v) store(near + v * LANES, terms.final(c, v, total[c][v]));
    store_pixels(of.y, of.y.y + b * of.y.stride_b + (channel + c) * of.y.stride_c, near + (first - start), first, n);
  }
}

template <template <int> class Term>
void units(const AdderProduct& of, int threads) {
  const int64_t length = (of.y.rows - 1) * of.y.pitch + of.y.columns, tiles = (length + TILE - 1) / TILE;
  const int64_t blocks = (of.channels + Term<1>::CHANNELS - 1) / Term<1>::CHANNELS;
  parallel_for(threads, of.batch * tiles * blocks, [&](int64_t i) {
    const int64_t block = i % blocks, first = i / blocks % tiles * TILE, b = i / blocks / tiles;
    const int64_t n = std::min(TILE, length - first);
    const int64_t vectors = (n + LANES - 1) / LANES;
    if (vectors == VECTORS) return unit<Term, VECTORS>(of, b, block, first, n);
#ifdef __AVX512F__
    if (vectors == 2) return unit<Term, 2>(of, b, block, first, n);
    unit<Term, 1>(of, b, block, first, n);
#endif
  });
}

}  // namespace

EXPORT const int64_t adder_outputs = OUTPUTS, adder_inputs = INPUTS, adder_tile = TILE;

EXPORT void adder_layout(const AdderLayout* of, int threads) {
  const AdderLayout& l = *of;
  parallel_for(threads, l.batch * l.channels, [&](int64_t image) {
    const float* x = l.x + image / l.channels * l.stride_xb + image % l.channels * l.stride_xc;
    float* to = l.planes + image * l.count * l.rows * l.columns;
    for (int64_t i = 0; i < l.count; ++i) {
      for (int64_t row = 0; row < l.rows; ++row, to += l.columns) {
        const int64_t h = row * l.stride_h + l.phases[2 * i] - l.top;
        if (h < 0 || h >= l.h) {
          std::fill(to, to + l.columns, 0.0f);
        } else {
          lay_row(l, x + h * l.stride_xh, l.phases[2 * i + 1], to);
        }
      }
    }
  });
}

// to: [ceil(n / width), k, width], of w at i * stride_wn + offsets[k], zeros for i from n on.
EXPORT void adder_blocks(
    const float* w, const int64_t* offsets, float* to, int64_t n, int64_t stride_wn, int64_t k, int64_t width, int threads) {
  parallel_for(threads, (n + width - 1) / width, [&](int64_t block) {
    float* at = to + block * k * width;
    const float* from = w + block * width * stride_wn;
    const int64_t exist = std::min(width, n - block * width);
    for (int64_t j = 0; j < k; ++j, at += width) {
      for (int64_t i = 0; i < width; ++i) at[i] = i < exist ? from[i * stride_wn + offsets[j]] : 0.0f;
    }
  });
}

EXPORT void adder_product(const AdderProduct* of, int threads) { units<Forward>(*of, threads); }

EXPORT void adder_gradient(const AdderProduct* of, int threads) { units<Gradient>(*of, threads); }

// Compared with the structs of Python by `load_functions`.
EXPORT const int64_t sizeof_AdderLayout = sizeof(AdderLayout);
EXPORT const int64_t sizeof_AdderProduct = sizeof(AdderProduct);
