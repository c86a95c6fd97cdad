// What the files of the emulated device share.
#pragma once

#include <deque>
#include <vector>

#include "cuda_runtime.h"
#include "observer.h"

namespace emulation {

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool valid;
};

struct Copies {
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> committed;
};

Copies& copies();  // of the running thread; all must be complete when it ends

// Returns the bytes of dynamic shared memory that a kernel may ask for on the current device.
size_t allowed_shared(const void* function);

cudaError_t refused();  // what the device refuses every kernel with, or cudaSuccess

extern int processors;  // each can hold one block of a cooperative launch

}  // namespace emulation
