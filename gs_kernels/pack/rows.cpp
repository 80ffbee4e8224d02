// Dequantizes rows of a packed weight in the canonical layout (layouts.py).
#include "parallel.h"

namespace {

template <int BITS>
void row_of(const uint8_t* codes, const float* scale, const float* zero, int64_t k, int64_t group, float* out) {
  constexpr int PER = 8 / BITS, LAST = (1 << BITS) - 1;
  for (int64_t first = 0; first < k; first += group, ++scale, ++zero) {
    const float s = *scale, z = *zero;
    for (int64_t i = first; i < first + group; ++i) {
      out[i] = ((float)(codes[i / PER] >> i % PER * BITS & LAST) - z) * s;
    }
  }
}

}  // namespace

// out fp32 `[count, k]`: rows ids `[count]` of codes, `bytes` each, with scale and zero `[count, k / group]` of their own.
EXPORT void packed_rows(
    const int64_t* ids, int64_t count, const uint8_t* codes, int64_t bytes, const float* scale, const float* zero,
    int64_t k, int64_t group, int bits, float* out, int threads) {
  const auto run = bits == 1 ? row_of<1> : bits == 2 ? row_of<2> : bits == 4 ? row_of<4> : row_of<8>;
  const int64_t groups = k / group;
  parallel_for(threads, count, [&](int64_t i) {
    run(codes + ids[i] * bytes, scale + i * groups, zero + i * groups, k, group, out + i * k);
  });
}
