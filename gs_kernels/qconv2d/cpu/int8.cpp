// Convolutions of 8-bit images on a CPU, channels last, from codes to codes or fp32 in one pass; rows of a matrix are
// images of one pixel. Sums are int32, exact. What follows has the order of int8_epilogue (ref.py), not contracted.
//
// A thread copies what some rows of y see into a frame: codes in the form that products take, padded. It then goes over
// the weight, a panel of 16 or more channels at a time, and over the frame, some pixels at a time, whose sums stay in
// registers: nothing is copied once per tap. Filters are runs of neighbours in the frame: a row of taps and their
// channels, cut where groups of the weight end.
#include <algorithm>
#include <numeric>
#include <vector>

#include "parallel.h"
#include "simd.h"

using namespace lanes;

namespace {

// How codes are multiplied. PAIRS: x less its zero point and the weight in 16 bits. SHORTS: x unsigned and the weight in
// bytes, `joined` products of pairs being added in 16 bits, where they fit. QUADS: the same, by instructions that add 4.
enum Form { PAIRS, SHORTS, QUADS };

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
  int32_t twice, activation, codes;  // activation: 0 none, 1 relu, 2 relu6; codes: whether y is int8
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
    joined = im.codes && im.finite && !residual && !step && *x_scale < INFINITY && im.inverse > 0.0f &&
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
  const bool has_bias, of_codes, codes;
  const F bias, scale, zero, low, high, inverse, fraction, whole, least, largest;
  const bool joined;
  const F floor, ceiling;

  LANE_FN_OF Finish(const Convolution& im, const Operands& of, int64_t channel, int64_t n)
      : outputs(im.outputs), channel(channel), n(n), step(of.step), x_scale(of.x_scale), y(of.y), residual(of.residual),
        has_bias(im.bias), of_codes(of.scale), codes(im.codes),
        bias(im.bias ? load(im.bias + channel, n) : all(0.0f)), scale(all(of.scale ? *of.scale : 1.0f)),
        zero(all(of.zero ? *of.zero : 0.0f)), low(all(im.activation ? 0.0f : -INFINITY)),
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

// Memory of a thread, which lasts: fresh pages would cost more than what is computed in them.
struct Scratch {
  std::vector<char> frame;
  std::vector<int8_t> border;
  std::vector<int32_t> starts, x_sums;
};
thread_local Scratch scratch;

// What some rows of y see of one group of channels of one image: [rows, width, c], padded with the zero point.
struct Frame {
  const Convolution& im;
  const int64_t c, width, size;  // size: bytes of a code
  char* data = nullptr;

  explicit Frame(const Convolution& im)
      : im(im),
        c(im.channels / im.groups),
        width((im.q - 1) * im.stride_w + im.dilation_w * (im.s - 1) + 1),
        size(im.form == PAIRS ? 2 : 1) {}

  int64_t rows(int64_t of_y) const { return (of_y - 1) * im.stride_h + im.dilation_h * (im.r - 1) + 1; }

  // The number of rows of y whose frame fits a cache, and that have pixels enough for each panel that is read.
  int64_t rows_at_once() const {
    int64_t rows_of_y = 1;
    while (rows_of_y < im.p) {
      const int64_t bytes = rows(rows_of_y + 1) * width * c * size;
      if (bytes > (rows_of_y * im.q >= 48 ? 1 << 15 : 1 << 18)) break;
      ++rows_of_y;
    }
    return rows_of_y;
  }

  void fill(const int8_t* x, int64_t group, int64_t first, int64_t of_y) {
    const int64_t count = rows(of_y), slack = 64;
    if (int64_t(scratch.frame.size()) < count * width * c * size + slack) {
      scratch.frame.resize(count * width * c * size + slack);
    }
    data = scratch.frame.data();
    const int64_t left = std::min(im.left, width), end = std::max(left, std::min(im.left + im.w, width));
    for (int64_t i = 0; i < count; ++i) {
      if (im.r == 1 && i % im.stride_h) continue;  // which no tap sees
      const int64_t from = first * im.stride_h - im.top + i;
      char* to = data + i * width * c * size;
      if (from < 0 || from >= im.h) {
        border(to, width * c);
        continue;
      }
      border(to, left * c);
      const int8_t* row = x + from * im.w * im.channels + group * c;
      if (im.groups == 1) {
        copy(row, to + left * c * size, (end - left) * c);
      } else {
        for (int64_t j = 0; j < end - left; ++j) copy(row + j * im.channels, to + (left + j) * c * size, c);
      }
      border(to + end * c * size, (width - end) * c);
    }
  }

  void border(char* to, int64_t count) const {
    std::memset(to, im.form == PAIRS ? 0 : int(im.shift + UNSIGNED), count * size);
  }

  void copy(const int8_t* from, char* to, int64_t count) const {
    if (im.form == PAIRS) {
      int16_t* wide = reinterpret_cast<int16_t*>(to);
      const int16_t shift = im.shift;
      for (int64_t i = 0; i < count; ++i) wide[i] = int16_t(from[i] - shift);
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = char(from[i] + UNSIGNED);
    }
  }

  // Bytes from a pixel's first to the first of a run.
  int64_t offset(const Run& run) const {
    return ((run.r * im.dilation_h * width + run.s * im.dilation_w) * c + run.c) * size;
  }

  // The sum of the codes of a run, less their zero point.
  int64_t sum(const char* pixel, const Run& run) const {
    const char* from = pixel + offset(run);
    int64_t total = 0;
    if (im.form == PAIRS) {
      for (int64_t i = 0; i < run.length; ++i) total += reinterpret_cast<const int16_t*>(from)[i];
    } else {
      int32_t codes = 0;
      for (int64_t i = 0; i < run.length; ++i) codes += UNSIGNED ? uint8_t(from[i]) : int8_t(from[i]);
      total = codes - (UNSIGNED + im.shift) * run.length;
    }
    return total;
  }
};

LANE_FN I word(const char* p) {
  int32_t both;
  std::memcpy(&both, p, sizeof(both));
  return all(both);
}

// Adds what `JOINED` words of x, from `from` on, give with as many of the weight. JOINED 0: by quads, one word.
template <int FORM, int JOINED>
LANE_FN I multiply(I sums, const char* from, const int32_t* by) {
  if (FORM == PAIRS) return sums + pairs(word(from), load(by));
#ifdef LANES_HAVE_QUADS
  if (FORM == QUADS) return add_quads(sums, word(from), load(by));
#endif
#ifdef LANES_HAVE_SHORTS
  if (FORM == SHORTS) {
    I shorts = short_pairs(word(from), load(by));
#pragma GCC unroll 4
    for (int j = 1; j < JOINED; ++j) shorts = add_shorts(shorts, short_pairs(word(from + 4 * j), load(by + j * LANES)));
    return sums + pairs(shorts, all(0x00010001));
  }
#endif
  return sums;
}

// What a thread is at: pixels of a frame, and where they lie in y.
struct Place {
  const Frame& frame;
  const Operands& operands;
  const int32_t* starts;   // of each pixel, in bytes of the frame
  const int32_t* x_sums;   // [pixels, parts]
  int64_t row;             // of the first pixel in [batch * p * q]
  int64_t group;
};

// Adds the products of some words of PIXELS with VECTORS panels of the weight, `panel` words apart.
template <int FORM, int JOINED, int PIXELS, int VECTORS>
LANE_FN void add_words(
    I (&sums)[PIXELS][VECTORS], const char* const (&from)[PIXELS], int64_t words, const int32_t* by, int64_t panel) {
  I near[PIXELS][VECTORS];
  each<PIXELS>([&](auto m) INLINE { each<VECTORS>([&](auto v) INLINE { near[m][v] = sums[m][v]; }); });
  for (int64_t k = 0; k < words; k += JOINED, by += JOINED * LANES) {
    each<PIXELS>([&](auto m) INLINE {
      each<VECTORS>([&](auto v) INLINE {
        near[m][v] = multiply<FORM, JOINED>(near[m][v], from[m] + 4 * k, by + v * panel);
      });
    });
  }
  each<PIXELS>([&](auto m) INLINE { each<VECTORS>([&](auto v) INLINE { sums[m][v] = near[m][v]; }); });
}

// PIXELS from the one numbered `first`, of VECTORS times 16 channels from `channel` of the group on; by: their panels.
template <int FORM, int JOINED, int PIXELS, int VECTORS>
void tile(const Place& place, int64_t first, const int32_t* by, int64_t channel, int64_t end) {
  const Convolution& im = place.frame.im;
  const int64_t panel = im.words * LANES, base = place.group * end;
  I sums[PIXELS][VECTORS] = {};
  F total[PIXELS][VECTORS];
  int64_t part = 0;
  for (const Run* run = im.runs; run < im.runs + im.run_count; ++run) {
    const char* from[PIXELS];
    const char* data = place.frame.data + place.frame.offset(*run);
    for (int m = 0; m < PIXELS; ++m) from[m] = data + place.starts[first + m];
    add_words<FORM, JOINED>(sums, from, run->words, by, panel);
    by += run->words * LANES;
    if (!run->ends) continue;
    for (int v = 0; v < VECTORS; ++v) {
      const int64_t at = channel + v * LANES;
      const Part share(im, part * im.outputs + base + at, end - at, FORM == PAIRS ? 0 : im.shift + UNSIGNED);
      for (int m = 0; m < PIXELS; ++m) {
        const F real = share(sums[m][v], all(place.x_sums ? place.x_sums[(first + m) * im.parts + part] : 0));
        total[m][v] = part ? total[m][v] + real : real;
        sums[m][v] = all(0);
      }
    }
    ++part;
  }
  for (int v = 0; v < VECTORS; ++v) {
    const int64_t at = channel + v * LANES;
    const Finish finish(im, place.operands, base + at, end - at);
    finish(PIXELS, place.row + first, [&](int64_t m) INLINE { return total[m][v]; });
  }
}

template <int FORM, int JOINED, int PIXELS, int VECTORS>
void tiles(const Place& place, int64_t count, const int32_t* by, int64_t channel, int64_t end) {
  int64_t i = 0;
  for (; i + PIXELS <= count; i += PIXELS) tile<FORM, JOINED, PIXELS, VECTORS>(place, i, by, channel, end);
  if (PIXELS > 4 && i + 4 <= count) tile<FORM, JOINED, 4, VECTORS>(place, i, by, channel, end), i += 4;
  if (PIXELS > 8 && i + 4 <= count) tile<FORM, JOINED, 4, VECTORS>(place, i, by, channel, end), i += 4;
  if (i + 2 <= count) tile<FORM, JOINED, 2, VECTORS>(place, i, by, channel, end), i += 2;
  if (i < count) tile<FORM, JOINED, 1, VECTORS>(place, i, by, channel, end);
}

// Panels first..last of the weight of a group.
template <int FORM, int JOINED>
void panels(const Place& place, int64_t count, int64_t first, int64_t last) {
  const Convolution& im = place.frame.im;
  const int64_t end = im.outputs / im.groups, all_panels = (end + LANES - 1) / LANES;
  const int32_t* weight = im.weight + place.group * all_panels * im.words * LANES;
  while (first < last) {
    const int32_t* by = weight + first * im.words * LANES;
    const int64_t channel = first * LANES;
#if defined(__AVX512F__)
    if (first + 4 <= last) {
      tiles<FORM, JOINED, 6, 4>(place, count, by, channel, end), first += 4;
    } else if (first + 2 <= last) {
      tiles<FORM, JOINED, 12, 2>(place, count, by, channel, end), first += 2;
    } else {
      tiles<FORM, JOINED, 12, 1>(place, count, by, channel, end), first += 1;
    }
#elif defined(__AVX2__)
    tiles<FORM, JOINED, FORM == SHORTS && JOINED < 4 ? 4 : 6, 1>(place, count, by, channel, end), first += 1;
#elif defined(__ARM_NEON)
    tiles<FORM, JOINED, 6, 1>(place, count, by, channel, end), first += 1;
#else
    tiles<FORM, JOINED, 2, 1>(place, count, by, channel, end), first += 1;
#endif
  }
}

void panels_of(const Place& place, int64_t count, int64_t first, int64_t last) {
  [[maybe_unused]] const Convolution& im = place.frame.im;
#ifdef LANES_HAVE_QUADS
  if (im.form == QUADS) return panels<QUADS, 1>(place, count, first, last);
#endif
#ifdef LANES_HAVE_SHORTS
  if (im.form == SHORTS && im.joined == 1) return panels<SHORTS, 1>(place, count, first, last);
  if (im.form == SHORTS && im.joined == 2) return panels<SHORTS, 2>(place, count, first, last);
  if (im.form == SHORTS) return panels<SHORTS, 4>(place, count, first, last);
#endif
  panels<PAIRS, 1>(place, count, first, last);
}

// Rows first..first+rows of y, of one group of one image, and some panels of the weight.
void some_rows(
    Frame& frame, const Operands& operands, int64_t b, int64_t group, int64_t first, int64_t rows, int64_t first_panel,
    int64_t last_panel) {
  const Convolution& im = frame.im;
  frame.fill(operands.x + b * im.h * im.w * im.channels, group, first, rows);
  const int64_t count = rows * im.q;
  scratch.starts.resize(count);
  for (int64_t i = 0, p = 0; p < rows; ++p) {
    for (int64_t q = 0; q < im.q; ++q, ++i) {
      scratch.starts[i] = int32_t((p * im.stride_h * frame.width + q * im.stride_w) * frame.c * frame.size);
    }
  }
  const bool wants_sums = im.zero2 || im.fraction;
  if (wants_sums) {
    scratch.x_sums.assign(count * im.parts, 0);
    for (int64_t i = 0; i < count; ++i) {
      int64_t part = 0;
      for (const Run* run = im.runs; run < im.runs + im.run_count; ++run) {
        scratch.x_sums[i * im.parts + part] += int32_t(frame.sum(frame.data + scratch.starts[i], *run));
        part += run->ends;
      }
    }
  }
  const int32_t* x_sums = wants_sums ? scratch.x_sums.data() : nullptr;
  const Place place{frame, operands, scratch.starts.data(), x_sums, (b * im.p + first) * im.q, group};
  panels_of(place, count, first_panel, last_panel);
}

// Depthwise: as many groups as channels of x and y. What one row of y sees is copied into planes of words, each of some
// rows of taps: 2 codes of 16 bits, or 4 bytes, of neighbours along the height.
struct Planes {
  const Convolution& im;
  const int64_t width, in_word, count, size;  // count: of planes; size: words of one

  explicit Planes(const Convolution& im)
      : im(im),
        width((im.q - 1) * im.stride_w + im.dilation_w * (im.s - 1) + 1),
        in_word(im.form == PAIRS ? 2 : 4),
        count((im.r + in_word - 1) / in_word),
        size(width * im.channels + LANES) {}

  // rows: of the image that are seen, from that of the first tap on.
  const int32_t* fill(const int8_t* x, int64_t p, int64_t rows_seen) {
    const int64_t left = std::min(im.left, width), end = std::max(left, std::min(im.left + im.w, width));
    if (int64_t(scratch.frame.size()) < 4 * count * size) scratch.frame.resize(4 * count * size);
    if (int64_t(scratch.border.size()) < im.w * im.channels) scratch.border.resize(im.w * im.channels);
    int32_t* words = reinterpret_cast<int32_t*>(scratch.frame.data());
    const int32_t code = im.form == PAIRS ? 0 : int32_t(0x01010101u * uint8_t(im.shift + UNSIGNED));
    std::memset(scratch.border.data(), int(im.shift), im.w * im.channels);
    for (int64_t plane = 0; plane < count; ++plane) {
      const int8_t* rows[4];
      for (int64_t i = 0; i < 4; ++i) {
        const int64_t r = plane * in_word + i, from = p * im.stride_h - im.top + r * im.dilation_h;
        const bool is_there = i < in_word && r < rows_seen && from >= 0 && from < im.h;
        rows[i] = is_there ? x + from * im.w * im.channels : scratch.border.data();
      }
      int32_t* to = words + plane * size;
      std::fill(to, to + left * im.channels, code);
      join(rows, to + left * im.channels, (end - left) * im.channels);
      std::fill(to + end * im.channels, to + size, code);
    }
    return words;
  }

  void join(const int8_t* const (&rows)[4], int32_t* to, int64_t n) const {
    int64_t i = 0;
    if (im.form == PAIRS) {
      const I shift = all(int32_t(im.shift));
      for (; i < n; i += LANES) {
        const I low = load(rows[0] + i, n - i) - shift, high = load(rows[1] + i, n - i) - shift;
        store(to + i, (low & all(0xffff)) | lanes::left(high, 16), n - i);
      }
      return;
    }
    for (; i + LANES <= n; i += LANES) store_joined(to + i, rows[0] + i, rows[1] + i, rows[2] + i, rows[3] + i);
    for (; i < n; ++i) {
      uint32_t word = 0;
      for (int j = 0; j < 4; ++j) word |= uint32_t(uint8_t(rows[j][i] + UNSIGNED)) << 8 * j;
      to[i] = int32_t(word);
    }
  }

  LANE_FN_OF static void store_joined(int32_t* to, const int8_t* a, const int8_t* b, const int8_t* c, const int8_t* d) {
#ifdef __SSE2__
    const __m128i sign = _mm_set1_epi8(char(UNSIGNED));
    const auto get = [&](const int8_t* from) { return _mm_xor_si128(_mm_loadu_si128((const __m128i*)from), sign); };
    const __m128i ra = get(a), rb = get(b), rc = get(c), rd = get(d);
    const __m128i ab = _mm_unpacklo_epi8(ra, rb), cd = _mm_unpacklo_epi8(rc, rd);
    const __m128i ab_high = _mm_unpackhi_epi8(ra, rb), cd_high = _mm_unpackhi_epi8(rc, rd);
    __m128i* out = (__m128i*)to;
    _mm_storeu_si128(out, _mm_unpacklo_epi16(ab, cd));
    _mm_storeu_si128(out + 1, _mm_unpackhi_epi16(ab, cd));
    _mm_storeu_si128(out + 2, _mm_unpacklo_epi16(ab_high, cd_high));
    _mm_storeu_si128(out + 3, _mm_unpackhi_epi16(ab_high, cd_high));
#else
    for (int i = 0; i < LANES; ++i) {
      const uint8_t bytes[4] = {uint8_t(a[i] + UNSIGNED), uint8_t(b[i] + UNSIGNED), uint8_t(c[i] + UNSIGNED),
                                uint8_t(d[i] + UNSIGNED)};
      std::memcpy(to + i, bytes, 4);
    }
#endif
  }
};

LANE_FN I add_word(I sums, I x, I by, bool by_quads) {
#ifdef LANES_HAVE_QUADS
  if (by_quads) return add_quads(sums, x, by);
#endif
  (void)by_quads;
  return sums + pairs(x, by);
}

// One row of y; BY_QUADS: whether words are 4 bytes; SUMS: whether those of x are wanted.
template <bool BY_QUADS, bool SUMS>
void one_row(const Convolution& im, const Operands& operands, int64_t row) {
  Planes planes(im);
  const int32_t* words = planes.fill(operands.x + row / im.p * im.h * im.w * im.channels, row % im.p, im.r);
  const int64_t padded = (im.channels + LANES - 1) / LANES * LANES, less = BY_QUADS ? im.shift + UNSIGNED : 0;
  for (int64_t channel = 0; channel < im.channels; channel += LANES) {
    const int64_t n = im.channels - channel;
    const Part share(im, channel, n, less);
    const Finish finish(im, operands, channel, n);
    finish(im.q, row * im.q, [&](int64_t q) INLINE {
      const int32_t* from = words + q * im.stride_w * im.channels + channel;
      const int32_t* by = im.weight + channel;
      I sums = all(0), x_sums = all(0);
      for (int64_t plane = 0; plane < planes.count; ++plane, from += planes.size) {
        const int64_t rows = std::min(planes.in_word, im.r - plane * planes.in_word);
        const I ones = all(BY_QUADS ? int32_t(0x01010101u >> 8 * (4 - rows)) : rows == 2 ? 0x00010001 : 1);
        for (int64_t s = 0; s < im.s; ++s, by += padded) {
          const I x = load(from + s * im.dilation_w * im.channels);
          sums = add_word(sums, x, load(by), BY_QUADS);
          if (SUMS) x_sums = add_word(x_sums, x, ones, BY_QUADS);
        }
      }
      if (SUMS) x_sums = x_sums - all(int32_t(less * im.r * im.s));
      return share(sums, x_sums);
    });
  }
}

// Whether two rows of y see four rows of the image, which are the words of the planes of one.
bool pairs_rows(const Convolution& im) {
  return im.r == 3 && im.s == 3 && im.stride_h == 1 && im.dilation_h == 1 && !im.zero2 && !im.fraction;
}

// Rows p and p + 1 of y of an image: the taps of the second are those of the first, a row further down in each word.
template <bool BY_QUADS>
void two_rows(const Convolution& im, const Operands& operands, int64_t b, int64_t p) {
  constexpr int PLANES = BY_QUADS ? 1 : 2;
  Planes planes(im);
  const int32_t* words = planes.fill(operands.x + b * im.h * im.w * im.channels, p, im.r + 1);
  const int64_t padded = (im.channels + LANES - 1) / LANES * LANES, less = BY_QUADS ? im.shift + UNSIGNED : 0;
  const int64_t row = b * im.p + p, step = im.dilation_w * im.channels;
  const bool has_second = p + 1 < im.p;
  for (int64_t channel = 0; channel < im.channels; channel += LANES) {
    const int64_t n = im.channels - channel;
    const Part share(im, channel, n, less);
    const Finish finish(im, operands, channel, n);
    I first[PLANES][3], second[PLANES][3];
    for (int s = 0; s < 3; ++s) {
      for (int i = 0; i < PLANES; ++i) first[i][s] = load(im.weight + channel + (i * 3 + s) * padded);
      second[0][s] = left(first[0][s], BY_QUADS ? 8 : 16);
      if (!BY_QUADS) second[PLANES - 1][s] = right(first[0][s], 16) | left(first[PLANES - 1][s], 16);
    }
    const F by = all(*operands.x_scale);
    for (int64_t q = 0; q < im.q; ++q) {
      I upper = all(0), lower = all(0);
      each<PLANES>([&](auto i) INLINE {
        each<3>([&](auto s) INLINE {
          const I x = load(words + i * planes.size + q * im.stride_w * im.channels + channel + s * step);
          upper = add_word(upper, x, first[i][s], BY_QUADS);
          lower = add_word(lower, x, second[i][s], BY_QUADS);
        });
      });
      const F real[] = {share(upper, all(0)), share(lower, all(0))};
      for (int i = 0; i < 1 + has_second; ++i) {
        const int64_t at = (row + i) * im.q + q;
        if (finish.joined) {
          finish.put(at, real[i], by);
        } else {
          finish(1, at, [&](int64_t) INLINE { return real[i]; });
        }
      }
    }
  }
}

}  // namespace

// The forms of products that this library has, as bits: 1 << SHORTS, 1 << QUADS.
EXPORT const int64_t int8_forms = 1 << PAIRS
#ifdef LANES_HAVE_SHORTS
    | 1 << SHORTS
#endif
#ifdef LANES_HAVE_QUADS
    | 1 << QUADS
#endif
    ;

// The arguments behind `of` are the Operands.
EXPORT void convolve_int8(
    const Convolution* of, const int8_t* x, const float* x_scale, int64_t step, void* y, const void* residual,
    const float* scale, const float* zero, int threads) {
  const Convolution& im = *of;
  const Operands operands(im, x, x_scale, step, y, residual, scale, zero);
  const int64_t all_panels = (im.outputs / im.groups + LANES - 1) / LANES;
  const int64_t rows = Frame(im).rows_at_once(), pieces = (im.p + rows - 1) / rows;
  const int64_t units = im.batch * im.groups * pieces;
  // so that threads have equal shares, panels are shared out too
  const int64_t wanted = units >= 4 * threads ? 1 : threads / std::gcd(units, int64_t(threads));
  const int64_t shares = std::min(wanted, all_panels);
  in_parallel(threads, [&](int64_t index, int64_t count) {
    Frame frame(im);
    for (int64_t i = units * shares * index / count; i < units * shares * (index + 1) / count; ++i) {
      const int64_t unit = i / shares, share = i % shares;
      const int64_t b = unit / (im.groups * pieces), group = unit / pieces % im.groups, first = unit % pieces * rows;
      const int64_t first_panel = all_panels * share / shares, last_panel = all_panels * (share + 1) / shares;
      some_rows(frame, operands, b, group, first, std::min(rows, im.p - first), first_panel, last_panel);
    }
  });
}

// weight: [planes, s, channels], channels padded to a multiple of 16.
EXPORT void depthwise_int8(
    const Convolution* of, const int8_t* x, const float* x_scale, int64_t step, void* y, const void* residual,
    const float* scale, const float* zero, int threads) {
  const Operands operands(*of, x, x_scale, step, y, residual, scale, zero);
  if (pairs_rows(*of)) {
    const int64_t pairs = (of->p + 1) / 2;
    const auto two = of->form == PAIRS ? two_rows<false> : two_rows<true>;
    parallel_for(threads, of->batch * pairs, [&](int64_t i) { two(*of, operands, i / pairs, i % pairs * 2); });
    return;
  }
  const bool sums = of->zero2 || of->fraction;
  const auto one = of->form == PAIRS ? (sums ? one_row<false, true> : one_row<false, false>)
                                     : (sums ? one_row<true, true> : one_row<true, false>);
  parallel_for(threads, of->batch * of->p, [&](int64_t row) { one(*of, operands, row); });
}

// Compared with the structs of Python by `load_functions`.
EXPORT const int64_t sizeof_Convolution = sizeof(Convolution);
EXPORT const int64_t sizeof_Run = sizeof(Run);
