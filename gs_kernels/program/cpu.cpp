// Calls kernels one after another, in one call from Python: what Python takes between them is most of a small network's
// time.
#include "parallel.h"

struct Convolution;
struct Codes;
struct Sum;
struct Image;
struct AdderCodes;

extern "C" {
void convolve_int8(
    const Convolution*, const int8_t*, const float*, int64_t, void*, const void*, const float*, const float*, int);
void depthwise_int8(
    const Convolution*, const int8_t*, const float*, int64_t, void*, const void*, const float*, const float*, int);
void to_codes(const Codes*, const float*, int8_t*, int);
void sum_codes(const Sum*, const int8_t*, const int8_t*, void*, int);
bool sum_codes_twice(const Sum*, const Sum*, const int8_t*, const int8_t*, int8_t*, void*, int);
void lay_channels_last(const Image*, const int8_t*, int8_t*, int);
void adder_codes(const AdderCodes*, const int8_t*, void*, const void*, const float*, const float*, int);
}

namespace {

enum Kernel { CONVOLVE, DEPTHWISE, QUANTIZE, ADD, CHANNELS_LAST, COMPARE };

}  // namespace

// x, y, other: where the operands are: bytes from the start of the scratch memory; below 0, -1 - i, tensor i from
// outside; NONE: there is none.
struct Call {
  int64_t kernel;
  const void* fixed;
  int64_t x, y, other;
  const float *x_scale, *scale, *zero;
  int64_t parallel;
};

EXPORT const int64_t NONE = INT64_MIN;

EXPORT void run_calls(const Call* calls, int64_t count, char* scratch, char* const* tensors, int threads) {
  const auto at = [&](int64_t place) -> char* {
    return place == NONE ? nullptr : place < 0 ? tensors[-1 - place] : scratch + place;
  };
  for (const Call* call = calls; call < calls + count; ++call) {
    const auto* image = static_cast<const Convolution*>(call->fixed);
    const auto* x = reinterpret_cast<const int8_t*>(at(call->x));
    const auto* other = reinterpret_cast<const int8_t*>(at(call->other));
    auto* y = reinterpret_cast<int8_t*>(at(call->y));
    const int of = call->parallel ? threads : 1;
    switch (call->kernel) {
      case CONVOLVE:
        convolve_int8(image, x, call->x_scale, 0, y, other, call->scale, call->zero, of);
        break;
      case DEPTHWISE:
        depthwise_int8(image, x, call->x_scale, 0, y, other, call->scale, call->zero, of);
        break;
      case QUANTIZE:
        to_codes(static_cast<const Codes*>(call->fixed), reinterpret_cast<const float*>(x), y, of);
        break;
      case ADD: {
        const auto* sum = static_cast<const Sum*>(call->fixed);
        const Call* next = call + 1;  // the same values for another reader, on its grid
        if (next < calls + count && next->kernel == ADD && next->x == call->y && next->other == NONE &&
            sum_codes_twice(sum, static_cast<const Sum*>(next->fixed), x, other, y, at(next->y), of)) {
          ++call;
        } else {
          sum_codes(sum, x, other, y, of);
        }
        break;
      }
      case CHANNELS_LAST:
        lay_channels_last(static_cast<const Image*>(call->fixed), x, y, of);
        break;
      case COMPARE:
        adder_codes(static_cast<const AdderCodes*>(call->fixed), x, y, other, call->scale, call->zero, of);
        break;
    }
  }
}

// Compared with the struct of Python by `load_functions`.
EXPORT const int64_t sizeof_Call = sizeof(Call);
