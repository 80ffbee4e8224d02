// Depthwise convolutions of 8-bit images on a CPU: as many groups as channels of x and y. What one row of y sees is copied
// into planes of words, each of some rows of taps, neighbours along the height.
#include "int8.h"

#include <vector>

namespace {

constexpr bool BY_QUADS = FORMS >> QUADS & 1;  // whether words are 4 bytes, else 2 codes of 16 bits

// Memory of a thread, which lasts: fresh pages would cost more than what is computed in them.
struct Scratch {
  std::vector<int32_t> words;
  std::vector<int8_t> border;
};
thread_local Scratch scratch;

// What one row of y sees.
struct Planes {
  const Convolution& im;
  const int64_t width, in_word, count, size;  // count: of planes; size: words of one

  explicit Planes(const Convolution& im)
      : im(im),
        width((im.q - 1) * im.stride_w + im.dilation_w * (im.s - 1) + 1),
        in_word(BY_QUADS ? 4 : 2),
        count((im.r + in_word - 1) / in_word),
        size(width * im.channels + LANES) {}

  // rows: of the image that are seen, from that of the first tap on.
  const int32_t* fill(const int8_t* x, int64_t p, int64_t rows_seen) {
    const int64_t left = std::min(im.left, width), end = std::max(left, std::min(im.left + im.w, width));
    if (int64_t(scratch.words.size()) < count * size) scratch.words.resize(count * size);
    if (int64_t(scratch.border.size()) < im.w * im.channels) scratch.border.resize(im.w * im.channels);
    int32_t* words = scratch.words.data();
    const int32_t code = BY_QUADS ? int32_t(0x01010101u * uint8_t(im.shift + UNSIGNED)) : 0;
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
    if (!BY_QUADS) {
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

LANE_FN I add_word(I sums, I x, I by) {
#ifdef LANES_HAVE_QUADS
  return add_quads(sums, x, by);
#else
  return sums + pairs(x, by);
#endif
}

// One row of y; SUMS: whether those of x are wanted.
template <bool SUMS>
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
          sums = add_word(sums, x, load(by));
          if (SUMS) x_sums = add_word(x_sums, x, ones);
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
          upper = add_word(upper, x, first[i][s]);
          lower = add_word(lower, x, second[i][s]);
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

// weight: [planes, s, channels], channels padded to a multiple of 16.
EXPORT void depthwise_int8(
    const Convolution* of, const int8_t* x, const float* x_scale, int64_t step, void* y, const void* residual,
    const float* scale, const float* zero, int threads) {
  const Operands operands(*of, x, x_scale, step, y, residual, scale, zero);
  if (pairs_rows(*of)) {
    const int64_t pairs = (of->p + 1) / 2;
    parallel_for(threads, of->batch * pairs, [&](int64_t i) { two_rows(*of, operands, i / pairs, i % pairs * 2); });
    return;
  }
  const auto one = of->zero2 || of->fraction ? one_row<true> : one_row<false>;
  parallel_for(threads, of->batch * of->p, [&](int64_t row) { one(*of, operands, row); });
}
