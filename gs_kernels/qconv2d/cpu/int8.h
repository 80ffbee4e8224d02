// What 8-bit convolutions on a CPU share: how codes are multiplied, the arguments, and what follows the sums. That has the
// order of int8_epilogue (ref.py), not contracted.
#pragma once
#include <algorithm>

#include "parallel.h"
#include "simd.h"

namespace {

using namespace lanes;

// How codes are multiplied. PAIRS: x less its zero point and the weight in 16 bits. SHORTS: x unsigned and the weight in
// bytes, `joined` products of pairs being added in 16 bits, where they fit. QUADS: the same, by instructions that add 4.
enum Form { PAIRS, SHORTS, QUADS };

// The forms that this library has, as bits: QUADS and PAIRS serve every weight.
#ifdef LANES_HAVE_QUADS
constexpr int64_t FORMS = 1 << QUADS;
#elif defined(LANES_HAVE_SHORTS)
constexpr int64_t FORMS = 1 << PAIRS | 1 << SHORTS;
#else
constexpr int64_t FORMS = 1 << PAIRS;
#endif

// Neighbours in the frame, of one tap or a row of them: `length` codes from channel `c` of tap (r, s) on.
struct Run {
  int64_t r, s, c, length, words, ends;  // words: 32-bit words of the weight; ends: whether a group of the weight ends
};

struct Convolution {
  int64_t batch, h, w, channels, p, q, outputs, groups;  // channels of x and y, of all groups
  int64_t r, s, stride_h, stride_w, top, left, dilation_h, dilation_w;
  const int32_t* weight;  // [groups, panels, words, 16]; depthwise: see there
  const Run* runs;
  int64_t run_count, words, form, joined, shift, parts;  // words: of all runs; shift: the zero point of x
  const float *scale, *bias;  // [parts, outputs], parts being the groups of the weight; [outputs], or null
  const int32_t* code_sums;   // [parts, outputs]
  const int32_t* zero2;       // [parts, outputs], or null; see Int8Weight
  const float* fraction;      // [parts, outputs], or null
  float inverse, out_fraction, whole, least, largest;
  int32_t twice, activation, codes;  // activation: 0 none, 1 relu, 2 relu6, 3 hardswish; codes: whether y is int8
  int32_t finite;                    // whether scale and bias are
};

// What is not the same in all calls for images of one shape.
struct Operands {
  const int8_t* x;
  const float* x_scale;        // one if step is 0, or one for each pixel of y if it is 1
  int64_t step;
  void* y;
  const void* residual;        // the shape of y, or null
  const float *scale, *zero;   // of a residual of int8 codes; of floats null
  // Whether the limits of activation and codes are one, `floor` and `ceiling`: of codes before they are rounded, less the
  // whole part of their zero point. Rounding keeps the order of values and whole limits, and fp32 holds such codes. NaN,
  // of which the result is the least code, must not come up.
  bool joined;
  float floor, ceiling;

  Operands(
      const Convolution& im, const int8_t* x, const float* x_scale, int64_t step, void* y, const void* residual,
      const float* scale, const float* zero)
      : x(x), x_scale(x_scale), step(step), y(y), residual(residual), scale(scale), zero(zero) {
    const float least = im.least - im.whole, largest = im.largest - im.whole;
    const float six = im.activation == 2 ? 6.0f * im.inverse + im.out_fraction : INFINITY;
    joined = im.codes && im.activation != 3 && im.finite && !residual && !step && *x_scale < INFINITY && im.inverse > 0.0f &&
             im.inverse < INFINITY && std::fabs(im.whole) < float(1 << 22);
    floor = std::max(im.activation ? im.out_fraction : -INFINITY, least);
    ceiling = std::min(std::max(six, least), largest);
  }
};

// What a group of the weight makes of sums, for n of 16 channels: its share of y, without the scale of x.
struct Part {
  F scale, fraction;
  I less, zero2, twice;
  bool is_whole, has_zero2, has_fraction;  // is_whole: sums are real as they are

  // at: of the first channel in [parts, outputs]; x_less: what codes of x are too large by, in sums.
  LANE_FN_OF Part(const Convolution& im, int64_t at, int64_t n, int64_t x_less)
      : scale(load(im.scale + at, n)),
        fraction(im.fraction ? load(im.fraction + at, n) : all(0.0f)),
        less(x_less ? load(im.code_sums + at, n) * all(int32_t(x_less)) : all(0)),
        zero2(im.zero2 ? load(im.zero2 + at, n) : all(0)),
        twice(all(im.twice)),
        is_whole(im.twice == 2 && !im.zero2 && !im.fraction),
        has_zero2(im.zero2),
        has_fraction(im.fraction) {}

  LANE_FN_OF F operator()(I sums, I x_sum) const {
    sums = sums - less;
    if (is_whole) return in_fp32(sums) * scale;
    sums = sums * twice;
    if (has_zero2) sums = sums + zero2 * x_sum;
    F v = in_fp32(sums) * all(0.5f);
    if (has_fraction) v = v - fraction * in_fp32(x_sum);
    return v * scale;
  }
};

// What follows, for n of 16 channels from `channel` on. Holds all that it needs: stores of y might change what a pointer
// leads to, for all that a compiler knows.
struct Finish {
  const int64_t outputs, channel, n, step;
  const float* x_scale;
  void* y;
  const void* residual;
  const bool has_bias, of_codes, codes, is_hardswish;
  const F bias, scale, zero, low, high, inverse, fraction, whole, least, largest;
  const bool joined;
  const F floor, ceiling;

  LANE_FN_OF Finish(const Convolution& im, const Operands& of, int64_t channel, int64_t n)
      : outputs(im.outputs), channel(channel), n(n), step(of.step), x_scale(of.x_scale), y(of.y), residual(of.residual),
        has_bias(im.bias), of_codes(of.scale), codes(im.codes), is_hardswish(im.activation == 3),
        bias(im.bias ? load(im.bias + channel, n) : all(0.0f)), scale(all(of.scale ? *of.scale : 1.0f)),
        zero(all(of.zero ? *of.zero : 0.0f)), low(all(im.activation == 1 || im.activation == 2 ? 0.0f : -INFINITY)),
        high(all(im.activation == 2 ? 6.0f : INFINITY)), inverse(all(im.inverse)), fraction(all(im.out_fraction)),
        whole(all(im.whole)), least(all(im.least)), largest(all(im.largest)), joined(of.joined && n >= LANES),
        floor(all(of.floor)), ceiling(all(of.ceiling)) {}

  // One pixel of y, if `joined`.
  LANE_FN_OF void put(int64_t row, F real, F by) const {
    const F v = (real * by + bias) * inverse + fraction;
    store(static_cast<int8_t*>(y) + row * outputs + channel, nearest(min(max(v, floor), ceiling)) + nearest(whole));
  }

  // Of `count` pixels of y, the first numbered `row`. real(i): what their sums are worth, without the scale of x.
  template <class Real>
  LANE_FN_OF void operator()(int64_t count, int64_t row, const Real& real) const {
    if (joined) {  // the most usual one, without branches
      const F by = all(*x_scale);
      for (int64_t i = 0; i < count; ++i) put(row + i, real(i), by);
      return;
    }
    for (int64_t i = 0; i < count; ++i, ++row) {
      const int64_t at = row * outputs + channel;
      F v = real(i) * all(x_scale[row * step]);
      if (has_bias) v = v + bias;
      if (residual) v = v + added(at);
      v = min(high, max(low, v));  // of NaN the second: it stays
      if (is_hardswish) v = hardswish(v);
      if (codes) {
        store(static_cast<int8_t*>(y) + at, in_codes(v), n);
      } else {
        store(static_cast<float*>(y) + at, v, n);
      }
    }
  }

  LANE_FN_OF I in_codes(F v) const { return codes_of(v, inverse, fraction, whole, least, largest); }

  LANE_FN_OF F added(int64_t at) const {
    if (!of_codes) return load(static_cast<const float*>(residual) + at, n);
    return (in_fp32(load(static_cast<const int8_t*>(residual) + at, n)) - zero) * scale;
  }
};

#if defined(__ARM_FEATURE_DOTPROD)
constexpr int64_t UNSIGNED = 0;
#else
constexpr int64_t UNSIGNED = 128;  // added to codes of x so that they are unsigned
#endif

}  // namespace
