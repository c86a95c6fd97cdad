// The functions of the emulated device that touch its memory, and the instructions of tensor cores. They are never
// instrumented, and report their accesses themselves.
#include <deque>
#include <vector>

#include "emulated_tensor_core.h"
#include "scheduler.h"

namespace emulation {

unsigned long products = 0;

namespace {
constexpr unsigned kWholeWarp = 0xffffffffu;

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

namespace {
// Returns 2^exponent, for -1022 <= exponent <= 1023.
double power_of_two(int exponent) {
  const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Sums 17 addends as tensor cores do, or less exactly: each is truncated to 24 bits relative to the greatest.
float truncated_sum(const double (&addends)[17]) {
  double greatest = 0;
  for (const double addend : addends) greatest = fabs(addend) > greatest ? fabs(addend) : greatest;
  double total = 0;
  if (greatest > 0 && greatest < HUGE_VAL) {
    uint64_t bits;
    memcpy(&bits, &greatest, sizeof bits);  // products of 16-bit floats, and floats, are normal doubles
    const int exponent = static_cast<int>(bits >> 52) - 1023;
    const double scale = power_of_two(23 - exponent);
    int64_t units = 0;
    for (const double addend : addends) units += addend == addend ? static_cast<int64_t>(addend * scale) : 0;
    total = static_cast<double>(units) * power_of_two(exponent - 23);
    for (const double addend : addends) total = addend == addend ? total : addend;
  } else {
    for (const double addend : addends) total += addend;
  }
  const float rounded = static_cast<float>(total);
  return fabs(rounded) > fabs(total) ? nextafterf(rounded, 0.0f) : rounded;
}
}  // namespace

void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Widen widen, Site site) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const Operands* lanes = exchange(kWholeWarp, Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}}, site);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  products += lane == 0;
  for (int at = 0; at < 4; ++at) {
    const int row = lane / 4 + at / 2 * 8, column = lane % 4 * 2 + at % 2;
    double addends[17];
    for (int k = 0; k < 16; ++k) {
      const Operands& of_row = lanes[row % 8 * 4 + k % 8 / 2];
      const Operands& of_column = lanes[column * 4 + k % 8 / 2];
      const uint32_t x = of_row.a[row / 8 + k / 8 * 2], y = of_column.b[k / 8];
      addends[k] = widen(static_cast<uint16_t>(x >> k % 2 * 16)) * widen(static_cast<uint16_t>(y >> k % 2 * 16));
    }
    addends[16] = sum[at];
    sum[at] = truncated_sum(addends);
  }
}

}  // namespace emulation

// Returns the number of matrix products so far: tests check that a call used tensor cores.
extern "C" __attribute__((visibility("default"))) unsigned long emulation_products() { return emulation::products; }
