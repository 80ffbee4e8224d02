// Threads for loops: those of PyTorch's own OpenMP runtime, whose functions `use_threads` is given when a library is
// loaded. A second pool of threads would compete with PyTorch's for the cores, for idle threads of OpenMP spin.
#pragma once
#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

// run: GOMP_parallel; index and count: omp_get_thread_num and omp_get_num_threads. Null: one thread does all.
struct Threads {
  void (*run)(void (*)(void*), void*, unsigned, unsigned);
  int (*index)();
  int (*count)();
};

extern Threads threads_of_pytorch;

// Calls body(index, count) in each of at most `threads` threads; there may be fewer.
template <class Body>
static inline void in_parallel(int threads, const Body& body) {
  if (threads <= 1 || !threads_of_pytorch.run) {
    body(int64_t(0), int64_t(1));
    return;
  }
  const auto enter = [](void* of) {
    (*static_cast<const Body*>(of))(int64_t(threads_of_pytorch.index()), int64_t(threads_of_pytorch.count()));
  };
  threads_of_pytorch.run(enter, const_cast<Body*>(&body), unsigned(threads), 0);
}

// Calls body(i) for i in 0..count, neighbours in one thread.
template <class Body>
static inline void parallel_for(int threads, int64_t count, const Body& body) {
  in_parallel(threads, [&](int64_t index, int64_t of) {
    const int64_t end = count * (index + 1) / of;
    for (int64_t i = count * index / of; i < end; ++i) body(i);
  });
}
