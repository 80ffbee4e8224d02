// Computes the layers of a Llama, Mistral or Qwen for one token in fp32: norms, packed products, rotary positions,
// attention over cached keys and values, and gated units.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../qmatmul/cpu/interleaved_product.h"
#include "parallel.h"
#include "simd.h"

using namespace lanes;

namespace {

constexpr int64_t PARALLEL_FROM = 1 << 14;  // products of an attention, from which a second thread pays

struct Linear {
  const Product* product;
  const float* bias;  // or null
};

struct Layer {
  const float *norm_before, *norm_between;  // [hidden]
  const float *norm_q, *norm_k;  // of each head, [head_dim], or null
  Linear q, k, v, o, gate, up, down;
  void *keys, *values;  // [kv_heads, length, head_dim], fp32 or bf16
};

struct Step {
  const Layer* layers;
  const float* norm;  // [hidden]
  int64_t count, hidden, inner, heads, kv_heads, head_dim, length;
  float eps, eps_last, scaling;
  int32_t bf16;  // of keys and values
};

// exp(v) to a few units in the last place, 0 below -87; loops over it are vectorized.
inline float exponential(float v) {
  const float near = std::max(-87.0f, std::min(v, 88.0f));
  const float n = (near * 1.44269504f + 12582912.0f) - 12582912.0f;  // rounded: 1.5 * 2**23 has no fraction
  const float r = (near - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = ((int32_t)n + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return v < -87.0f ? 0.0f : v != v ? v : p * power;
}

void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* y) {
  F squares = all(0.0f);
  for (int64_t i = 0; i < n; i += LANES) {
    const F v = load(x + i, n - i);
    squares = fma(v, v, squares);
  }
  const float inverse = 1.0f / std::sqrt(sum(squares) / (float)n + eps);
  for (int64_t i = 0; i < n; ++i) y[i] = weight[i] * (x[i] * inverse);
}

// Turns pairs of elements half a head apart by the angles of a position.
void rotate(const float* x, const float* cos, const float* sin, int64_t head_dim, float* y) {
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float low = x[i], high = x[i + half];
    y[i] = low * cos[i] - high * sin[i];
    y[i + half] = high * cos[i + half] + low * sin[i + half];
  }
}

LANE_FN F load_any(const float* p) { return load(p); }
LANE_FN F load_any(const uint16_t* p) { return load_bf16(p); }
LANE_FN void store_any(float* p, F v) { store(p, v); }
LANE_FN void store_any(uint16_t* p, F v) { store(p, rounded_bf16(v)); }

// Turns the heads of a token's queries or keys, each behind its norm if there is one, which overwrites x.
void rotate_heads(float* x, int64_t heads, const float* norm, float eps, const float* cos, const float* sin,
                  int64_t head_dim, float* y) {
  for (int64_t at = 0; at < heads * head_dim; at += head_dim) {
    if (norm) rms_norm(x + at, norm, eps, head_dim, x + at);
    rotate(x + at, cos, sin, head_dim, y + at);
  }
}

// One head: softmax(q K^T * scaling) V over `tokens`; p: memory for as many numbers.
template <class T>
void attend(
    const float* q, const T* keys, const T* values, int64_t tokens, int64_t head_dim, float scaling, float* p, float* y) {
  float largest = -INFINITY;
  for (int64_t t = 0; t < tokens; ++t) {
    F part = all(0.0f);
    for (int64_t d = 0; d < head_dim; d += LANES) part = fma(load(q + d), load_any(keys + t * head_dim + d), part);
    p[t] = sum(part) * scaling;
    largest = std::max(largest, p[t]);
  }
  for (int64_t t = 0; t < tokens; ++t) p[t] = exponential(p[t] - largest);
  F sums = all(0.0f);
  for (int64_t t = 0; t < tokens; t += LANES) sums = sums + load(p + t, tokens - t);
  const F inverse = all(1.0f / sum(sums));
  for (int64_t d = 0; d < head_dim; d += LANES) {
    F part[4] = {all(0.0f), all(0.0f), all(0.0f), all(0.0f)};
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4)
      for (int i = 0; i < 4; ++i) part[i] = fma(all(p[t + i]), load_any(values + (t + i) * head_dim + d), part[i]);
    for (; t < tokens; ++t) part[0] = fma(all(p[t]), load_any(values + t * head_dim + d), part[0]);
    store(y + d, ((part[0] + part[1]) + (part[2] + part[3])) * inverse);
  }
}

// All heads of one token: `turned` are its queries. Its keys and values join the others.
template <class T>
void attend_all(const Step& s, const Layer& layer, const float* k, const float* v, const float* turned, int64_t position,
                float* p, float* y, int threads) {
  T *keys = static_cast<T*>(layer.keys), *values = static_cast<T*>(layer.values);
  const int64_t tokens = position + 1, apart = s.length * s.head_dim;
  for (int64_t h = 0; h < s.kv_heads; ++h) {
    for (int64_t d = 0; d < s.head_dim; d += LANES) {
      const int64_t from = h * s.head_dim + d, to = h * apart + position * s.head_dim + d;
      store_any(keys + to, load(k + from));
      store_any(values + to, load(v + from));
    }
  }
  parallel_for(tokens * s.heads * s.head_dim < PARALLEL_FROM ? 1 : threads, s.heads, [&](int64_t h) {
    const int64_t of = h / (s.heads / s.kv_heads) * apart, at = h * s.head_dim;
    attend(turned + at, keys + of, values + of, tokens, s.head_dim, s.scaling, p + h * s.length, y + at);
  });
}

template <int COUNT>
void multiply(const Linear* const (&linears)[COUNT], float* const (&ys)[COUNT], const float* x, int threads) {
  const Product* products[COUNT];
  const void* biases[COUNT];
  for (int i = 0; i < COUNT; ++i) products[i] = linears[i]->product, biases[i] = linears[i]->bias;
  products_of_row(products, biases, ys, COUNT, x, threads);
}

void layer_step(const Step& s, const Layer& layer, float* x, const float* cos, const float* sin, int64_t position,
                float* memory, int threads) {
  const int64_t width = s.heads * s.head_dim, kv_width = s.kv_heads * s.head_dim;
  float *normed = memory, *q = normed + s.hidden, *k = q + width, *v = k + kv_width, *turned = v + kv_width;
  float *turned_k = turned + width, *gate = turned_k + kv_width, *up = gate + s.inner, *p = up + s.inner;

  rms_norm(x, layer.norm_before, s.eps, s.hidden, normed);
  multiply<3>({&layer.q, &layer.k, &layer.v}, {q, k, v}, normed, threads);
  rotate_heads(q, s.heads, layer.norm_q, s.eps, cos, sin, s.head_dim, turned);
  rotate_heads(k, s.kv_heads, layer.norm_k, s.eps, cos, sin, s.head_dim, turned_k);
  (s.bf16 ? attend_all<uint16_t> : attend_all<float>)(s, layer, turned_k, v, turned, position, p, q, threads);
  multiply<1>({&layer.o}, {normed}, q, threads);
  for (int64_t i = 0; i < s.hidden; ++i) x[i] += normed[i];

  rms_norm(x, layer.norm_between, s.eps, s.hidden, normed);
  multiply<2>({&layer.gate, &layer.up}, {gate, up}, normed, threads);
  for (int64_t i = 0; i < s.inner; ++i) gate[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
  multiply<1>({&layer.down}, {normed}, gate, threads);
  for (int64_t i = 0; i < s.hidden; ++i) x[i] += normed[i];
}

}  // namespace

EXPORT const int64_t sizeof_Linear = sizeof(Linear);
EXPORT const int64_t sizeof_Layer = sizeof(Layer);
EXPORT const int64_t sizeof_Step = sizeof(Step);

// y `[hidden]`: the last norm of what the layers make of x `[hidden]`, which they overwrite, for the token at a position;
// cos and sin `[head_dim]` of it. Its keys and values are written behind those before.
EXPORT void decoder_step(
    const Step* step, float* x, const float* cos, const float* sin, int64_t position, float* y, int threads) {
  const Step& s = *step;
  const int64_t width = s.heads * s.head_dim, kv_width = s.kv_heads * s.head_dim;
  const Floats memory(s.hidden + 2 * width + 3 * kv_width + 2 * s.inner + s.heads * s.length);
  for (int64_t i = 0; i < s.count; ++i) layer_step(s, s.layers[i], x, cos, sin, position, memory.data, threads);
  rms_norm(x, s.norm, s.eps_last, s.hidden, y);
}
