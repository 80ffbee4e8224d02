// SLB on the CPU: each op passes once over its logits [rows, planes, columns]. A tile of one row is read plane by plane
// and stays in a cache, with its exponentials, until its last use. Vectors are those of GCC and Clang, which lower them
// to what a CPU has.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "parallel.h"
#pragma GCC optimize("fp-contract=fast")

#define INLINE __attribute__((always_inline)) inline

namespace {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX2__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif
constexpr int64_t TILE = 128, VECTORS = TILE / LANES, PLANES_MAX = 256;
constexpr float LARGEST = std::numeric_limits<float>::max(), INFINITE = std::numeric_limits<float>::infinity();

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

struct Array {
  void* data;       // may be null, and is then not used
  int64_t is_bf16;  // else fp32
};

struct Logits {
  Array a;
  const float *levels, *scale;  // [planes], or [2] for a single plane, which is that of level 1; [rows] or null
  int64_t rows, planes, columns;
  float inverse;  // 1 / temperature
  int threads;
};

INLINE Floats all(float x) { return Floats{} + x; }
INLINE Floats floats(Words bits) { return reinterpret_cast<Floats>(bits); }
INLINE Words bits_of(Floats x) { return reinterpret_cast<Words>(x); }

template <class Vector>
INLINE Vector read(const void* from, int64_t at, int64_t lanes) {
  Vector v{};
  const char* p = static_cast<const char*>(from) + at * int64_t(sizeof(Vector) / LANES);
  if (lanes == LANES) {
    std::memcpy(&v, p, sizeof(Vector));
  } else {
    std::memcpy(&v, p, lanes * (sizeof(Vector) / LANES));
  }
  return v;
}

template <class Vector>
INLINE void write(void* to, int64_t at, int64_t lanes, Vector v) {
  char* p = static_cast<char*>(to) + at * int64_t(sizeof(Vector) / LANES);
  if (lanes == LANES) {
    std::memcpy(p, &v, sizeof(Vector));
  } else {
    std::memcpy(p, &v, lanes * (sizeof(Vector) / LANES));
  }
}

INLINE Floats load(const Array& from, int64_t at, int64_t lanes) {
  if (!from.is_bf16) return read<Floats>(from.data, at, lanes);
  return floats(__builtin_convertvector(read<Halves>(from.data, at, lanes), Words) << 16);
}

INLINE void store(const Array& to, int64_t at, int64_t lanes, Floats x) {
  if (!to.is_bf16) return write<Floats>(to.data, at, lanes, x);
  const Words bits = bits_of(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  write<Halves>(to.data, at, lanes, __builtin_convertvector(x == x ? rounded : (bits >> 16) | 64, Halves));
}

// 2 ** t for t <= 0, off by at most 1.5e-7 of it, 0 from -126.5 down: a polynomial of the fraction; the whole part n goes
// into the exponent of a float by the bits of n + MAGIC.
INLINE Floats exp2(Floats t) {
  constexpr float MAGIC = 1.5f * (1 << 23) + 127;  // here fp32 has no fraction left, and its last bits are 127
  t = t < -127.0f ? all(-127.0f) : t;
  const Floats z = t + MAGIC, f = t - (z - MAGIC);
  Floats p = 1.535336188319500e-4f * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.0f;
  return p * floats(bits_of(z) << 23);
}

INLINE Floats root(Floats x) {
#ifdef __AVX512F__
  return reinterpret_cast<Floats>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x)));
#else
  for (int64_t j = 0; j < LANES; ++j) x[j] = std::sqrt(x[j]);
  return x;
#endif
}

// Some neighbours in a row, TILE of them if WHOLE, and what the softmax makes of their logits.
template <bool WHOLE>
struct Tile {
  const Logits& logits;
  const int64_t row, column;
  Floats e[PLANES_MAX][VECTORS];        // exponentials, the largest of a weight being 1
  Floats sum[VECTORS], mixed[VECTORS];  // of the exponentials; of the levels, by the softmax

  INLINE Tile(const Logits& logits, int64_t row, int64_t column) : logits(logits), row(row), column(column) {}

  INLINE int64_t vectors() const { return WHOLE ? VECTORS : (logits.columns - column + LANES - 1) / LANES; }
  INLINE int64_t first_plane() const { return logits.planes == 1; }
  INLINE float scale() const { return logits.scale ? logits.scale[row] : 1.0f; }
  INLINE int64_t lanes(int64_t v) const {
    const int64_t left = logits.columns - column - v * LANES;
    return WHOLE || left > LANES ? LANES : left;
  }
  INLINE int64_t weight(int64_t v) const { return row * logits.columns + column + v * LANES; }
  INLINE int64_t logit(int64_t k, int64_t v) const {
    return (row * logits.planes + k) * logits.columns + column + v * LANES;
  }
  INLINE Floats at(int64_t k, int64_t v) const { return load(logits.a, logit(k, v), lanes(v)); }

  INLINE void mix() {
    const float c = logits.inverse * 1.44269504088896340736f;
    if (logits.planes == 1) {
      mix_one(c);
    } else {
      mix_many(c);
    }
  }

  INLINE void mix_one(float c) {
    for (int64_t v = 0; v < vectors(); ++v) {
      const Floats a = at(0, v), smaller = exp2((a < 0.0f ? a : -a) * c);
      const Floats zero = a > 0.0f ? smaller : all(1.0f), one = a > 0.0f ? 1.0f + (a - a) : smaller;  // NaN of infinity
      e[0][v] = one;
      sum[v] = zero + one;
      mixed[v] = (zero * logits.levels[0] + one * logits.levels[1]) / sum[v];
    }
  }

  INLINE void mix_many(float c) {
    Floats largest[VECTORS];
    for (int64_t v = 0; v < VECTORS; ++v) largest[v] = all(-LARGEST), sum[v] = mixed[v] = Floats{};
    for (int64_t k = 0; k < logits.planes; ++k) {
      for (int64_t v = 0; v < vectors(); ++v) {
        const Floats a = e[k][v] = at(k, v);
        largest[v] = a > largest[v] ? a : largest[v];
      }
    }
    for (int64_t k = 0; k < logits.planes; ++k) {
      for (int64_t v = 0; v < vectors(); ++v) {
        e[k][v] = exp2((e[k][v] - largest[v]) * c);
        sum[v] += e[k][v];
        mixed[v] += e[k][v] * logits.levels[k];
      }
    }
    for (int64_t v = 0; v < vectors(); ++v) mixed[v] /= sum[v];
  }

  // Calls use(position, lanes, gradient) for each vector of logits, given the gradient of the weight.
  template <class Use>
  INLINE void gradients(const Array& dw, Use use) {
    mix();
    const float rate = scale() * logits.inverse;
    Floats g[VECTORS];
    for (int64_t v = 0; v < vectors(); ++v) g[v] = load(dw, weight(v), lanes(v)) * rate / sum[v];
    for (int64_t k = 0; k < logits.planes; ++k) {
      const float level = logits.levels[k + first_plane()];
      for (int64_t v = 0; v < vectors(); ++v) use(logit(k, v), lanes(v), g[v] * e[k][v] * (level - mixed[v]));
    }
  }

  // Calls use(v, code, level) for each vector of weights: those of the largest logit, the lowest of equals. NaN counts as
  // infinity, and its level is NaN.
  template <class Use>
  INLINE void choices(Use use) const {
    for (int64_t v = 0; v < vectors(); ++v) {
      Floats best = Floats{}, level = all(logits.levels[0]);
      Ints code{}, is_nan{};
      for (int64_t k = 0; k < logits.planes; ++k) {
        const Floats a = at(k, v), seen = a == a ? a : all(INFINITE);
        is_nan |= a != a;
        const Ints better = k == 0 && !first_plane() ? Ints{} - 1 : seen > best;
        best = better ? seen : best;
        code = better ? Ints{} + int32_t(k + first_plane()) : code;
        level = better ? all(logits.levels[k + first_plane()]) : level;
      }
      use(v, code, is_nan ? all(std::numeric_limits<float>::quiet_NaN()) : level);
    }
  }
};

template <class Use>
INLINE void each_tile(const Logits& logits, Use use) {
  const int64_t across = (logits.columns + TILE - 1) / TILE, tiles = logits.rows * across;
  parallel_for(logits.threads, tiles, [&](int64_t i) {
    const int64_t row = i / across, column = i % across * TILE;
    if (column + TILE <= logits.columns) {
      Tile<true> tile(logits, row, column);
      use(tile, i);
    } else {
      Tile<false> tile(logits, row, column);
      use(tile, i);
    }
  });
}

}  // namespace

EXPORT void slb_weight(const Logits* logits, const Array* w, int hard) {
  if (hard) {
    each_tile(*logits, [&](auto& tile, int64_t) {
      tile.choices([&](int64_t v, Ints, Floats level) { store(*w, tile.weight(v), tile.lanes(v), level * tile.scale()); });
    });
    return;
  }
  each_tile(*logits, [&](auto& tile, int64_t) {
    tile.mix();
    for (int64_t v = 0; v < tile.vectors(); ++v) store(*w, tile.weight(v), tile.lanes(v), tile.mixed[v] * tile.scale());
  });
}

// codes: [rows, columns].
EXPORT void slb_codes(const Logits* logits, uint8_t* codes) {
  typedef uint8_t Bytes __attribute__((vector_size(LANES)));
  each_tile(*logits, [&](auto& tile, int64_t) {
    tile.choices([&](int64_t v, Ints code, Floats) {
      write<Bytes>(codes, tile.weight(v), tile.lanes(v), __builtin_convertvector(code, Bytes));
    });
  });
}

// da: as the logits; dscale: the sum of dW * W of each tile, [rows, tiles of a row]; each may be null.
EXPORT void slb_backward(const Logits* logits, const Array* dw, const Array* da, float* dscale) {
  each_tile(*logits, [&](auto& tile, int64_t i) {
    if (da->data) {
      tile.gradients(*dw, [&](int64_t at, int64_t lanes, Floats g) { store(*da, at, lanes, g); });
    } else {
      tile.mix();
    }
    if (!dscale) return;
    Floats sums{};
    for (int64_t v = 0; v < tile.vectors(); ++v) {
      // past the end dW reads as 0 and W is finite
      sums += load(*dw, tile.weight(v), tile.lanes(v)) * tile.mixed[v];
    }
    float sum = 0;
    for (int64_t j = 0; j < LANES; ++j) sum += sums[j];
    dscale[i] = sum;
  });
}

struct AdamW {
  float weight1, weight2, rate, spread, eps, keep;  // 1 - beta1, 1 - beta2, lr / correction1, sqrt(correction2); 1 - lr * decay
};

EXPORT void slb_adamw(
    const Logits* logits, const Array* dw, const Array* exp_avg, const Array* exp_avg_sq, const AdamW* by) {
  each_tile(*logits, [&](auto& tile, int64_t) {
    tile.gradients(*dw, [&](int64_t at, int64_t lanes, Floats g) {
      const Floats avg = load(*exp_avg, at, lanes) * (1 - by->weight1) + g * by->weight1;
      const Floats sq = load(*exp_avg_sq, at, lanes) * (1 - by->weight2) + g * g * by->weight2;
      const Floats step = by->rate * avg / (root(sq) / by->spread + by->eps);
      store(logits->a, at, lanes, load(logits->a, at, lanes) * by->keep - step);
      store(*exp_avg, at, lanes, avg);
      store(*exp_avg_sq, at, lanes, sq);
    });
  });
}

struct SGD {
  float rate, decay, momentum;
  int nesterov;
};

// momentum_buffer may be null.
EXPORT void slb_sgd(const Logits* logits, const Array* dw, const Array* momentum_buffer, const SGD* by) {
  each_tile(*logits, [&](auto& tile, int64_t) {
    tile.gradients(*dw, [&](int64_t at, int64_t lanes, Floats g) {
      const Floats a = load(logits->a, at, lanes);
      Floats step = g + by->decay * a;
      if (momentum_buffer->data) {
        const Floats buffer = by->momentum * load(*momentum_buffer, at, lanes) + step;
        store(*momentum_buffer, at, lanes, buffer);
        step = by->nesterov ? step + by->momentum * buffer : buffer;
      }
      store(logits->a, at, lanes, a - by->rate * step);
    });
  });
}

// Compared with the structs of Python by `load_functions`.
EXPORT const int64_t sizeof_Array = sizeof(Array);
EXPORT const int64_t sizeof_Logits = sizeof(Logits);
EXPORT const int64_t sizeof_AdamW = sizeof(AdamW);
EXPORT const int64_t sizeof_SGD = sizeof(SGD);
