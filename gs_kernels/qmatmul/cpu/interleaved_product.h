// What is fixed in a product of rows of floats with a row-interleaved weight (interleaved.py), for who calls it in C++.
#pragma once
#include <cstdint>
#include <memory>

struct Weight {
  const int32_t* codes;  // [B, G, W, 16]
  const float* grid;     // [B, G, 32]
  int64_t blocks, groups, words;
};

// What is fixed in calls of `interleaved_product`.
struct Product {
  Weight w;
  int64_t n, k, group;                      // group: columns of x in one, which may be fewer than the weight has
  int32_t bits, x_bf16, y_bf16, bias_bf16;  // else fp32
  int32_t x_short;                          // x may lose what bf16 and fp16 have no digits for (row_pieces.h)
};

// Floats that begin a line of the cache, not initialized.
struct Floats {
  explicit Floats(int64_t n) : held(new float[n + 16]), data((float*)(((uintptr_t)held.get() + 63) / 64 * 64)) {}
  std::unique_ptr<float[]> held;
  float* data;
};

// ys[i] `[n]` = x `[k]` times the weight of products[i], plus biases[i], if any; all in fp32, for `count` of them.
void products_of_row(
    const Product* const* products, const void* const* biases, float* const* ys, int64_t count, const float* x, int threads);
