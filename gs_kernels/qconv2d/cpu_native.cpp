// Convolutions of 8-bit images on CPUs with AVX-512, channels last: the pass from sums to codes or fp32, and depthwise
// convolutions, which are one pass from codes to codes. Sums are int32, exact; what follows has the order of finish_int8
// (ref.py), and is not contracted to fused operations.
#include <immintrin.h>
#include <cstdint>

#define INLINE __attribute__((target("avx512f,avx512bw,avx512vl"), always_inline)) inline
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl")))

namespace {

constexpr int64_t LANES = 16;

struct Image {
  int64_t batch, h, w, c, p, q, r, s, stride_h, stride_w, top, left, dilation_h, dilation_w;
};

struct After {
  const float *scale, *bias;  // [C]; bias may be null
  const int32_t* of_zero;     // [C]: the sum of all weights times the zero point of x, negative
  float x_scale, inverse, fraction, whole;
  int32_t shift, twice, activation, codes;  // activation: 0 none, 1 relu, 2 relu6; codes: whether y is int8
};

INLINE __m512 times(__m512 a, __m512 b) { return _mm512_mul_round_ps(a, b, _MM_FROUND_CUR_DIRECTION); }
INLINE __m512 plus(__m512 a, __m512 b) { return _mm512_add_round_ps(a, b, _MM_FROUND_CUR_DIRECTION); }

INLINE __m512 in_fp32(__m512i sums, const After& after) {
  return _mm512_cvtepi32_ps(_mm512_mullo_epi32(sums, _mm512_set1_epi32(after.twice)));
}

// Of sums times `twice`, for 16 channels or those of a mask; the rest: what a residual adds.
INLINE __m512 finished(__m512 sums, const After& after, int64_t channel, __mmask16 mask = -1, __m512 rest = __m512{}) {
  __m512 v = times(times(sums, _mm512_set1_ps(0.5f)), _mm512_maskz_loadu_ps(mask, after.scale + channel));
  v = times(v, _mm512_set1_ps(after.x_scale));
  if (after.bias) v = plus(v, _mm512_maskz_loadu_ps(mask, after.bias + channel));
  v = plus(v, rest);
  if (after.activation) v = _mm512_max_ps(_mm512_setzero_ps(), v);  // of NaN the second: it stays
  if (after.activation == 2) v = _mm512_min_ps(_mm512_set1_ps(6.0f), v);
  return v;
}

INLINE __m128i in_codes(__m512 v, const After& after) {
  v = plus(times(v, _mm512_set1_ps(after.inverse)), _mm512_set1_ps(after.fraction));
  v = plus(_mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT), _mm512_set1_ps(after.whole));
  v = _mm512_min_ps(_mm512_max_ps(v, _mm512_set1_ps(-128.0f)), _mm512_set1_ps(127.0f));  // -128 of NaN
  return _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(v));
}

struct Taps {
  int64_t r_from, r_to, s_from, s_to;  // those that see the image
};

// VECTORS times 16 neighbours in a row of y, of one pixel after the other, from the one numbered `first`. All see the
// same taps, and if ALL, all of them: what the zero point takes off their sums is known. x: the image; y: the row.
template <int VECTORS, bool ALL>
INLINE void neighbours(
    const int8_t* x, const int32_t* weight, void* y, const Image& im, const After& after, int64_t p, int64_t first, Taps taps) {
  const int64_t units = im.c / LANES, down = im.dilation_h * im.w * im.c, right = im.dilation_w * im.c;
  const __m512i shift = _mm512_set1_epi32(after.shift);
  const int8_t* from[VECTORS];
  int64_t channel[VECTORS];
  __m512i sums[VECTORS];
  for (int v = 0; v < VECTORS; ++v) {
    const int64_t q = (first + v) / units;
    channel[v] = (first + v) % units * LANES;
    from[v] = x + ((p * im.stride_h - im.top) * im.w + q * im.stride_w - im.left) * im.c + channel[v];
    sums[v] = ALL ? _mm512_loadu_si512(after.of_zero + channel[v]) : _mm512_setzero_si512();
  }
  for (int64_t r = taps.r_from; r < taps.r_to; ++r) {
    for (int64_t s = taps.s_from; s < taps.s_to; ++s) {
      const int64_t at = r * down + s * right;
      const int32_t* by = weight + (r * im.s + s) * im.c;
      for (int v = 0; v < VECTORS; ++v) {
        const __m512i codes = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(from[v] + at)));
        const __m512i seen = ALL ? codes : _mm512_sub_epi32(codes, shift);
        sums[v] = _mm512_add_epi32(sums[v], _mm512_mullo_epi32(seen, _mm512_loadu_si512(by + channel[v])));
      }
    }
  }
  for (int v = 0; v < VECTORS; ++v) {
    const __m512 values = finished(in_fp32(sums[v], after), after, channel[v]);
    const int64_t at = (first + v) * LANES;
    if (after.codes) {
      _mm_storeu_si128((__m128i*)(static_cast<int8_t*>(y) + at), in_codes(values, after));
    } else {
      _mm512_storeu_ps(static_cast<float*>(y) + at, values);
    }
  }
}

// The taps, of `count` that are `dilation` apart and the first at `start`, which lie in 0..size.
inline void inside(int64_t start, int64_t dilation, int64_t count, int64_t size, int64_t& from, int64_t& to) {
  for (from = 0; from < count && start + from * dilation < 0;) ++from;
  for (to = count; to > from && start + (to - 1) * dilation >= size;) --to;
}

// Pixels first..last of a row, 16 channels each, which all see the same taps.
template <bool ALL>
INLINE void run(
    const int8_t* x, const int32_t* weight, void* y, const Image& im, const After& after, int64_t p, int64_t first,
    int64_t last, Taps taps) {
  constexpr int MANY = 8;
  for (; first + MANY <= last; first += MANY) neighbours<MANY, ALL>(x, weight, y, im, after, p, first, taps);
  for (; first < last; ++first) neighbours<1, ALL>(x, weight, y, im, after, p, first, taps);
}

TARGET void one_row(const int8_t* x, const int32_t* weight, void* y, const Image& im, const After& after, int64_t p) {
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

TARGET void finish_row(const Sums& sums, const Residual& residual, void* y, const After& after, int64_t row) {
  for (int64_t channel = 0; channel < sums.channels; channel += LANES) {
    const int64_t left = sums.channels - channel, at = row * sums.channels + channel;
    const __mmask16 mask = left >= LANES ? -1 : (1 << left) - 1;
    __m512 v, rest = _mm512_setzero_ps();
    if (sums.are_whole) {
      const __m512i whole = _mm512_maskz_loadu_epi32(mask, static_cast<const int32_t*>(sums.data) + at);
      v = in_fp32(_mm512_add_epi32(whole, _mm512_maskz_loadu_epi32(mask, after.of_zero + channel)), after);
    } else {
      v = times(_mm512_maskz_loadu_ps(mask, static_cast<const float*>(sums.data) + at), _mm512_set1_ps(after.twice));
    }
    if (residual.data && residual.is_codes) {
      const __m128i codes = _mm_maskz_loadu_epi8(mask, static_cast<const int8_t*>(residual.data) + at);
      rest = plus(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)), _mm512_set1_ps(-residual.zero));
      rest = times(rest, _mm512_set1_ps(residual.scale));
    } else if (residual.data) {
      rest = _mm512_maskz_loadu_ps(mask, static_cast<const float*>(residual.data) + at);
    }
    v = finished(v, after, channel, mask, rest);
    if (after.codes) {
      _mm_mask_storeu_epi8(static_cast<int8_t*>(y) + at, mask, in_codes(v, after));
    } else {
      _mm512_mask_storeu_ps(static_cast<float*>(y) + at, mask, v);
    }
  }
}

}  // namespace

extern "C" void finish_int8(const Sums* sums, const Residual* residual, void* y, const After* after, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < sums->rows; ++row) finish_row(*sums, *residual, y, *after, row);
}

// The number of channels is a multiple of 16.
extern "C" void depthwise_int8(
    const int8_t* x, const int32_t* weight, void* y, const Image* image, const After* after, int threads) {
  const Image& im = *image;
  const int64_t rows = im.batch * im.p, row_bytes = im.q * im.c * (after->codes ? 1 : sizeof(float));
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row) {
    const int8_t* from = x + row / im.p * im.h * im.w * im.c;
    one_row(from, weight, static_cast<char*>(y) + row * row_bytes, im, *after, row % im.p);
  }
}
