// The shadow of the memory of the device, and the checks of every access. Each two bytes have two words, one for the
// last write and one for the last read. A word names the launch, block, thread and time of the access.
#include <sys/mman.h>

#include <unordered_map>

#include "../scheduler.h"
#include "order.h"
#include "reports.h"

namespace emulation {
namespace {

struct Cell {
  uint64_t write, read;
};

constexpr int kTimeAt = 10, kBlockAt = 28, kLaunchAt = 46, kKindAt = 60;
constexpr unsigned kMaxTime = 1u << 18, kBlocks = 1u << 18, kLaunches = 1u << 14;
// Flags. Of a write: the cell is initialised; an asynchronous copy to it is under way. Of a read: other threads of the
// same block and time have read, too; other blocks of the launch have, too.
constexpr uint64_t kInitialised = 1ull << 63, kUnderWay = 1ull << 62, kManyBlocks = 1ull << 63,
                   kManyThreads = 1ull << 62;

unsigned thread_of(uint64_t word) { return word & 1023; }
unsigned time_of(uint64_t word) { return word >> kTimeAt & (kMaxTime - 1); }
unsigned block_of(uint64_t word) { return word >> kBlockAt & (kBlocks - 1); }
unsigned launch_of(uint64_t word) { return word >> kLaunchAt & (kLaunches - 1); }
Kind kind_of(uint64_t word) { return static_cast<Kind>(word >> kKindAt & 3); }

constexpr size_t kSlot = size_t{1} << 31, kSlots = 64;  // an allocation starts in the middle of a slot of the arena
constexpr size_t kArena = kSlot * kSlots;

struct Allocation {
  const char* begin = nullptr;
  size_t bytes = 0;
  bool initialised = false;  // what an untouched cell is
  std::string name;
};

char* arena = nullptr;
Cell* arena_cells = nullptr;
Allocation allocations[kSlots];
int allocation_of_slot[kSlots];
int allocated = 0;
size_t next_slot = 0;
const void* expected_stream = nullptr;

const Place* now = nullptr;
const SharedWindow* window = nullptr;
uint64_t own_tag = 0;
BlockOrder order;
// The last reads of blocks other than the one in the cell.
std::unordered_map<const Cell*, std::vector<uint64_t>> other_reads;

std::string named(const char* kind, uint64_t word) {
  return std::string(kind) + " by thread " + std::to_string(thread_of(word)) + " of block " +
         std::to_string(block_of(word));
}

// Where an access goes: its cells, and what an untouched cell of it is.
struct Target {
  Cell* cells = nullptr;
  bool shared = false, initialised = false;
  std::string (*describe)(const void*) = nullptr;
};

std::string describe_shared(const void* address) {
  const auto offset = static_cast<const char*>(address) - static_cast<const char*>(window->begin);
  return "shared memory + " + std::to_string(offset) + " of " + std::to_string(window->bytes);
}

std::string describe_tensor(const void* address) {
  const size_t slot = static_cast<size_t>(static_cast<const char*>(address) - arena) / kSlot;
  const Allocation& tensor = allocations[allocation_of_slot[slot]];
  return tensor.name + " + " + std::to_string(static_cast<const char*>(address) - tensor.begin) + " of " +
         std::to_string(tensor.bytes);
}

std::string sized(size_t bytes, bool write) {
  return std::string(write ? "write" : "read") + " of " + std::to_string(bytes) + " bytes, " +
         (now != nullptr ? "thread " + std::to_string(now->thread) + " of block " + std::to_string(now->block)
                         : "host");
}

// Finds the target of an access. Returns false if it is not memory of the device, or out of bounds (then reported).
bool find(const void* address, size_t bytes, bool write, const void* caller, Target& out) {
  const char* at = static_cast<const char*>(address);
  if (window != nullptr) {
    const auto offset = static_cast<size_t>(at - static_cast<const char*>(window->begin));
    if (offset < kSharedBytes) {
      if (offset + bytes > window->bytes) {
        report("out of bounds", sized(bytes, write) + ": " + describe_shared(address), caller);
        return false;
      }
      out = {static_cast<Cell*>(window->shadow) + offset / 2, true, false, describe_shared};
      return true;
    }
  }
  const auto offset = static_cast<size_t>(at - arena);
  if (offset >= kArena) return false;
  const int index = allocation_of_slot[offset / kSlot];
  const Allocation& tensor = allocations[index];
  if (index < 0 || at < tensor.begin || at + bytes > tensor.begin + tensor.bytes) {
    const std::string where = index < 0 ? "between tensors" : describe_tensor(address);
    report("out of bounds", sized(bytes, write) + ": " + where, caller);
    return false;
  }
  out = {arena_cells + offset / 2, false, tensor.initialised, describe_tensor};
  return true;
}

bool strong(Kind kind) { return kind != Kind::kPlain; }

// Whether an earlier access of this launch by another thread is not ordered before the present one.
bool unordered(uint64_t word, Kind kind) {
  if (strong(kind) && strong(kind_of(word))) return false;
  if (block_of(word) != (now->block & (kBlocks - 1))) {
    return !now->cooperative || !order.ordered(*now, block_of(word), time_of(word), thread_of(word));
  }
  if (thread_of(word) == now->thread) return false;
  return time_of(word) >= (thread_of(word) / kWarp == now->thread / kWarp ? now->warp_time : now->block_time);
}

bool this_launch(uint64_t word) { return launch_of(word) == (now->launch & (kLaunches - 1)) && word != 0; }

struct Event {
  const void *address, *caller;
  size_t bytes;
  bool write;
  Kind kind;
  const Target* target;

  void race(uint64_t with, const char* kind_of_other) const {
    const bool block = block_of(with) != (now->block & (kBlocks - 1));
    report(block ? "race between blocks" : "race", text() + "; " + named(kind_of_other, with), caller);
  }
  std::string text() const { return sized(bytes, write) + ": " + target->describe(address); }
};

void check_reads_before(const Event& event, Cell& cell) {
  const uint64_t read = cell.read;
  if (!this_launch(read)) return;
  // Of several threads that read at one time, one is not the present one.
  const bool others = (read & kManyThreads) != 0 && block_of(read) == (now->block & (kBlocks - 1)) &&
                      time_of(read) >= now->block_time && !strong(event.kind);
  if (others || unordered(read, event.kind)) event.race(read, "read");
  if ((read & kManyBlocks) == 0) return;
  for (const uint64_t other : other_reads[&cell]) {
    if (this_launch(other) && unordered(other, event.kind)) event.race(other, "read");
  }
  other_reads.erase(&cell);
}

void note_read(Cell& cell, uint64_t tag) {
  const uint64_t before = cell.read;
  uint64_t flags = 0;
  if (this_launch(before) && before != tag) {
    if (block_of(before) != block_of(tag)) {
      flags = kManyBlocks;
      if ((before & kManyBlocks) == 0) other_reads[&cell].clear();
      // What is ordered before this read is ordered before whatever this read is.
      if (!now->cooperative || !order.ordered(*now, block_of(before), time_of(before), thread_of(before))) {
        std::vector<uint64_t>& others = other_reads[&cell];
        if (now->cooperative || others.empty()) others.push_back(before);
      } else if ((before & kManyBlocks) == 0) {
        flags = 0;
      }
    } else {
      flags = before & kManyBlocks;
      const bool same_time = time_of(before) >= now->block_time;
      if (same_time && (thread_of(before) != now->thread || (before & kManyThreads) != 0)) flags |= kManyThreads;
    }
  }
  cell.read = tag | flags;
}

void check_cell(const Event& event, Cell& cell, uint64_t tag) {
  const uint64_t write = cell.write;
  const Target& target = *event.target;
  const bool fresh = target.shared && (!this_launch(write) || block_of(write) != block_of(tag));
  if (!fresh && (write & kUnderWay) != 0) {
    report("copy under way", event.text() + "; the copy was started " + named("", write), event.caller);
  } else if (!fresh && this_launch(write) && unordered(write, event.kind)) {
    event.race(write, "write");
  }
  const bool reads = !event.write || event.kind == Kind::kAtomic;
  if (reads && (fresh || ((write & kInitialised) == 0 && !target.initialised))) {
    report(target.shared ? "uninitialised shared memory" : "uninitialised", event.text(), event.caller);
  }
  if (event.write) {
    if (!(target.shared && block_of(cell.read) != block_of(tag))) check_reads_before(event, cell);
    // An atomic after a plain write of the same thread does not make that write atomic: others must still be ordered.
    const bool keeps_plain = event.kind == Kind::kAtomic && !fresh && this_launch(write) &&
                             kind_of(write) == Kind::kPlain && block_of(write) == block_of(tag) &&
                             thread_of(write) == thread_of(tag);
    cell.write = keeps_plain ? write : tag | kInitialised;
    cell.read = 0;
  } else if ((cell.read & ~(kManyBlocks | kManyThreads)) != tag) {
    if (target.shared && block_of(cell.read) != block_of(tag)) cell.read = 0;
    note_read(cell, tag);
  }
}

// What the products of warpgroups have to do with 16 bytes of shared memory.
struct Granule {
  uint64_t writer;        // the tag of the last write
  unsigned publications;  // of the writing thread, before that write
  unsigned reads;         // by products that are under way
};
Granule granules[kSharedBytes / 16];
unsigned publications[1024];  // of each thread of a block
constexpr unsigned kPublications = 16;
unsigned published_at[1024][kPublications];  // the time of the barrier of the block before each of the last of them

template <typename Use>
void for_granules(const void* address, size_t bytes, Use use) {
  const auto offset = static_cast<size_t>(static_cast<const char*>(address) - static_cast<const char*>(window->begin));
  for (size_t i = offset / 16; i <= (offset + bytes - 1) / 16; ++i) use(granules[i]);
}

void check_products(const Event& event) {
  bool read = false;
  for_granules(event.address, event.bytes, [&](Granule& granule) {
    read |= granule.reads > 0;
    granule.writer = own_tag, granule.publications = publications[now->thread];
  });
  if (read) report("product under way", event.text() + "; a product reads it", event.caller);
}

void check(const Event& event) {
  if (event.target->shared && event.write) check_products(event);
  const uint64_t tag = own_tag | static_cast<uint64_t>(event.kind) << kKindAt;
  const size_t first = reinterpret_cast<uintptr_t>(event.address) & 1;
  const size_t cells = (first + event.bytes + 1) / 2;
  for (size_t i = 0; i < cells; ++i) {
    Cell& cell = event.target->cells[i];
    if (event.write && event.kind == Kind::kPlain && cell.write == (tag | kInitialised) && cell.read == 0) continue;
    check_cell(event, cell, tag);
  }
}

void make_tag() {
  if (now->own_time >= kMaxTime) fail("more barriers than the sanitizer can count");
  own_tag = static_cast<uint64_t>(now->launch & (kLaunches - 1)) << kLaunchAt |
            static_cast<uint64_t>(now->block & (kBlocks - 1)) << kBlockAt |
            static_cast<uint64_t>(now->own_time) << kTimeAt | now->thread;
}

}  // namespace

void observe_thread(const Place* place, const SharedWindow* shared) {
  now = place;
  window = shared;
  if (place != nullptr) make_tag();
}

void observe_launch(const void* stream, bool) {
  if (stream != expected_stream) report("stream", "a launch on another stream than the one given", nullptr);
  order.start();
  other_reads.clear();
}

void observe_end_of_launch() {}

void observe_block_barrier() {
  if (now->cooperative) order.block_barrier(*now);
}

void observe_fence() {
  if (now->cooperative) order.fence(*now);
}

void observe(const void* address, size_t bytes, bool write, Kind kind, const void* caller) {
  if (now == nullptr) return;
  Target target;
  if (!find(address, bytes, write, caller, target)) {
    const char* what = register_under_way(address, bytes, write);
    if (what != nullptr) report("product under way", sized(bytes, write) + ": " + what, caller);
    return;
  }
  if (strong(kind) && now->cooperative) {
    if (!write || kind == Kind::kAtomic) order.strong_read(*now, address);
    if (write) order.strong_write(*now, address);
  }
  check({address, caller, bytes, write, kind, &target});
}

void observe_copy(const void* to, const void* from, size_t bytes, bool valid, const void* caller) {
  Target source, target;
  const bool inside = find(from, bytes, false, caller, source);
  if (inside && valid) check({from, caller, bytes, false, Kind::kPlain, &source});
  if (!find(to, bytes, true, caller, target)) return;
  check({to, caller, bytes, true, Kind::kPlain, &target});
  for (size_t i = 0; i < bytes / 2; ++i) target.cells[i].write |= kUnderWay;
}

void observe_copy_done(const void* to, const void* from, size_t bytes, bool valid, const void* caller) {
  Target source, target;
  if (valid && find(from, bytes, false, caller, source)) check({from, caller, bytes, false, Kind::kPlain, &source});
  if (!find(to, bytes, true, caller, target)) return;
  for (size_t i = 0; i < bytes / 2; ++i) target.cells[i].write &= ~kUnderWay;
  check({to, caller, bytes, true, Kind::kPlain, &target});
}

void observe_publication() {
  unsigned& count = publications[now->thread];
  published_at[now->thread][count++ % kPublications] = now->block_time;
}

void observe_product(const void* address, bool done, const void* caller) {
  Target target;
  if (!find(address, 16, false, caller, target)) return;
  const Event event = {address, caller, 16, false, Kind::kPlain, &target};
  for_granules(address, 16, [&](Granule& granule) {
    constexpr uint64_t kOfBlock = ~((1ull << kBlockAt) - 1);
    const unsigned writer = thread_of(granule.writer);
    const unsigned since = publications[writer] - granule.publications;  // that write
    const bool late = writer != now->thread && since <= kPublications &&
                      published_at[writer][granule.publications % kPublications] >= now->block_time;
    if (((granule.writer ^ own_tag) & kOfBlock) == 0 && (since == 0 || late)) {
      report("unpublished", event.text() + "; written by thread " + std::to_string(writer), caller);
    }
    granule.reads += done ? -1 : 1;
  });
  check(event);
}

void observe_fill(const void* to, size_t bytes, const void* stream) {
  if (stream != expected_stream) report("stream", "a memset on another stream than the one given", nullptr);
  Target target;
  if (!find(to, bytes, true, nullptr, target)) return;
  for (size_t i = 0; i < (bytes + 1) / 2; ++i) target.cells[i] = {kInitialised, 0};
}

}  // namespace emulation

// ---- the tensors of a call -----------------------------------------------------------------------------------------

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Frees all tensors. Returns 0, or -1 if the address space for them cannot be reserved.
EXPORTED int sanitizer_reset(const void* stream) {
  using namespace emulation;
  const auto reserve = [](size_t bytes) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    return memory == MAP_FAILED ? nullptr : memory;
  };
  constexpr size_t kShadow = kArena / 2 * sizeof(Cell);
  if (arena == nullptr) {
    char* const memory = static_cast<char*>(reserve(kArena));
    arena_cells = static_cast<Cell*>(reserve(kShadow));
    if (memory == nullptr || arena_cells == nullptr) return -1;
    arena = memory;
  } else if (next_slot > 0) {
    madvise(arena, next_slot * kSlot, MADV_DONTNEED);
    madvise(arena_cells, next_slot * kSlot / 2 * sizeof(Cell), MADV_DONTNEED);
  }
  for (int& index : allocation_of_slot) index = -1;
  allocated = 0;
  next_slot = 0;
  expected_stream = stream;
  return 0;
}

// Returns zeroed memory whose first address is `offset` bytes off a multiple of 256, or null if there is no room.
// initialised: whether it may be read before it is written.
EXPORTED void* sanitizer_allocate(size_t bytes, size_t offset, int initialised, const char* name) {
  using namespace emulation;
  const size_t slots = (kSlot / 2 + offset + bytes) / kSlot + 1;
  if (arena == nullptr || next_slot + slots > kSlots) return nullptr;
  char* const begin = arena + next_slot * kSlot + kSlot / 2 + offset;
  for (size_t s = next_slot; s < next_slot + slots; ++s) allocation_of_slot[s] = allocated;
  allocations[allocated++] = {begin, bytes, initialised != 0, name};
  next_slot += slots;
  return begin;
}

// Returns how many of the first `bytes` bytes were never written.
EXPORTED size_t sanitizer_unwritten(const char* begin, size_t bytes) {
  size_t missing = 0;
  for (size_t i = 0; i < bytes; i += 2) {
    const auto& cell = emulation::arena_cells[static_cast<size_t>(begin + i - emulation::arena) / 2];
    missing += (cell.write & emulation::kInitialised) == 0 ? 2 : 0;
  }
  return missing;
}
