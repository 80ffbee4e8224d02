// Elements of tensors in fp32, fp16 or bf16, sixteen at a time, as fp32.
#pragma once
#include "simd.h"

namespace {
namespace lanes {

struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

LANE_FN F wide(const Half* p) { return load_fp16(&p->bits); }
LANE_FN F wide(const Bfloat* p) { return load_bf16(&p->bits); }
LANE_FN void narrow(Half* p, F v) { store_fp16(&p->bits, v); }
LANE_FN void narrow(Bfloat* p, F v) { store(&p->bits, rounded_bf16(v)); }

// The first n of them; the others are 0.
LANE_FN F load_floats(const float* p, int64_t n) { return load(p, n); }
template <class T>
LANE_FN F load_floats(const T* p, int64_t n) {
  if (n >= LANES) return wide(p);
  T near[LANES] = {};
  std::memcpy(near, p, n * sizeof(T));
  return wide(near);
}

LANE_FN void store_floats(float* p, F v, int64_t n) { store(p, v, n); }
template <class T>
LANE_FN void store_floats(T* p, F v, int64_t n) {
  if (n >= LANES) return narrow(p, v);
  T near[LANES];
  narrow(near, v);
  std::memcpy(p, near, n * sizeof(T));
}

// Calls body with a null pointer to the type of elements that `kind` numbers, as FLOATS of library.py does.
template <class Body>
inline void of_kind(int kind, const Body& body) {
  if (kind == 0) body(static_cast<float*>(nullptr));
  if (kind == 1) body(static_cast<Half*>(nullptr));
  if (kind == 2) body(static_cast<Bfloat*>(nullptr));
}
template <class T>
inline T* typed(T*, void* p) {
  return static_cast<T*>(p);
}
template <class T>
inline const T* typed(T*, const void* p) {
  return static_cast<const T*>(p);
}

// The smallest and largest of values, in each lane; NaN where one of them is.
struct Range {
  F least = all(INFINITY), largest = all(-INFINITY);
  I nan = all(0);

  LANE_FN_OF void add(F v) {
    least = min(v, least), largest = max(v, largest);
    nan = where_nan(v, all(1), nan);
  }
  LANE_FN_OF void add(F v, int64_t n) {
    if (n < LANES) {
      float near[LANES];
      store(near, v);
      for (int64_t i = n; i < LANES; ++i) near[i] = near[0];
      v = load(near);
    }
    add(v);
  }
  LANE_FN_OF F low() const { return where_between(in_fp32(nan), all(0.0f), all(0.0f), least, all(NAN)); }
  LANE_FN_OF F high() const { return where_between(in_fp32(nan), all(0.0f), all(0.0f), largest, all(NAN)); }
};

// The smaller and the larger of two numbers; NaN if one of them is.
inline float smaller(float a, float b) { return a < b || a != a ? a : b; }
inline float larger(float a, float b) { return a > b || a != a ? a : b; }

// Of the lanes.
inline float smallest(F v) {
  float near[LANES];
  store(near, v);
  float result = near[0];
  for (int i = 1; i < LANES; ++i) result = smaller(near[i], result);
  return result;
}
inline float largest(F v) {
  float near[LANES];
  store(near, v);
  float result = near[0];
  for (int i = 1; i < LANES; ++i) result = larger(near[i], result);
  return result;
}

}  // namespace lanes
}  // namespace
