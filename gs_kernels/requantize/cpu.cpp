// Passes over 8-bit codes on a CPU: from floats to codes, and sums of codes to codes or fp32, in the order of ref.py.
#include "parallel.h"
#include "simd.h"

using namespace lanes;

namespace {

constexpr int64_t PIECE = 1 << 12;  // elements that a thread takes at once

}  // namespace

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

// Compared with the struct of Python by `load_functions`.
EXPORT const int64_t sizeof_Sum = sizeof(Sum);
