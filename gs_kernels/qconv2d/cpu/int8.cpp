// Convolutions of 8-bit images on a CPU, channels last, from codes to codes or fp32 in one pass; rows of a matrix are
// images of one pixel. Sums are int32, exact.
//
// A thread copies what some rows of y see into a frame: codes in the form that products take, padded. It then goes over
// the weight, a panel of 16 or more channels at a time, and over the frame, some pixels at a time, whose sums stay in
// registers: nothing is copied once per tap. Filters are runs of neighbours in the frame: a row of taps and their
// channels, cut where groups of the weight end.
#include "int8.h"

#include <numeric>
#include <vector>

namespace {

// Memory of a thread, which lasts: fresh pages would cost more than what is computed in them.
struct Scratch {
  std::vector<char> frame;
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
#ifdef LANES_HAVE_QUADS
  panels<QUADS, 1>(place, count, first, last);
#else
#ifdef LANES_HAVE_SHORTS
  const Convolution& im = place.frame.im;
  if (im.form == SHORTS && im.joined == 1) return panels<SHORTS, 1>(place, count, first, last);
  if (im.form == SHORTS && im.joined == 2) return panels<SHORTS, 2>(place, count, first, last);
  if (im.form == SHORTS) return panels<SHORTS, 4>(place, count, first, last);
#endif
  panels<PAIRS, 1>(place, count, first, last);
#endif
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

}  // namespace

EXPORT const int64_t int8_forms = FORMS;

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

// Compared with the structs of Python by `load_functions`.
EXPORT const int64_t sizeof_Convolution = sizeof(Convolution);
EXPORT const int64_t sizeof_Run = sizeof(Run);
