// L1 products of 8-bit codes, channels-last, from codes to int32, fp32 or codes. Codes are bytes 0..255 here, 128 higher,
// eight neighbours of K are a word, and one instruction adds up the differences of a word of x and one of each of some
// channels of y. Sums are exact; what follows has the order of int8_epilogue (gs_kernels/qconv2d/ref.py).
#include <algorithm>
#include <cmath>
#include <vector>

#include "parallel.h"
#include "simd.h"

namespace {
using namespace lanes;

// Sums: of a word for each of ACROSS channels of y. ROWS pixels times VECTORS of them are registers.
#if defined(__AVX512F__) && defined(__AVX512BW__)
typedef __m512i Sums;
constexpr int ACROSS = 8, VECTORS = 4, ROWS = 6;
LANE_FN Sums load_words(const uint8_t* p) { return _mm512_loadu_si512(p); }
LANE_FN Sums repeated(const uint8_t* p) {
  int64_t word;
  std::memcpy(&word, p, 8);
  return _mm512_set1_epi64(word);
}
LANE_FN Sums none() { return _mm512_setzero_si512(); }
LANE_FN Sums add_differences(Sums sums, Sums a, Sums b) { return _mm512_add_epi64(sums, _mm512_sad_epu8(a, b)); }
#elif defined(__AVX2__)
typedef __m256i Sums;
constexpr int ACROSS = 4, VECTORS = 2, ROWS = 4;
LANE_FN Sums load_words(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
LANE_FN Sums repeated(const uint8_t* p) {
  int64_t word;
  std::memcpy(&word, p, 8);
  return _mm256_set1_epi64x(word);
}
LANE_FN Sums none() { return _mm256_setzero_si256(); }
LANE_FN Sums add_differences(Sums sums, Sums a, Sums b) { return _mm256_add_epi64(sums, _mm256_sad_epu8(a, b)); }
#elif defined(__SSE2__)
typedef __m128i Sums;
constexpr int ACROSS = 2, VECTORS = 4, ROWS = 2;
LANE_FN Sums load_words(const uint8_t* p) { return _mm_loadu_si128((const __m128i*)p); }
LANE_FN Sums repeated(const uint8_t* p) {
  const __m128i word = _mm_loadl_epi64((const __m128i*)p);
  return _mm_unpacklo_epi64(word, word);
}
LANE_FN Sums none() { return _mm_setzero_si128(); }
LANE_FN Sums add_differences(Sums sums, Sums a, Sums b) { return _mm_add_epi64(sums, _mm_sad_epu8(a, b)); }
#else
typedef uint64_t Sums __attribute__((vector_size(16)));
constexpr int ACROSS = 2, VECTORS = 4, ROWS = 4;
LANE_FN Sums load_words(const uint8_t* p) {
  Sums words;
  std::memcpy(&words, p, 16);
  return words;
}
LANE_FN Sums repeated(const uint8_t* p) {
  uint64_t word;
  std::memcpy(&word, p, 8);
  return Sums{word, word};
}
LANE_FN Sums none() { return Sums{}; }
LANE_FN Sums add_differences(Sums sums, Sums a, Sums b) {
#ifdef __ARM_NEON
  return sums + (Sums)vpaddlq_u32(vpaddlq_u16(vpaddlq_u8(vabdq_u8((uint8x16_t)a, (uint8x16_t)b))));
#else
  uint8_t x[16], y[16];
  std::memcpy(x, &a, 16), std::memcpy(y, &b, 16);
  for (int i = 0; i < 16; ++i) sums[i / 8] += x[i] > y[i] ? x[i] - y[i] : y[i] - x[i];
  return sums;
#endif
}
#endif

constexpr int64_t TILE = 24, WORD = 8;  // pixels whose words lie side by side; bytes of a word
constexpr int BLOCK = VECTORS * ACROSS;
constexpr uint8_t UNSIGNED = 128;

enum Form { INT32, FP32, CODES };

// weight: [ceil(outputs / ACROSS), words, ACROSS, 8], of K in the order (R, S, C). scale, bias: of each channel of y.
struct AdderCodes {
  int64_t batch, h, w, channels, p, q, outputs, r, s, stride_h, stride_w, top, left, dilation_h, dilation_w;
  const uint8_t* weight;
  const float *scale, *bias;  // bias may be null
  int64_t words, zero;        // the code beside the image
  float inverse, fraction, whole;
  int32_t activation, form;
};

struct Added {  // a residual, channels-last; of codes the real values are (r - zero) * scale
  const void* r;
  const float *scale, *zero;
};

// Writes the words of K of a pixel of y.
void gather(const AdderCodes& of, const int8_t* x, int64_t pixel, uint8_t* to) {
  const int64_t b = pixel / (of.p * of.q), first_h = pixel / of.q % of.p * of.stride_h - of.top;
  const int64_t first_w = pixel % of.q * of.stride_w - of.left, c = of.channels;
  uint8_t* at = to;
  for (int64_t i = 0; i < of.r; ++i) {
    const int64_t h = first_h + i * of.dilation_h;
    if (h < 0 || h >= of.h) {
      std::memset(at, int(of.zero), size_t(of.s * c));
      at += of.s * c;
      continue;
    }
    const int8_t* row = x + (b * of.h + h) * of.w * c;
    if (of.dilation_w == 1 && first_w >= 0 && first_w + of.s <= of.w) {
      std::memcpy(at, row + first_w * c, size_t(of.s * c));
      at += of.s * c;
      continue;
    }
    for (int64_t j = 0; j < of.s; ++j, at += c) {
      const int64_t w = first_w + j * of.dilation_w;
      if (w < 0 || w >= of.w) {
        std::memset(at, int(of.zero), size_t(c));
      } else {
        std::memcpy(at, row + w * c, size_t(c));
      }
    }
  }
  uint8_t* const end = to + of.words * WORD;
  std::fill(at, end, uint8_t(0));
  for (at = to; at < end; at += WORD) {
    uint64_t word;
    std::memcpy(&word, at, 8);
    word ^= 0x8080808080808080u;
    std::memcpy(at, &word, 8);
  }
}

// sums: [ROWS, BLOCK], of V vectors of channels, the rows of words being `pitch` bytes apart.
template <int V>
void add_words(const AdderCodes& of, const uint8_t* x, int64_t pitch, const uint8_t* w, int32_t* to) {
  Sums sums[ROWS][V];
  each<ROWS>([&](auto i) INLINE { each<V>([&](auto v) INLINE { sums[i][v] = none(); }); });
  const int64_t panel = of.words * ACROSS * WORD;
  for (int64_t k = 0; k < of.words; ++k) {
    Sums by[V];
    each<V>([&](auto v) INLINE { by[v] = load_words(w + v * panel + k * ACROSS * WORD); });
    each<ROWS>([&](auto i) INLINE {
      const Sums word = repeated(x + i * pitch + k * WORD);
      each<V>([&](auto v) INLINE { sums[i][v] = add_differences(sums[i][v], word, by[v]); });
    });
  }
  for (int i = 0; i < ROWS; ++i) {
    for (int v = 0; v < V; ++v) {
      int64_t near[ACROSS];
      std::memcpy(near, &sums[i][v], sizeof(near));
      for (int j = 0; j < ACROSS; ++j) to[i * BLOCK + v * ACROSS + j] = int32_t(near[j]);
    }
  }
}

// Writes n channels of a pixel, from `at` elements into y on.
void finish(const AdderCodes& of, const Added& added, const int32_t* sums, int64_t channel, int64_t n, int64_t at, void* y) {
  for (int64_t i = 0; i < n; i += LANES) {
    const int64_t left = n - i, to = at + i;
    const I negative = all(0) - load(sums + i, left);
    if (of.form == INT32) {
      store(static_cast<int32_t*>(y) + to, negative, left);
      continue;
    }
    F v = in_fp32(negative) * load(of.scale + channel + i, left);
    if (of.bias) v = v + load(of.bias + channel + i, left);
    if (added.r && added.scale) {
      F real = in_fp32(load(static_cast<const int8_t*>(added.r) + to, left));
      if (added.zero) real = real - all(*added.zero);
      v = v + real * all(*added.scale);
    } else if (added.r) {
      v = v + load(static_cast<const float*>(added.r) + to, left);
    }
    v = activated(v, of.activation);
    if (of.form == FP32) {
      store(static_cast<float*>(y) + to, v, left);
    } else {
      const I codes = codes_of(v, all(of.inverse), all(of.fraction), all(of.whole), all(-128.0f), all(127.0f));
      store(static_cast<int8_t*>(y) + to, codes, left);
    }
  }
}

}  // namespace

EXPORT const int64_t adder_across = ACROSS;

EXPORT void adder_codes(
    const AdderCodes* fixed, const int8_t* x, void* y, const void* residual, const float* residual_scale,
    const float* residual_zero, int threads) {
  const AdderCodes& of = *fixed;
  const Added added{residual, residual_scale, residual_zero};
  const int64_t pixels = of.batch * of.p * of.q, tiles = (pixels + TILE - 1) / TILE, pitch = of.words * WORD;
  const int64_t blocks = (of.outputs + BLOCK - 1) / BLOCK;
  // with few tiles threads share out the channels of each, too
  const int64_t shares = tiles >= 4 * threads ? 1 : std::min<int64_t>(threads, blocks);
  in_parallel(threads, [&](int64_t index, int64_t count) {
    std::vector<uint8_t> words(size_t(TILE * pitch), UNSIGNED);
    int32_t sums[ROWS * BLOCK + LANES];  // whole vectors are read
    for (int64_t i = tiles * shares * index / count; i < tiles * shares * (index + 1) / count; ++i) {
      const int64_t first = i / shares * TILE, share = i % shares, n = std::min(TILE, pixels - first);
      for (int64_t j = 0; j < n; ++j) gather(of, x, first + j, words.data() + j * pitch);
      for (int64_t block = blocks * share / shares; block < blocks * (share + 1) / shares; ++block) {
        const int64_t channel = block * BLOCK, exist = std::min<int64_t>(BLOCK, of.outputs - channel);
        const int64_t vectors = (exist + ACROSS - 1) / ACROSS;
        const uint8_t* w = of.weight + channel * pitch;
        for (int64_t j = 0; j < n; j += ROWS) {
          const uint8_t* from = words.data() + j * pitch;
          if (vectors == 1) add_words<1>(of, from, pitch, w, sums);
          if (vectors == 2) add_words<2>(of, from, pitch, w, sums);
#if !defined(__AVX2__) || defined(__AVX512BW__)
          if (vectors == 3) add_words<3>(of, from, pitch, w, sums);
          if (vectors == 4) add_words<4>(of, from, pitch, w, sums);
#endif
          for (int64_t row = 0; row < std::min<int64_t>(ROWS, n - j); ++row) {
            finish(of, added, sums + row * BLOCK, channel, exist, (first + j + row) * of.outputs + channel, y);
          }
        }
      }
    }
  });
}

// Compared with the structs of Python by `load_functions`.
EXPORT const int64_t sizeof_AdderCodes = sizeof(AdderCodes);
