// Convolutions of 8-bit images on a CPU, channels last: the passes from floats to codes, from codes to whole numbers in
// fp32, from sums to codes or fp32, and depthwise convolutions, which are one pass from codes to codes. Sums are int32, or
// whole numbers in fp32, exact; what follows has the order of int8_epilogue (ref.py), and is not contracted.
#include <vector>

#include "parallel.h"
#include "simd.h"

using namespace lanes;

namespace {

struct Image {
  int64_t batch, h, w, c, p, q, r, s, stride_h, stride_w, top, left, dilation_h, dilation_w;
};

struct Epilogue {
  const float *scale, *bias;  // [C]; bias may be null
  const int32_t* of_zero;     // [C]: the sum of all weights times the zero point of x, negative
  float x_scale, inverse, fraction, whole;
  int32_t shift, twice, activation, codes;  // activation: 0 none, 1 relu, 2 relu6; codes: whether y is int8
};


// Of sums times `twice`, for the first n of 16 channels; the rest: what a residual adds.
LANE_FN F apply(F sums, const Epilogue& after, int64_t channel, int64_t n, F rest) {
  F v = sums * all(0.5f) * load(after.scale + channel, n) * all(after.x_scale);
  if (after.bias) v = v + load(after.bias + channel, n);
  v = v + rest;
  if (after.activation) v = max(all(0.0f), v);  // of NaN the second: it stays
  if (after.activation == 2) v = min(all(6.0f), v);
  return v;
}

LANE_FN I in_codes(F v, const Epilogue& after) {
  return codes_of(v, all(after.inverse), all(after.fraction), all(after.whole), all(-128.0f), all(127.0f));
}

LANE_FN void put(F v, const Epilogue& after, void* y, int64_t at, int64_t n) {
  if (after.codes) {
    store(static_cast<int8_t*>(y) + at, in_codes(v, after), n);
  } else {
    store(static_cast<float*>(y) + at, v, n);
  }
}

struct Taps {
  int64_t r_from, r_to, s_from, s_to;  // those that lie in the image
};

// VECTORS times 16 neighbours in a row of y, of one pixel after the other, from the one numbered `first`. All see the
// same taps, and if ALL, all of them: what the zero point takes off their sums is known. x: the image; y: the row.
template <int VECTORS, bool ALL>
LANE_FN void neighbours(
    const int8_t* x, const int32_t* weight, void* y, const Image& im, const Epilogue& after, int64_t p, int64_t first, Taps taps) {
  const int64_t units = im.c / LANES, down = im.dilation_h * im.w * im.c, right_step = im.dilation_w * im.c;
  const I shift = all(after.shift);
  const int8_t* from[VECTORS];
  int64_t channel[VECTORS];
  I sums[VECTORS];
  for (int v = 0; v < VECTORS; ++v) {
    const int64_t q = (first + v) / units;
    channel[v] = (first + v) % units * LANES;
    from[v] = x + ((p * im.stride_h - im.top) * im.w + q * im.stride_w - im.left) * im.c + channel[v];
    sums[v] = ALL ? load(after.of_zero + channel[v]) : all(0);
  }
  for (int64_t r = taps.r_from; r < taps.r_to; ++r) {
    for (int64_t s = taps.s_from; s < taps.s_to; ++s) {
      const int64_t at = r * down + s * right_step;
      const int32_t* by = weight + (r * im.s + s) * im.c;
      for (int v = 0; v < VECTORS; ++v) {
        const I codes = load(from[v] + at);
        // both fit 16 bits, and the upper half of the weight counts for nothing
        sums[v] = sums[v] + pairs(ALL ? codes : codes - shift, load(by + channel[v]) & all(0xffff));
      }
    }
  }
  for (int v = 0; v < VECTORS; ++v) {
    const F values = apply(in_fp32(sums[v] * all(after.twice)), after, channel[v], LANES, all(0.0f));
    put(values, after, y, (first + v) * LANES, LANES);
  }
}

// The taps, of `count` that are `dilation` apart and the first at `start`, which lie in 0..size.
inline void inside(int64_t start, int64_t dilation, int64_t count, int64_t size, int64_t& from, int64_t& to) {
  for (from = 0; from < count && start + from * dilation < 0;) ++from;
  for (to = count; to > from && start + (to - 1) * dilation >= size;) --to;
}

// Pixels first..last of a row, 16 channels each, which all see the same taps.
template <bool ALL>
LANE_FN void run(
    const int8_t* x, const int32_t* weight, void* y, const Image& im, const Epilogue& after, int64_t p, int64_t first,
    int64_t last, Taps taps) {
  constexpr int MANY = WIDE;
  for (; first + MANY <= last; first += MANY) neighbours<MANY, ALL>(x, weight, y, im, after, p, first, taps);
  for (; first < last; ++first) neighbours<1, ALL>(x, weight, y, im, after, p, first, taps);
}

void one_row(const int8_t* x, const int32_t* weight, void* y, const Image& im, const Epilogue& after, int64_t p) {
  const int64_t units = im.c / LANES;
  Taps taps;
  inside(p * im.stride_h - im.top, im.dilation_h, im.r, im.h, taps.r_from, taps.r_to);
  for (int64_t q = 0; q < im.q;) {
    inside(q * im.stride_w - im.left, im.dilation_w, im.s, im.w, taps.s_from, taps.s_to);
    int64_t end = q + 1;  // pixels that see as many taps follow each other
    for (Taps next = taps; end < im.q; ++end) {
      inside(end * im.stride_w - im.left, im.dilation_w, im.s, im.w, next.s_from, next.s_to);
      if (next.s_from != taps.s_from || next.s_to != taps.s_to) break;
    }
    const bool all = taps.r_to - taps.r_from == im.r && taps.s_to - taps.s_from == im.s;
    if (all) {
      run<true>(x, weight, y, im, after, p, q * units, end * units, taps);
    } else {
      run<false>(x, weight, y, im, after, p, q * units, end * units, taps);
    }
    q = end;
  }
}

struct Sums {
  const void* data;  // [rows, channels]
  int64_t rows, channels, are_whole;  // int32, without what the zero point of x takes off them; else fp32, with that
};

struct Residual {
  const void* data;  // [rows, channels], or null
  int64_t is_codes;  // int8, and `(code - zero) * scale` is meant; else fp32
  float scale, zero;
};

LANE_FN F added(const Residual& residual, int64_t at, int64_t n) {
  if (!residual.data) return all(0.0f);
  if (!residual.is_codes) return load(static_cast<const float*>(residual.data) + at, n);
  const F codes = in_fp32(load(static_cast<const int8_t*>(residual.data) + at, n));
  return (codes - all(residual.zero)) * all(residual.scale);
}

void epilogue_row(const Sums& sums, const Residual& residual, void* y, const Epilogue& after, int64_t row) {
  for (int64_t channel = 0; channel < sums.channels; channel += LANES) {
    const int64_t n = sums.channels - channel, at = row * sums.channels + channel;
    F v;
    if (sums.are_whole) {
      const I whole = load(static_cast<const int32_t*>(sums.data) + at, n) + load(after.of_zero + channel, n);
      v = in_fp32(whole * all(after.twice));
    } else {
      v = load(static_cast<const float*>(sums.data) + at, n) * all((float)after.twice);
    }
    put(apply(v, after, channel, n, added(residual, at, n)), after, y, at, n);
  }
}

// The inputs of all pixels of y: its codes less their zero point in 16 bits, two channels side by side, and zeros
// around it.
struct Frame {
  int64_t h, w, pairs;
  std::vector<int32_t> data;  // [h, w, pairs]

  explicit Frame(const Image& im)
      : h((im.p - 1) * im.stride_h + im.dilation_h * (im.r - 1) + 1),
        w((im.q - 1) * im.stride_w + im.dilation_w * (im.s - 1) + 1),
        pairs((im.c + 1) / 2),
        data(h * w * pairs) {}

  void fill(const int8_t* x, const Image& im, int32_t shift) {
    const int64_t left = im.left < w ? im.left : w, end = im.left + im.w < w ? im.left + im.w : w;
    for (int64_t i = im.top; i < h && i < im.top + im.h; ++i) {
      const int8_t* from = x + (i - im.top) * im.w * im.c;
      int16_t* to = reinterpret_cast<int16_t*>(data.data() + (i * w + left) * pairs);
      if (im.c % 2 == 0) {
        for (int64_t k = 0; k < (end - left) * im.c; ++k) to[k] = from[k] - shift;
      } else {
        for (int64_t j = 0; j < end - left; ++j) {
          for (int64_t c = 0; c < im.c; ++c) to[j * 2 * pairs + c] = from[j * im.c + c] - shift;
        }
      }
    }
  }
};

// PIXELS neighbours in row p of y from the one numbered q, of 16 channels from `channel` on; weight: theirs.
template <int PIXELS>
LANE_FN void dense(
    const Frame& frame, const int32_t* weight, void* y, const Image& im, const Residual& residual, const Epilogue& after,
    int64_t row, int64_t p, int64_t q, int64_t channel, int64_t channels) {
  const int64_t step = im.stride_w * frame.pairs, joined = im.dilation_w == 1 ? im.s : 1;  // taps side by side
  I sums[PIXELS];
  for (int v = 0; v < PIXELS; ++v) sums[v] = all(0);
  for (int64_t r = 0; r < im.r; ++r) {
    for (int64_t s = 0; s < im.s; s += joined) {
      const int64_t at = (p * im.stride_h + r * im.dilation_h) * frame.w + q * im.stride_w + s * im.dilation_w;
      const int32_t* from = frame.data.data() + at * frame.pairs;
      for (int64_t k = 0; k < joined * frame.pairs; ++k, weight += LANES) {
        const I by = load(weight);
        for (int v = 0; v < PIXELS; ++v) sums[v] = sums[v] + pairs(all(from[v * step + k]), by);
      }
    }
  }
  for (int v = 0; v < PIXELS; ++v) {
    const int64_t at = (row * im.q + q + v) * channels + channel, n = channels - channel;
    const F values = in_fp32(sums[v] * all(after.twice));
    put(apply(values, after, channel, n, added(residual, at, n)), after, y, at, n);
  }
}

void dense_image(
    Frame& frame, const int8_t* x, const int32_t* weight, void* y, const Image& im, int64_t channels,
    const Residual& residual, const Epilogue& after, int64_t b, int threads) {
  frame.fill(x + b * im.h * im.w * im.c, im, after.shift);
  const int64_t size = im.r * im.s * frame.pairs;
  parallel_for(threads, (channels + LANES - 1) / LANES * im.p, [&](int64_t i) {
      const int64_t channel = i / im.p * LANES, p = i % im.p;
      const int32_t* by = weight + channel * size;
      const int64_t row = b * im.p + p;
      int64_t q = 0;
      for (; q + WIDE <= im.q; q += WIDE) {
        dense<WIDE>(frame, by, y, im, residual, after, row, p, q, channel, channels);
      }
      for (; q < im.q; ++q) dense<1>(frame, by, y, im, residual, after, row, p, q, channel, channels);
  });
}

constexpr int64_t PIECE = 1 << 12;  // elements that a thread takes at once

}  // namespace

// y: codes less a number, in fp32.
EXPORT void center_codes(const int8_t* x, float* y, int64_t count, float shift, int threads) {
  parallel_for(threads, (count + PIECE - 1) / PIECE, [&](int64_t piece) {
    const int64_t start = piece * PIECE, end = start + PIECE < count ? start + PIECE : count;
    for (int64_t i = start; i < end; i += LANES) {
      const int64_t n = end - i;
      store(y + i, in_fp32(load(x + i, n)) - all(shift), n);
    }
  });
}

// y: codes of x on a grid, from `least` to `largest`; `moved`: what is added to them to fit int8.
EXPORT void to_codes(
    const float* x, int8_t* y, int64_t count, float inverse, float fraction, float whole, float least, float largest,
    int moved, int threads) {
  parallel_for(threads, (count + PIECE - 1) / PIECE, [&](int64_t piece) {
    const int64_t start = piece * PIECE, end = start + PIECE < count ? start + PIECE : count;
    for (int64_t i = start; i < end; i += LANES) {
      const int64_t n = end - i;
      const I codes = codes_of(load(x + i, n), all(inverse), all(fraction), all(whole), all(least), all(largest));
      store(y + i, codes + all(moved), n);
    }
  });
}

struct Sum {
  const int8_t *a, *b;  // b may be null
  float a_scale, a_zero, b_scale, b_zero, inverse, fraction, whole, least, largest;
  int32_t activation, codes;
};

// y: the real values of codes, added, activated, and in fp32 or as codes on a grid.
EXPORT void sum_codes(const Sum* sum, void* y, int64_t count, int threads) {
  parallel_for(threads, (count + PIECE - 1) / PIECE, [&](int64_t piece) {
    const int64_t start = piece * PIECE, end = start + PIECE < count ? start + PIECE : count;
    for (int64_t i = start; i < end; i += LANES) {
      const int64_t n = end - i;
      F v = (in_fp32(load(sum->a + i, n)) - all(sum->a_zero)) * all(sum->a_scale);
      if (sum->b) v = v + (in_fp32(load(sum->b + i, n)) - all(sum->b_zero)) * all(sum->b_scale);
      if (sum->activation) v = max(all(0.0f), v);
      if (sum->activation == 2) v = min(all(6.0f), v);
      if (sum->codes) {
        const I codes =
            codes_of(v, all(sum->inverse), all(sum->fraction), all(sum->whole), all(sum->least), all(sum->largest));
        store(static_cast<int8_t*>(y) + i, codes, n);
      } else {
        store(static_cast<float*>(y) + i, v, n);
      }
    }
  });
}

EXPORT void int8_epilogue(const Sums* sums, const Residual* residual, void* y, const Epilogue* after, int threads) {
  parallel_for(threads, sums->rows, [&](int64_t row) { epilogue_row(*sums, *residual, y, *after, row); });
}

// The number of channels is a multiple of 16.
EXPORT void depthwise_int8(
    const int8_t* x, const int32_t* weight, void* y, const Image* image, const Epilogue* after, int threads) {
  const Image& im = *image;
  const int64_t rows = im.batch * im.p, row_bytes = im.q * im.c * (after->codes ? 1 : sizeof(float));
  parallel_for(threads, rows, [&](int64_t row) {
    const int8_t* from = x + row / im.p * im.h * im.w * im.c;
    one_row(from, weight, static_cast<char*>(y) + row * row_bytes, im, *after, row % im.p);
  });
}

// Any numbers of channels. weight: [channels / 16, taps, pairs of channels of x, 16], two of 16 bits each, then zeros.
EXPORT void dense_int8(
    const int8_t* x, const int32_t* weight, void* y, const Image* image, int64_t channels, const Residual* residual,
    const Epilogue* after, int threads) {
  const Image& im = *image;
  if (threads > 1 && im.batch >= threads) {  // an image a thread
    parallel_for(threads, im.batch, [&](int64_t b) {
      Frame frame(im);
      dense_image(frame, x, weight, y, im, channels, *residual, *after, b, 1);
    });
  } else {
    Frame frame(im);
    for (int64_t b = 0; b < im.batch; ++b) {
      dense_image(frame, x, weight, y, im, channels, *residual, *after, b, threads);
    }
  }
}

// Compared with the structs of Python by `load_functions`.
EXPORT const int64_t sizeof_Image = sizeof(Image);
EXPORT const int64_t sizeof_Epilogue = sizeof(Epilogue);
EXPORT const int64_t sizeof_Sums = sizeof(Sums);
EXPORT const int64_t sizeof_Residual = sizeof(Residual);
EXPORT const int64_t sizeof_Sum = sizeof(Sum);
