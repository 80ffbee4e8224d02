// Quantizes rows to int8 with a scale each, in the order of operations of ref.py: a row is read for its range, and then, from
// the cache, for its codes.
#include "floats.h"
#include "parallel.h"

using namespace lanes;

namespace {

constexpr float LEVELS = 127, SCALE_FLOOR = 0x1p-100f, SCALE_MAX = 3.40282347e+38f;

template <class T>
float scale_of(const T* x, int64_t k) {
  Range range;
  for (int64_t i = 0; i < k; i += LANES) range.add(load_floats(x + i, k - i), k - i);
  const float low = smaller(smallest(range.low()), 0.0f), high = larger(largest(range.high()), 0.0f);
  const float most = larger(-low, high), span = most + most;
  if (span == 0) return 1;
  const float step = span / (2 * LEVELS);
  return step < SCALE_FLOOR ? SCALE_FLOOR : step;
}

}  // namespace

// codes int8 `[m, k]` and scale `[m]` of rows that lie `apart`; floats: of x, see `of_kind`.
EXPORT void quantize_rows(
    const void* from, int64_t m, int64_t k, int64_t apart, int floats, int8_t* codes, float* scale, int threads) {
  of_kind(floats, [&](auto* kind) {
    const auto* x = typed(kind, from);
    parallel_for(threads, m, [&](int64_t row) {
      const auto* near = x + row * apart;
      const float s = scale_of(near, k);
      scale[row] = s;
      const F inverse = all(s <= SCALE_MAX ? 1 / s : NAN), least = all(-LEVELS), largest = all(LEVELS);
      for (int64_t i = 0; i < k; i += LANES) {
        const F level = round(load_floats(near + i, k - i) * inverse);
        store(codes + row * k + i, whole(min(max(level, least), largest)), k - i);
      }
    });
  });
}
