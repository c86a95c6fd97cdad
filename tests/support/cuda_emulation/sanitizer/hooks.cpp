// The functions that GCC's -fsanitize=thread calls for every access, and those that its -fsanitize=alignment, bounds,
// shift and signed-integer-overflow call for every fault. They replace libtsan and libubsan.
#include <stdint.h>

#include <string>

#include "../cuda_runtime.h"
#include "../observer.h"
#include "reports.h"

#define HOOK extern "C" __attribute__((visibility("hidden")))
#define CALLER __builtin_return_address(0)

using emulation::Kind;
using emulation::observe;

#define ACCESS(size)                                                                                            \
  HOOK void __tsan_read##size(void* p) { observe(p, size, false, Kind::kPlain, CALLER); }                       \
  HOOK void __tsan_write##size(void* p) { observe(p, size, true, Kind::kPlain, CALLER); }                       \
  HOOK void __tsan_unaligned_read##size(void* p) { observe(p, size, false, Kind::kPlain, CALLER); }             \
  HOOK void __tsan_unaligned_write##size(void* p) { observe(p, size, true, Kind::kPlain, CALLER); }             \
  HOOK void __tsan_volatile_read##size(void* p) { observe(p, size, false, Kind::kVolatile, CALLER); }           \
  HOOK void __tsan_volatile_write##size(void* p) { observe(p, size, true, Kind::kVolatile, CALLER); }           \
  HOOK void __tsan_unaligned_volatile_read##size(void* p) { observe(p, size, false, Kind::kVolatile, CALLER); } \
  HOOK void __tsan_unaligned_volatile_write##size(void* p) { observe(p, size, true, Kind::kVolatile, CALLER); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)

HOOK void __tsan_read_range(void* p, size_t bytes) { observe(p, bytes, false, Kind::kPlain, CALLER); }
HOOK void __tsan_write_range(void* p, size_t bytes) { observe(p, bytes, true, Kind::kPlain, CALLER); }
HOOK void __tsan_init() {}
HOOK void __tsan_func_entry(void*) {}
HOOK void __tsan_func_exit() {}
HOOK void __tsan_vptr_update(void**, void*) {}
HOOK void __tsan_vptr_read(void**) {}

namespace {
// The head of what GCC passes for every fault.
struct Location {
  const char* file;
  uint32_t line, column;
};

void fault(const char* kind, const char* what, const void* location) {
  const auto* at = static_cast<const Location*>(location);
  emulation::report(kind, what, nullptr, std::string(at->file) + ":" + std::to_string(at->line));
}
}  // namespace

// The access that follows may be an instruction that needs the alignment, so this ends the process with the reports.
HOOK void __ubsan_handle_type_mismatch_v1(void* at, uintptr_t) {
  fault("misaligned", "an address off its type", at);
  emulation::fail("a misaligned access");
}
HOOK void __ubsan_handle_out_of_bounds(void* at, uintptr_t) { fault("out of bounds", "an index of an array", at); }
HOOK void __ubsan_handle_shift_out_of_bounds(void* at, uintptr_t, uintptr_t) { fault("shift", "beyond the width", at); }
HOOK void __ubsan_handle_add_overflow(void* at, uintptr_t, uintptr_t) { fault("overflow", "of a signed sum", at); }
HOOK void __ubsan_handle_sub_overflow(void* at, uintptr_t, uintptr_t) { fault("overflow", "of a difference", at); }
HOOK void __ubsan_handle_mul_overflow(void* at, uintptr_t, uintptr_t) { fault("overflow", "of a product", at); }
HOOK void __ubsan_handle_negate_overflow(void* at, uintptr_t) { fault("overflow", "of a negation", at); }
HOOK void __ubsan_handle_divrem_overflow(void* at, uintptr_t, uintptr_t) { fault("overflow", "of a quotient", at); }
