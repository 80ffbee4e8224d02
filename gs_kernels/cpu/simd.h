// Sixteen lanes of fp32 (F) and of int32 (I): a register of AVX-512, two of AVX2, or four of 16 bytes.
// Products and sums are not contracted: only `fma` is fused. max and min give their second operand where one is NaN.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define LANE_FN static inline __attribute__((always_inline))
#define LANE_FN_OF inline __attribute__((always_inline))  // in a class

namespace {
namespace lanes {

constexpr int64_t LANES = 16;
#ifdef __AVX512F__
constexpr int WIDE = 8;  // of F or I that fit the registers beside others
#else
constexpr int WIDE = 4;
#endif

// Products of whole numbers. pairs: 2 products of 16 bits each; add_pairs adds them to sums, at once where an instruction
// does (LANES_ADD_PAIRS). short_pairs: 2 of a, unsigned, and b, signed, bytes each, in
// 16 bits, where they must fit (AVX2 and later: LANES_HAVE_SHORTS). add_quads: 4 of bytes each, added to sums; a is
// unsigned on x86 and signed on ARM (LANES_HAVE_QUADS).
#ifdef __AVX2__
#define LANES_HAVE_SHORTS
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)

struct F { __m512 v; };
struct I { __m512i v; };

LANE_FN __mmask16 first(int64_t n) { return n >= LANES ? 0xffff : (__mmask16)((1u << n) - 1); }
LANE_FN F load(const float* p) { return {_mm512_loadu_ps(p)}; }
LANE_FN F load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
LANE_FN void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
// a store by a mask takes many cycles on some CPUs
LANE_FN void store(float* p, F a, int64_t n) {
  if (n >= LANES) return store(p, a);
  _mm512_mask_storeu_ps(p, first(n), a.v);
}
LANE_FN F all(float a) { return {_mm512_set1_ps(a)}; }
LANE_FN F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
LANE_FN F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
LANE_FN F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
LANE_FN F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
LANE_FN F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
LANE_FN F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
LANE_FN F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
LANE_FN F absolute(F a) { return {_mm512_abs_ps(a.v)}; }
LANE_FN F limited(F a, F most) { return {_mm512_range_ps(a.v, most.v, 2)}; }  // to [-most, most]; NaN to one of them
LANE_FN F round(F a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
LANE_FN F in_fp32(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
LANE_FN I whole(F a) { return {_mm512_cvttps_epi32(a.v)}; }
LANE_FN I nearest(F a) { return {_mm512_cvtps_epi32(a.v)}; }
LANE_FN I load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
LANE_FN I load(const int32_t* p, int64_t n) { return {_mm512_maskz_loadu_epi32(first(n), p)}; }
LANE_FN void store(int32_t* p, I a) { _mm512_storeu_si512(p, a.v); }
LANE_FN void store(int32_t* p, I a, int64_t n) { _mm512_mask_storeu_epi32(p, first(n), a.v); }
LANE_FN I load(const int8_t* p) { return {_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))}; }
LANE_FN I load(const int8_t* p, int64_t n) { return {_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p))}; }
LANE_FN I load(const uint8_t* p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))}; }
LANE_FN I load(const uint8_t* p, int64_t n) { return {_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(n), p))}; }
LANE_FN void store(int8_t* p, I a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a.v)); }
LANE_FN void store(int8_t* p, I a, int64_t n) {
  if (n >= LANES) return store(p, a);
  _mm_mask_storeu_epi8(p, first(n), _mm512_cvtepi32_epi8(a.v));
}
LANE_FN void store(uint8_t* p, I a, int64_t n) { store((int8_t*)p, a, n); }
LANE_FN void store(uint16_t* p, I a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(a.v)); }
LANE_FN F load_fp16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
LANE_FN void store_fp16(uint16_t* p, F a) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
LANE_FN I all(int32_t a) { return {_mm512_set1_epi32(a)}; }
LANE_FN I operator+(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
LANE_FN I operator-(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
LANE_FN I operator*(I a, I b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
LANE_FN I operator&(I a, I b) { return {_mm512_and_si512(a.v, b.v)}; }
LANE_FN I operator|(I a, I b) { return {_mm512_or_si512(a.v, b.v)}; }
LANE_FN I left(I a, int n) { return {_mm512_slli_epi32(a.v, n)}; }
LANE_FN I right(I a, int n) { return {_mm512_srli_epi32(a.v, n)}; }
LANE_FN I quotient(I a, int n) { return {_mm512_srai_epi32(a.v, n)}; }
LANE_FN I pairs(I a, I b) { return {_mm512_madd_epi16(a.v, b.v)}; }
#define LANES_LOOK_UP
LANE_FN F look_up(F values, I at) { return {_mm512_permutexvar_ps(at.v, values.v)}; }  // by the lowest 4 bits
LANE_FN I short_pairs(I a, I b) { return {_mm512_maddubs_epi16(a.v, b.v)}; }
LANE_FN I add_shorts(I a, I b) { return {_mm512_add_epi16(a.v, b.v)}; }
#ifdef __AVX512VNNI__
LANE_FN I add_quads(I sums, I a, I b) { return {_mm512_dpbusd_epi32(sums.v, a.v, b.v)}; }
LANE_FN I add_pairs(I sums, I a, I b) { return {_mm512_dpwssd_epi32(sums.v, a.v, b.v)}; }
#define LANES_ADD_PAIRS
#define LANES_HAVE_QUADS
#endif
LANE_FN I bits_of(F a) { return {_mm512_castps_si512(a.v)}; }
LANE_FN F of_bits(I a) { return {_mm512_castsi512_ps(a.v)}; }
LANE_FN float sum(F a) { return _mm512_reduce_add_ps(a.v); }
LANE_FN F load_bf16(const uint16_t* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
LANE_FN F where_between(F a, F low, F high, F in, F out) {  // low <= a <= high ? in : out
  const __mmask16 inside = _mm512_cmp_ps_mask(a.v, low.v, _CMP_GE_OQ) & _mm512_cmp_ps_mask(a.v, high.v, _CMP_LE_OQ);
  return {_mm512_mask_mov_ps(out.v, inside, in.v)};
}
LANE_FN F where_equal(F a, F b, F in, F out) { return {_mm512_mask_mov_ps(out.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ), in.v)}; }
LANE_FN I where_nan(F a, I nan, I b) { return {_mm512_mask_mov_epi32(b.v, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), nan.v)}; }

#elif defined(__AVX2__) && defined(__FMA__)

struct F { __m256 a, b; };
struct I { __m256i a, b; };

LANE_FN F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
LANE_FN void store(float* p, F x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
LANE_FN F load(const float* p, int64_t n) {
  if (n >= LANES) return load(p);
  const __m256i at = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), count = _mm256_set1_epi32((int)n);
  const __m256i a = _mm256_cmpgt_epi32(count, at), b = _mm256_cmpgt_epi32(count, _mm256_add_epi32(at, _mm256_set1_epi32(8)));
  return {_mm256_maskload_ps(p, a), _mm256_maskload_ps(p + 8, b)};
}
// by halves: a store by a mask takes many cycles on some CPUs
LANE_FN void store(float* p, F x, int64_t n) {
  if (n >= LANES) return store(p, x);
  if (n & 8) _mm256_storeu_ps(p, x.a), p += 8, x.a = x.b;
  __m128 four = _mm256_castps256_ps128(x.a);
  if (n & 4) _mm_storeu_ps(p, four), p += 4, four = _mm256_extractf128_ps(x.a, 1);
  if (n & 2) _mm_storel_pi((__m64*)p, four), p += 2, four = _mm_movehl_ps(four, four);
  if (n & 1) _mm_store_ss(p, four);
}
LANE_FN F all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
LANE_FN F operator+(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
LANE_FN F operator-(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
LANE_FN F operator*(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
LANE_FN F operator/(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
LANE_FN F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
LANE_FN F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
LANE_FN F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
LANE_FN F absolute(F x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
LANE_FN F round(F x) {
  constexpr int how = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, how), _mm256_round_ps(x.b, how)};
}
LANE_FN F in_fp32(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
LANE_FN I whole(F x) { return {_mm256_cvttps_epi32(x.a), _mm256_cvttps_epi32(x.b)}; }
LANE_FN I nearest(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
LANE_FN I load(const int32_t* p) { return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8))}; }
LANE_FN void store(int32_t* p, I x) { _mm256_storeu_si256((__m256i*)p, x.a), _mm256_storeu_si256((__m256i*)(p + 8), x.b); }
LANE_FN I load(const int8_t* p) {
  const __m128i x = _mm_loadu_si128((const __m128i*)p);
  return {_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_unpackhi_epi64(x, x))};
}
LANE_FN I load(const uint8_t* p) {
  const __m128i x = _mm_loadu_si128((const __m128i*)p);
  return {_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_unpackhi_epi64(x, x))};
}
LANE_FN void store(int8_t* p, I x) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
LANE_FN void store(uint8_t* p, I x) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
LANE_FN void store(uint16_t* p, I x) {
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(_mm256_packus_epi32(x.a, x.b), 0xd8));
}
LANE_FN F load_fp16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
LANE_FN void store_fp16(uint16_t* p, F x) {
  constexpr int how = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.a, how)), _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(x.b, how));
}
LANE_FN I all(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
LANE_FN I operator+(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
LANE_FN I operator-(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
LANE_FN I operator*(I x, I y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
LANE_FN I operator&(I x, I y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
LANE_FN I operator|(I x, I y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
LANE_FN I left(I x, int n) { return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)}; }
LANE_FN I right(I x, int n) { return {_mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n)}; }
LANE_FN I quotient(I x, int n) { return {_mm256_srai_epi32(x.a, n), _mm256_srai_epi32(x.b, n)}; }
LANE_FN I pairs(I x, I y) { return {_mm256_madd_epi16(x.a, y.a), _mm256_madd_epi16(x.b, y.b)}; }
LANE_FN I short_pairs(I x, I y) { return {_mm256_maddubs_epi16(x.a, y.a), _mm256_maddubs_epi16(x.b, y.b)}; }
LANE_FN I add_shorts(I x, I y) { return {_mm256_add_epi16(x.a, y.a), _mm256_add_epi16(x.b, y.b)}; }
#ifdef __AVXVNNI__
LANE_FN I add_quads(I sums, I x, I y) {
  return {_mm256_dpbusd_avx_epi32(sums.a, x.a, y.a), _mm256_dpbusd_avx_epi32(sums.b, x.b, y.b)};
}
LANE_FN I add_pairs(I sums, I x, I y) {
  return {_mm256_dpwssd_avx_epi32(sums.a, x.a, y.a), _mm256_dpwssd_avx_epi32(sums.b, x.b, y.b)};
}
#define LANES_ADD_PAIRS
#define LANES_HAVE_QUADS
#endif
LANE_FN I bits_of(F x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
LANE_FN F of_bits(I x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
LANE_FN F load_bf16(const uint16_t* p) {
  const __m128i a = _mm_loadu_si128((const __m128i*)p), b = _mm_loadu_si128((const __m128i*)(p + 8));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(b), 16))};
}
LANE_FN float sum(F x) {
  const __m256 eight = _mm256_add_ps(x.a, x.b);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
LANE_FN __m256 where_between(__m256 v, __m256 low, __m256 high, __m256 in, __m256 out) {
  return _mm256_blendv_ps(out, in, _mm256_and_ps(_mm256_cmp_ps(v, low, _CMP_GE_OQ), _mm256_cmp_ps(v, high, _CMP_LE_OQ)));
}
LANE_FN F where_between(F x, F low, F high, F in, F out) {  // low <= x <= high ? in : out
  return {where_between(x.a, low.a, high.a, in.a, out.a), where_between(x.b, low.b, high.b, in.b, out.b)};
}
LANE_FN F where_equal(F x, F y, F in, F out) {
  return {_mm256_blendv_ps(out.a, in.a, _mm256_cmp_ps(x.a, y.a, _CMP_EQ_OQ)),
          _mm256_blendv_ps(out.b, in.b, _mm256_cmp_ps(x.b, y.b, _CMP_EQ_OQ))};
}
LANE_FN I where_nan(F x, I nan, I y) {
  const __m256i a = _mm256_castps_si256(_mm256_cmp_ps(x.a, x.a, _CMP_UNORD_Q));
  const __m256i b = _mm256_castps_si256(_mm256_cmp_ps(x.b, x.b, _CMP_UNORD_Q));
  return {_mm256_blendv_epi8(y.a, nan.a, a), _mm256_blendv_epi8(y.b, nan.b, b)};
}
#define LANES_BY_COPIES

#else

// registers of 16 bytes, as x86-64 and ARM all have them, through the compiler's own vectors
typedef float f4 __attribute__((vector_size(16)));
typedef int32_t i4 __attribute__((vector_size(16)));
typedef uint32_t u4 __attribute__((vector_size(16)));
struct F { f4 v[4]; };
struct I { i4 v[4]; };

#define EACH(type, expression) { type y; for (int i = 0; i < 4; ++i) y.v[i] = (expression); return y; }
#define OF_EACH(type, expression) { type y; for (int i = 0; i < LANES; ++i) y.v[i / 4][i % 4] = (expression); return y; }
LANE_FN F load(const float* p) { F y; std::memcpy(y.v, p, sizeof(y.v)); return y; }
LANE_FN void store(float* p, F a) { std::memcpy(p, a.v, sizeof(a.v)); }
LANE_FN F all(float a) EACH(F, (f4{a, a, a, a}))
LANE_FN F operator+(F a, F b) EACH(F, a.v[i] + b.v[i])
LANE_FN F operator-(F a, F b) EACH(F, a.v[i] - b.v[i])
LANE_FN F operator*(F a, F b) EACH(F, a.v[i] * b.v[i])
LANE_FN F operator/(F a, F b) EACH(F, a.v[i] / b.v[i])
LANE_FN F fma(F a, F b, F c) EACH(F, a.v[i] * b.v[i] + c.v[i])
LANE_FN F max(F a, F b) EACH(F, a.v[i] > b.v[i] ? a.v[i] : b.v[i])
LANE_FN F min(F a, F b) EACH(F, a.v[i] < b.v[i] ? a.v[i] : b.v[i])
LANE_FN F absolute(F a) EACH(F, (f4)((i4)a.v[i] & i4{INT32_MAX, INT32_MAX, INT32_MAX, INT32_MAX}))
LANE_FN F round(F a) {
  // adding and taking off 1.5 * 2**23 rounds to even; what is larger is whole, or is rounded by itself
  F y;
  for (int i = 0; i < 4; ++i) {
    const f4 v = a.v[i], large = f4{4194304.0f, 4194304.0f, 4194304.0f, 4194304.0f}, magic = large + large + large;
    y.v[i] = (v + magic) - magic;
    for (int k = 0; k < 4; ++k) {
      if (!(v[k] > -large[k] && v[k] < large[k])) y.v[i][k] = std::nearbyintf(v[k]);
    }
  }
  return y;
}
LANE_FN F in_fp32(I a) EACH(F, __builtin_convertvector(a.v[i], f4))
LANE_FN I whole(F a) EACH(I, __builtin_convertvector(a.v[i], i4))
#if defined(__SSE2__)
LANE_FN I nearest(F a) EACH(I, (i4)_mm_cvtps_epi32((__m128)a.v[i]))
#elif defined(__aarch64__)
LANE_FN I nearest(F a) EACH(I, (i4)vcvtnq_s32_f32((float32x4_t)a.v[i]))
#else
LANE_FN I nearest(F a) { return whole(round(a)); }
#endif
LANE_FN I load(const int32_t* p) { I y; std::memcpy(y.v, p, sizeof(y.v)); return y; }
LANE_FN void store(int32_t* p, I a) { std::memcpy(p, a.v, sizeof(a.v)); }
LANE_FN I load(const int8_t* p) OF_EACH(I, p[i])
LANE_FN I load(const uint8_t* p) OF_EACH(I, p[i])
LANE_FN void store(int8_t* p, I a) { for (int i = 0; i < LANES; ++i) p[i] = (int8_t)a.v[i / 4][i % 4]; }
LANE_FN void store(uint8_t* p, I a) { for (int i = 0; i < LANES; ++i) p[i] = (uint8_t)a.v[i / 4][i % 4]; }
LANE_FN void store(uint16_t* p, I a) { for (int i = 0; i < LANES; ++i) p[i] = (uint16_t)a.v[i / 4][i % 4]; }
inline float from_fp16(uint16_t half) {
  const uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 0x3ff;
  uint32_t bits = sign | (exponent + 112) << 23 | fraction << 13;
  if (exponent == 31) bits = sign | 0x7f800000 | fraction << 13;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return exponent ? value : std::copysign(fraction * 0x1p-24f, value);
}
inline uint16_t to_fp16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint16_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x47800000) return sign | 0x7c00;
  if (bits >= 0x38800000) return sign | (uint16_t)((bits + 0xfff + (bits >> 13 & 1) - 0x38000000) >> 13);
  value = std::fabs(value) + 0.5f;  // where fp32 has the step of the smallest fp16
  std::memcpy(&bits, &value, sizeof(bits));
  return sign | (uint16_t)(bits - 0x3f000000);
}
LANE_FN F load_fp16(const uint16_t* p) OF_EACH(F, from_fp16(p[i]))
LANE_FN void store_fp16(uint16_t* p, F a) { for (int i = 0; i < LANES; ++i) p[i] = to_fp16(a.v[i / 4][i % 4]); }
LANE_FN I all(int32_t a) EACH(I, (i4{a, a, a, a}))
LANE_FN I operator+(I a, I b) EACH(I, a.v[i] + b.v[i])
LANE_FN I operator-(I a, I b) EACH(I, a.v[i] - b.v[i])
LANE_FN I operator*(I a, I b) EACH(I, a.v[i] * b.v[i])
LANE_FN I operator&(I a, I b) EACH(I, a.v[i] & b.v[i])
LANE_FN I operator|(I a, I b) EACH(I, a.v[i] | b.v[i])
LANE_FN I left(I a, int n) EACH(I, (i4)((u4)a.v[i] << n))
LANE_FN I right(I a, int n) EACH(I, (i4)((u4)a.v[i] >> n))
LANE_FN I quotient(I a, int n) EACH(I, a.v[i] >> n)
#ifdef __SSE2__
LANE_FN I pairs(I a, I b) EACH(I, (i4)_mm_madd_epi16((__m128i)a.v[i], (__m128i)b.v[i]))
#else
LANE_FN I pairs(I a, I b) EACH(I, (a.v[i] << 16 >> 16) * (b.v[i] << 16 >> 16) + (a.v[i] >> 16) * (b.v[i] >> 16))
#endif
LANE_FN F load_bf16(const uint16_t* p) {
  uint32_t bits[LANES];
  for (int i = 0; i < LANES; ++i) bits[i] = (uint32_t)p[i] << 16;
  F y;
  std::memcpy(y.v, bits, sizeof(y.v));
  return y;
}
LANE_FN float sum(F a) {
  const f4 four = (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
  return (four[0] + four[2]) + (four[1] + four[3]);
}
#ifdef __ARM_FEATURE_DOTPROD
LANE_FN I add_quads(I sums, I a, I b) EACH(I, (i4)vdotq_s32((int32x4_t)sums.v[i], (int8x16_t)a.v[i], (int8x16_t)b.v[i]))
#define LANES_HAVE_QUADS
#endif
LANE_FN I bits_of(F a) { I y; std::memcpy(y.v, a.v, sizeof(y.v)); return y; }
LANE_FN F of_bits(I a) { F y; std::memcpy(y.v, a.v, sizeof(y.v)); return y; }
LANE_FN F where_between(F a, F low, F high, F in, F out)  // low <= a <= high ? in : out
  EACH(F, (a.v[i] >= low.v[i]) & (a.v[i] <= high.v[i]) ? in.v[i] : out.v[i])
LANE_FN F where_equal(F a, F b, F in, F out) EACH(F, a.v[i] == b.v[i] ? in.v[i] : out.v[i])
LANE_FN I where_nan(F a, I nan, I b) EACH(I, a.v[i] != a.v[i] ? nan.v[i] : b.v[i])
#define LANES_BY_COPIES

#endif

#ifndef LANES_ADD_PAIRS
LANE_FN I add_pairs(I sums, I a, I b) {
  sums = sums + pairs(a, b);
  // now: GCC adds up products of several steps first otherwise, more than there are registers for
#if defined(__AVX512F__)
  asm("" : "+v"(sums.v));
#elif defined(__AVX2__)
  asm("" : "+x"(sums.a), "+x"(sums.b));
#endif
  return sums;
}
#endif

#ifndef __AVX512F__
LANE_FN F limited(F a, F most) { return min(most, max(all(0.0f) - most, a)); }
#endif

#ifdef LANES_BY_COPIES
template <class V, class T>
LANE_FN V load_first(const T* p, int64_t n) {
  if (n >= LANES) return load(p);
  T near[LANES] = {};
  std::memcpy(near, p, n * sizeof(T));
  return load(near);
}
template <class V, class T>
LANE_FN void store_first(T* p, V a, int64_t n) {
  if (n >= LANES) return store(p, a);
  T near[LANES];
  store(near, a);
  std::memcpy(p, near, n * sizeof(T));
}
#ifndef __AVX2__
LANE_FN F load(const float* p, int64_t n) { return load_first<F>(p, n); }
LANE_FN void store(float* p, F a, int64_t n) { store_first(p, a, n); }
#endif
LANE_FN I load(const int32_t* p, int64_t n) { return load_first<I>(p, n); }
LANE_FN I load(const int8_t* p, int64_t n) { return load_first<I>(p, n); }
LANE_FN I load(const uint8_t* p, int64_t n) { return load_first<I>(p, n); }
LANE_FN void store(int32_t* p, I a, int64_t n) { store_first(p, a, n); }
LANE_FN void store(int8_t* p, I a, int64_t n) { store_first(p, a, n); }
LANE_FN void store(uint8_t* p, I a, int64_t n) { store_first(p, a, n); }
#endif

// The bits of bf16, rounded to nearest even; one NaN for all.
LANE_FN I rounded_bf16(F v) {
  const I bits = bits_of(v);
  const I even = bits + all(0x7fff) + (right(bits, 16) & all(1));
  return where_nan(v, all(0x7fc0), right(even, 16));
}

template <int... I, class Body>
LANE_FN void each_of(std::integer_sequence<int, I...>, const Body& body) {
  (body(std::integral_constant<int, I>{}), ...);
}

// Calls body(0), body(1), ... body(N - 1), written out with constants: elements of an array so become registers. Bodies
// are lambdas marked INLINE.
template <int N, class Body>
LANE_FN void each(const Body& body) {
  each_of(std::make_integer_sequence<int, N>{}, body);
}
#define INLINE __attribute__((always_inline))

// v * min(max(v + 3, 0), 6) / 6, by the inverse of 6 as everywhere (activations.py). NaN stays.
LANE_FN F hardswish(F v) { return v * min(all(6.0f), max(all(0.0f), v + all(3.0f))) * all(1.0f / 6.0f); }

// The activation that activations.py gives a number: 0 none, 1 relu, 2 relu6, 3 hardswish.
LANE_FN F activated(F v, int32_t number) {
  if (number == 3) return hardswish(v);
  if (number) v = max(all(0.0f), v);
  return number == 2 ? min(all(6.0f), v) : v;
}

// Codes of a grid: round(v * inverse + fraction) + whole part of the zero point, between two of them; the least of NaN.
LANE_FN I codes_of(F v, F inverse, F fraction, F whole_zero, F least, F largest) {
  v = round(v * inverse + fraction) + whole_zero;
  return whole(min(max(v, least), largest));
}

}  // namespace lanes
}  // namespace
