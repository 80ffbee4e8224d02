// What a library says of itself, and the threads that it is given.
#include <pthread.h>

#include "parallel.h"

Threads threads_of_pytorch = {nullptr, nullptr, nullptr};

EXPORT void use_threads(void* run, void* index, void* count) {
  threads_of_pytorch.run = reinterpret_cast<void (*)(void (*)(void*), void*, unsigned, unsigned)>(run);
  threads_of_pytorch.index = reinterpret_cast<int (*)()>(index);
  threads_of_pytorch.count = reinterpret_cast<int (*)()>(count);
  // a forked process has none of the threads that the runtime would wait for
  pthread_atfork(nullptr, nullptr, [] { threads_of_pytorch.run = nullptr; });
}

// Of all .cpp and .h files that it was built from, and of the compiler's flags.
EXPORT const char source_hash[] = GS_SOURCE_HASH;
EXPORT const char flags_hash[] = GS_FLAGS_HASH;
