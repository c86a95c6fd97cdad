// What the files of the emulated device share.
#pragma once

#include <deque>
#include <vector>

#include "cuda_runtime.h"
#include "emulated_tensor_core.h"
#include "matrix_descriptor.h"
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

// The part of one thread in a product of a warpgroup that is under way: sums of its two rows.
struct Product {
  float* sum;              // [columns / 8][4], of the kernel
  const uint32_t* factor;  // of the kernel
  uint32_t words[4];       // what it was when the product was started
  double rows[2][16];
  std::vector<float> before;      // the sums; empty if they continue those of the product before
  std::vector<uint16_t> columns;  // what shared memory held when it was started: [columns / 4][16]
  Factor other;
  bool accumulates, defined;
  Element element;
};

struct Products {
  bool fenced = false;  // since the last commit or wait
  std::vector<Product> open;
  std::vector<Product> committed;
};

Products& products();  // of the running thread; all must be complete when it ends

// What a register of the running thread is in its products under way that forbids an access, or null. The kernels keep
// such registers in memory of the host, because their addresses are passed.
const char* register_under_way(const void* address, size_t bytes, bool write);

// Sums 16 products x y and an addend, as the chosen tensor core does.
float product_sum(const double (&x)[16], const double (&y)[16], float addend, int least_exponent);

// Returns the bytes of dynamic shared memory that a kernel may ask for on the current device.
size_t allowed_shared(const void* function);

cudaError_t refused();  // what the device refuses every kernel with, or cudaSuccess

constexpr int kWarpgroup = 128;               // threads
constexpr unsigned kWholeWarp = 0xffffffffu;  // the lanes of an exchange

extern int processors;  // each can hold one block of a cooperative launch

}  // namespace emulation
