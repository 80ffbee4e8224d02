// Searches clip ratios: the lanes are ratios, and each element of a row is tried on the grids of sixteen of them at a time.
#include <algorithm>
#include <cmath>

#include "parallel.h"
#include "simd.h"

using namespace lanes;

namespace {

constexpr int64_t PART = 256;  // elements whose errors are summed in fp32

struct Search {
  float* found;                    // [channels]
  const float *x, *importance;     // [channels, n]; importance may be null
  const float* ratios;             // [count]
  int64_t channels, n, count;
  int qmin, qmax, symmetric;
  float zero;                      // of a symmetric grid
  int threads;
};

// A grid of each lane, as `choose_qparams` fits it to a range.
struct Grids {
  float scale[LANES], inverse[LANES], zero[LANES], whole[LANES], fraction[LANES];

  void fit(const Search& s, int64_t lane, float low, float high) {
    float least = std::min(low, 0.0f), most = std::max(high, 0.0f);
    if (s.symmetric) most = std::max(-least, most), least = -most;
    const float span = most - least;
    scale[lane] = span == 0.0f ? 1.0f : std::max(span / float(s.qmax - s.qmin), 0x1p-100f);
    float z = s.zero;
    if (!s.symmetric) {
      z = std::nearbyintf(float(s.qmin) - least / scale[lane]);
      z = std::min(std::max(z, float(s.qmin)), float(s.qmax));
    }
    zero[lane] = z;
    whole[lane] = std::nearbyintf(z);
    fraction[lane] = z - whole[lane];
    inverse[lane] = 1.0f / scale[lane];
  }
};

template <bool weighted>
__attribute__((always_inline)) inline F errors_of(const Search& s, const Grids& g, const float* x, const float* importance, int64_t n) {
  const F scale = load(g.scale), inverse = load(g.inverse), zero = load(g.zero), whole = load(g.whole);
  const F fraction = load(g.fraction), least = all(float(s.qmin)), most = all(float(s.qmax));
  F sums[2] = {all(0.0f), all(0.0f)};
  for (int64_t i = 0; i < n; ++i) {
    const F v = all(x[i]);
    const F level = min(max(round(v * inverse + fraction) + whole, least), most);
    const F error = (level - zero) * scale - v;
    sums[i & 1] = fma(error, weighted ? error * all(importance[i]) : error, sums[i & 1]);
  }
  return sums[0] + sums[1];
}

float search(const Search& s, int64_t channel) {
  const float* x = s.x + channel * s.n;
  const float* importance = s.importance ? s.importance + channel * s.n : nullptr;
  float low = x[0], high = x[0];
  bool finite = true;
  for (int64_t i = 0; i < s.n; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
    finite &= std::fabs(x[i]) <= 3.4028234663852886e38f;
  }
  float found = 1.0f;
  if (!finite) return found;
  double best = INFINITY;
  for (int64_t first = 0; first < s.count; first += LANES) {
    const int64_t lanes = std::min(LANES, s.count - first);
    Grids grids;
    for (int64_t j = 0; j < LANES; ++j) {
      const float ratio = s.ratios[first + std::min(j, lanes - 1)];
      grids.fit(s, j, low * ratio, high * ratio);
    }
    double totals[LANES] = {};
    for (int64_t i = 0; i < s.n; i += PART) {
      const int64_t n = std::min(PART, s.n - i);
      float sums[LANES];
      store(sums, importance ? errors_of<true>(s, grids, x + i, importance + i, n) : errors_of<false>(s, grids, x + i, nullptr, n));
      for (int64_t j = 0; j < LANES; ++j) totals[j] += sums[j];
    }
    for (int64_t j = 0; j < lanes; ++j) {
      if (totals[j] < best) best = totals[j], found = s.ratios[first + j];
    }
  }
  return found;
}

}  // namespace

EXPORT void search_clip_ratio(const Search* s) {
  parallel_for(s->threads, s->channels, [&](int64_t channel) { s->found[channel] = search(*s, channel); });
}

EXPORT const int64_t sizeof_Search = sizeof(Search);
