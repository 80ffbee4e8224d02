// Divergence of a student's softmax from its teacher's, and its gradient: each passes once over both rows of logits.
//
// A row is read in blocks that stay in a cache: first for the largest logit, then for the sums of exponentials below the
// largest so far. Those of a block are summed in vectors of fp32, those of a row in fp64, one row in one thread.
#ifndef __AVX2__
#pragma GCC optimize("O3")  // -O1, which the set for every CPU has, keeps vectors in memory: 15 times the time
#endif
#include <algorithm>
#include <cmath>

#include "floats.h"
#include "parallel.h"

using namespace lanes;

namespace {

constexpr int64_t BLOCK = 1024;  // logits
constexpr float LOG2E = 1.44269504088896340736f;
constexpr double LN2 = 0.693147180559945309417;

struct Divergence {
  const void *student, *teacher;  // [rows, classes], classes side by side
  int64_t rows, classes, student_stride, teacher_stride;
  double temperature;
  int32_t student_floats, teacher_floats;  // which, see `of_kind`
  int32_t threads;
};

// 2 ** (d * c), off by at most 1.5e-7 of it and by what d * c loses where no products are fused, 0 from d * c = -126.5
// down: a polynomial of the fraction; the whole part goes into the exponent by the bits of z. least: -127 / c.
LANE_FN F power(F d, F c, F least) {
  const F magic = all(1.5f * (1 << 23) + 127);  // here fp32 has no fraction left, and its last bits are 127
  d = max(least, d);                            // NaN stays
  const F z = fma(d, c, magic), f = fma(d, c, magic - z);
  F p = fma(all(1.535336188319500e-4f), f, all(1.339887440266574e-3f));
  p = fma(p, f, all(9.618437357674640e-3f));
  p = fma(p, f, all(5.550332471162809e-2f));
  p = fma(p, f, all(2.402264791363012e-1f));
  p = fma(p, f, all(6.931472028550421e-1f));
  p = fma(p, f, all(1.0f));
  return p * of_bits(left(bits_of(z), 23));
}

// The first n of sixteen logits; the others are those of classes that are ruled out.
template <class T>
LANE_FN F logits_of(const T* p, int64_t n) {
  if (n == LANES) return load_floats(p, LANES);
  const float index[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return where_between(load(index), all(0.0f), all(float(n - 1)), load_floats(p, n), all(-INFINITY));
}

// Calls body(i, n, k) for each sixteen of `count` logits, the last n of them fewer, k being 0 and 1 in turn.
template <class Body>
LANE_FN void each_vector(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + 2 * LANES <= count; i += 2 * LANES) body(i, LANES, 0), body(i + LANES, LANES, 1);
  if (i + LANES <= count) body(i, LANES, 0), i += LANES;
  if (i < count) body(i, count - i, 1);
}

// The largest that is not NaN.
template <class T>
inline float top_of(const T* x, int64_t count) {
  F top[2] = {all(-INFINITY), all(-INFINITY)};
  each_vector(count, [&](int64_t i, int64_t n, int k) INLINE { top[k] = max(logits_of(x + i, n), top[k]); });
  return largest(max(top[0], top[1]));
}

// The exponentials of some logits of a row, summed.
struct Exponentials {
  float top = -INFINITY;  // the largest logit
  double total = 0;       // of exp((x - origin) / T)

  float origin() const { return top == -INFINITY ? 0.0f : top; }  // -inf less 0 is -inf
  double log_total() const { return std::log(total); }

  // Raises the largest logit; returns what the sum is multiplied with for that.
  double raise(float to, double c) {
    if (to <= top) return 1;
    const double by = top == -INFINITY ? 0.0 : std::exp2((double(top) - to) * c);
    top = to, total *= by;
    return by;
  }
};

template <class S, class T>
void row_of(
    const S* s, const T* t, int64_t classes, float c, float inverse, float* kl, float* student_sum, float* teacher_sum) {
  Exponentials student, teacher;
  double acc = 0;  // of the teacher's exponentials, times how far their logits lie above the student's, less the origins
  const F scale = all(c), least = all(-127.0f / c);
  for (int64_t first = 0; first < classes; first += BLOCK, s += BLOCK, t += BLOCK) {
    const int64_t count = std::min(BLOCK, classes - first);
    const double rise = double(teacher.origin()) - student.origin(), before = teacher.total;
    student.raise(std::max(student.top, top_of(s, count)), c);
    const double by = teacher.raise(std::max(teacher.top, top_of(t, count)), c);
    acc = (acc + before * (rise - (double(teacher.origin()) - student.origin()))) * by;

    const F from_s = all(student.origin()), from_t = all(teacher.origin()), none = all(0.0f);
    F sum_s[2] = {none, none}, sum_t[2] = {none, none}, sum[2] = {none, none};
    each_vector(count, [&](int64_t i, int64_t n, int k) INLINE {
      const F ds = logits_of(s + i, n) - from_s, dt = logits_of(t + i, n) - from_t;
      const F p = power(dt, scale, least);
      sum_s[k] = sum_s[k] + power(ds, scale, least);
      sum_t[k] = sum_t[k] + p;
      sum[k] = fma(p, where_equal(p, none, none, dt - ds), sum[k]);
    });
    student.total += lanes::sum(sum_s[0] + sum_s[1]);
    teacher.total += lanes::sum(sum_t[0] + sum_t[1]);
    acc += lanes::sum(sum[0] + sum[1]);
  }
  const double log_s = student.log_total(), log_t = teacher.log_total();
  *kl = float(acc * (c * LN2) / teacher.total + (log_s - log_t));
  *student_sum = float(student.top * double(inverse) + log_s);
  *teacher_sum = float(teacher.top * double(inverse) + log_t);
}

// ds: of the student's dtype, and this row begins `at` so many elements.
template <class S, class T>
void gradient_of(
    void* ds, int64_t at, const S* s, const T* t, int64_t classes, float inverse, float rate, float student_sum,
    float teacher_sum) {
  S* to = static_cast<S*>(ds) + at;
  const F scale = all(inverse), log2e = all(LOG2E), least = all(-127.0f / LOG2E), by = all(rate);
  const F minus_s = all(-student_sum), minus_t = all(-teacher_sum);
  each_vector(classes, [&](int64_t i, int64_t n, int) INLINE {
    const F q = power(fma(load_floats(s + i, n), scale, minus_s), log2e, least);
    const F p = power(fma(load_floats(t + i, n), scale, minus_t), log2e, least);
    store_floats(to + i, (q - p) * by, n);
  });
}

// Calls body(row, student's logits, teacher's logits) for all rows.
template <class Body>
void each_row(const Divergence& d, const Body& body) {
  of_kind(d.student_floats, [&](auto* s) {
    of_kind(d.teacher_floats, [&](auto* t) {
      const auto* student = typed(s, d.student);
      const auto* teacher = typed(t, d.teacher);
      parallel_for(d.threads, d.rows, [&](int64_t row) {
        body(row, student + row * d.student_stride, teacher + row * d.teacher_stride);
      });
    });
  });
}

}  // namespace

EXPORT const int64_t sizeof_Divergence = sizeof(Divergence);

// kl, student_sum, teacher_sum: [rows].
EXPORT void kl_divergence(const Divergence* d, float* kl, float* student_sum, float* teacher_sum) {
  const float c = float(1 / LN2 / d->temperature), inverse = float(1 / d->temperature);
  each_row(*d, [&](int64_t row, const auto* s, const auto* t) {
    row_of(s, t, d->classes, c, inverse, kl + row, student_sum + row, teacher_sum + row);
  });
}

// ds: [rows, classes], of the student's dtype.
EXPORT void kl_divergence_backward(
    const Divergence* d, const float* dy, const float* student_sum, const float* teacher_sum, void* ds) {
  const float inverse = float(1 / d->temperature);
  each_row(*d, [&](int64_t row, const auto* s, const auto* t) {
    const float rate = float(dy[row] / d->temperature);
    gradient_of(ds, row * d->classes, s, t, d->classes, inverse, rate, student_sum[row], teacher_sum[row]);
  });
}
