// Passes over 8-bit codes on a CPU: from floats to codes, and sums of codes to codes or fp32, in the order of ref.py.
#include <algorithm>

#include "parallel.h"
#include "simd.h"

using namespace lanes;

namespace {

constexpr int64_t PIECE = 1 << 12;  // elements that a thread takes at once

}  // namespace

// Of a grid: from `least` to `largest`; `moved`: what is added to them to fit int8.
struct Codes {
  int64_t count;
  float inverse, fraction, whole, least, largest;
  int32_t moved;
};

// y: codes of x on a grid.
EXPORT void to_codes(const Codes* of, const float* x, int8_t* y, int threads) {
  const Codes grid = *of;
  parallel_for(threads, (grid.count + PIECE - 1) / PIECE, [&](int64_t piece) {
    const int64_t start = piece * PIECE, end = std::min(start + PIECE, grid.count);
    const F inverse = all(grid.inverse), fraction = all(grid.fraction), whole = all(grid.whole);
    const F least = all(grid.least), largest = all(grid.largest);
    const I moved = all(grid.moved);
    for (int64_t i = start; i < end; i += LANES) {
      const int64_t n = end - i;
      store(y + i, codes_of(load(x + i, n), inverse, fraction, whole, least, largest) + moved, n);
    }
  });
}

struct Sum {
  int64_t count;
  float a_scale, a_zero, b_scale, b_zero, inverse, fraction, whole, least, largest;
  int32_t activation, codes;
};

namespace {

// Elements start..end of y.
void sum_piece(const Sum sum, const int8_t* a, const int8_t* b, void* y, int64_t start, int64_t end) {
  const F a_scale = all(sum.a_scale), a_zero = all(sum.a_zero), b_scale = all(sum.b_scale), b_zero = all(sum.b_zero);
  const F inverse = all(sum.inverse), fraction = all(sum.fraction), whole = all(sum.whole);
  const F least = all(sum.least), largest = all(sum.largest);
  for (int64_t i = start; i < end; i += LANES) {
    const int64_t n = end - i;
    F v = (in_fp32(load(a + i, n)) - a_zero) * a_scale;
    if (b) v = v + (in_fp32(load(b + i, n)) - b_zero) * b_scale;
    v = activated(v, sum.activation);
    if (sum.codes) {
      store(static_cast<int8_t*>(y) + i, codes_of(v, inverse, fraction, whole, least, largest), n);
    } else {
      store(static_cast<float*>(y) + i, v, n);
    }
  }
}

// Calls piece(start, end) for all of `count` elements.
template <class Piece>
void in_pieces(int64_t count, int threads, const Piece& piece) {
  parallel_for(threads, (count + PIECE - 1) / PIECE, [&](int64_t i) {
    piece(i * PIECE, std::min((i + 1) * PIECE, count));
  });
}

}  // namespace

// y: the real values of codes, added, activated, and in fp32 or as codes on a grid. b may be null.
EXPORT void sum_codes(const Sum* of, const int8_t* a, const int8_t* b, void* y, int threads) {
  in_pieces(of->count, threads, [&](int64_t start, int64_t end) { sum_piece(*of, a, b, y, start, end); });
}

// Does sum_codes(of, a, b, y) and sum_codes(next, y, null, z) in one pass, while pieces of y are in a cache. Returns false,
// and does nothing, where z lies over what other pieces are still to read.
EXPORT bool sum_codes_twice(
    const Sum* of, const Sum* next, const int8_t* a, const int8_t* b, int8_t* y, void* z, int threads) {
  const auto* first = static_cast<const int8_t*>(z);
  const int64_t count = of->count, nbytes = count * (next->codes ? 1 : sizeof(float));
  const auto is_apart = [&](const int8_t* x) {
    return !x || (next->codes && x == first) || first + nbytes <= x || x + count <= first;
  };
  if (!of->codes || next->count != count || !is_apart(a) || !is_apart(b)) return false;
  in_pieces(count, threads, [&](int64_t start, int64_t end) {
    sum_piece(*of, a, b, y, start, end);
    sum_piece(*next, y, nullptr, z, start, end);
  });
  return true;
}

struct Image {
  int64_t batch, channels, pixels;
};

namespace {

// CHANNELS 0: as many as there are.
template <int CHANNELS>
void interleave(const int8_t* x, int8_t* y, int64_t channels, int64_t all_pixels, int64_t pixels) {
  const int64_t step = CHANNELS ? CHANNELS : channels;
  for (int64_t i = 0; i < pixels; ++i) {
    for (int64_t c = 0; c < step; ++c) y[i * step + c] = x[c * all_pixels + i];
  }
}

}  // namespace

// Codes `[batch, channels, pixels]` to `[batch, pixels, channels]`.
EXPORT void lay_channels_last(const Image* of, const int8_t* x, int8_t* y, int threads) {
  const Image im = *of;
  const int64_t rows = std::max(int64_t(1), PIECE / im.channels), pieces = (im.pixels + rows - 1) / rows;
  parallel_for(threads, im.batch * pieces, [&](int64_t i) {
    const int64_t start = i % pieces * rows, count = std::min(rows, im.pixels - start);
    const int8_t* from = x + i / pieces * im.channels * im.pixels + start;
    int8_t* to = y + (i / pieces * im.pixels + start) * im.channels;
    const auto copy = im.channels == 3 ? interleave<3> : im.channels == 4 ? interleave<4> : interleave<0>;
    copy(from, to, im.channels, im.pixels, count);
  });
}

// Compared with the structs of Python by `load_functions`.
EXPORT const int64_t sizeof_Codes = sizeof(Codes);
EXPORT const int64_t sizeof_Sum = sizeof(Sum);
EXPORT const int64_t sizeof_Image = sizeof(Image);
