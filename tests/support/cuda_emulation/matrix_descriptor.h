// What a matrix descriptor of wgmma says: where shared memory holds the elements of a factor of 16-bit elements. Used
// by the emulated device and by the interpreter of PTX. Source: PTX ISA, "Matrix Descriptor Format", "Strides" and
// "Canonical Layouts" of the asynchronous warpgroup-level matrix instructions.
#pragma once

#include <stdint.h>

// A factor [16, n] of a product; k counts its 16 rows.
struct Factor {
  uint32_t start, leading, stride;  // bytes
  int mode;                         // 0: not swizzled; 1, 2 and 3: rows of 128, 64 and 32 bytes
  bool transposed;                  // its rows in shared memory run along n
  bool valid;                       // whether all other bits are zero

  Factor() = default;
  Factor(uint64_t bits, bool transposed)
      : start((bits & 0x3fff) << 4),
        leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4),
        mode(static_cast<int>(bits >> 62)),
        transposed(transposed),
        valid((bits & 0x3fffc000c000c000u) == 0) {}

  // Returns the address of element (k, n), in bytes of shared memory.
  uint32_t at(uint32_t k, uint32_t n) const {
    if (mode == 0) {
      const uint32_t row = transposed ? k : n, column = transposed ? n : k;
      const uint32_t of_rows = transposed ? leading : stride, of_columns = transposed ? stride : leading;
      return start + row / 8 * of_rows + row % 8 * 16 + column / 8 * of_columns + column % 8 * 2;
    }
    const uint32_t bytes = 256u >> mode, groups = 7u >> (mode - 1), columns = bytes / 2;
    const uint32_t address = transposed
                                 ? start + k / 8 * stride + k % 8 * bytes + n / columns * leading + n % columns * 2
                                 : start + n / 8 * stride + n % 8 * bytes + k * 2;
    return address ^ ((address >> 7 & groups) << 4);
  }
};
