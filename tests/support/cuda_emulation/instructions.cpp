// The functions of the emulated device that touch its memory, and the instructions of tensor cores. They are never
// instrumented, and report their accesses themselves.
#include <deque>
#include <vector>

#include "emulated_tensor_core.h"
#include "scheduler.h"

namespace emulation {

namespace {
template <typename Update>
unsigned atomically(unsigned* address, const void* caller, Update update) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof *address != 0) fail("a misaligned atomic");
  observe(address, sizeof *address, true, Kind::kAtomic, caller);
  // Fibers share one thread of the operating system and switch only at barriers, so plain updates are atomic.
  const unsigned old = *address;
  *address = update(old);
  return old;
}
}  // namespace

unsigned atomic_add(unsigned* address, unsigned value) {
  return atomically(address, __builtin_return_address(0), [&](unsigned old) { return old + value; });
}

unsigned atomic_or(unsigned* address, unsigned value) {
  return atomically(address, __builtin_return_address(0), [&](unsigned old) { return old | value; });
}

unsigned atomic_max(unsigned* address, unsigned value) {
  return atomically(address, __builtin_return_address(0), [&](unsigned old) { return old > value ? old : value; });
}

// ---- asynchronous copies -------------------------------------------------------------------------------------------

void start_copy(void* to, const void* from, int bytes, bool valid) {
  const void* caller = __builtin_return_address(0);
  const auto addresses = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
  if (addresses % static_cast<uintptr_t>(bytes) != 0) {
    observe_fault("misaligned", "an asynchronous copy from or to an address off its size", caller);
    print_reports();
    fail("a misaligned asynchronous copy");
  }
  observe_copy(to, from, static_cast<size_t>(bytes), valid, caller);
  copies().open.push_back({to, from, bytes, valid});
}

void commit_copies() {
  Copies& own = copies();
  own.committed.push_back(std::move(own.open));
  own.open.clear();
}

void wait_for_copies(unsigned pending) {
  const void* caller = __builtin_return_address(0);
  auto& committed = copies().committed;
  for (; committed.size() > pending; committed.pop_front()) {
    for (const Copy& copy : committed.front()) {
      observe_copy_done(copy.to, copy.from, static_cast<size_t>(copy.bytes), copy.valid, caller);
      if (copy.valid) memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
      if (!copy.valid) memset(copy.to, 0, static_cast<size_t>(copy.bytes));
    }
  }
}

// ---- tensor cores --------------------------------------------------------------------------------------------------

// Returns the elements that lane l holds of the four matrices whose rows the lanes point to.
void load_matrices(uint32_t (&out)[4], const void* row, bool transposed, Site site) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("the row of a matrix is not aligned to 16 bytes");
  observe(row, 16, false, Kind::kPlain, __builtin_return_address(0));
  const void** rows = exchange(kWholeWarp, row, site);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint32_t packed = 0;
    for (int half = 0; half < 2; ++half) {
      const int along = lane / 4, across = lane % 4 * 2 + half;
      const int r = transposed ? across : along, c = transposed ? along : across;
      packed |= static_cast<uint32_t>(static_cast<const uint16_t*>(rows[matrix * 8 + r])[c]) << (16 * half);
    }
    out[matrix] = packed;
  }
}

}  // namespace emulation
