// The emulated device: runs the threads of a block as fibers, in an order that the tests choose.
//
// A fiber runs until it must wait. In forward and backward order a warp runs as far ahead of the others as barriers
// allow. A missing barrier gives a wrong result: in one of the orders something is read before it is written, or
// overwritten before it is read. The blocks of a cooperative launch are all resident and take turns; each runs until
// all of its threads wait or sleep.
#include "scheduler.h"

#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <random>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cpr {
alignas(1024) float4 dynamic_shared[emulation::kSharedBytes / sizeof(float4)];  // the memory behind `extern __shared__`
}  // namespace cpr

namespace emulation {
namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr size_t kStackBytes = 128 * 1024;

struct Barrier {
  unsigned arrived = 0, passed = 0;
  Site site = {"", 0};  // where the threads that have arrived are
};

struct Fiber {
  dim3 index;
  jmp_buf resume;
  bool started = false, finished = true, asleep = false;
  const unsigned* waits_for = nullptr;  // `passed` of a barrier; the fiber can run when it differs from `seen`
  unsigned seen = 0;
  unsigned fenced = 0;  // the time of its last fence
  Copies copies;
  Products products;
};

struct Warp {
  Barrier barrier;
  unsigned time;  // of its last memory barrier
  alignas(16) unsigned char values[2][kWarp * kLaneBytes];
};

enum Order { kForward = 0, kBackward = 1, kShuffled = 2 };

// A resident block. Its shared memory is in cpr::dynamic_shared while it runs, and here while other blocks run.
struct Block {
  dim3 index;
  Fiber fibers[kMaxThreads];
  Warp warps[kMaxThreads / kWarp];
  Barrier warpgroups[kMaxThreads / kWarpgroup];
  Barrier barrier;
  bool votes[2];
  unsigned running;     // threads that have not ended
  unsigned time, last;  // of the last barrier of the block, and of the last barrier of it or of one of its warps
  std::vector<unsigned char> shared;
  std::vector<uint64_t> shadow;
  SharedWindow window;
};

constexpr unsigned kWhole = 8;          // blocks along an axis of which all run even where only edges do
constexpr unsigned kPatience = 100000;  // turns of all resident blocks without progress before it aborts

std::vector<std::unique_ptr<Block>> blocks;  // every launch reuses their fibers
Block* here;                                 // the running block
unsigned threads;                            // of a block
Fiber* current;
jmp_buf scheduler;
ucontext_t entry_return;
const std::function<void()>* body;
Order order = kForward;
unsigned char poison = 0xff;  // in uninitialised shared memory: a NaN in every float
enum Chosen { kAllBlocks = 0, kEdges = 1, kLast = 2 };
Chosen chosen_blocks = kAllBlocks;
Place place;

void give_way() {
  if (_setjmp(current->resume) == 0) _longjmp(scheduler, 1);
}

// A fiber is reused for the thread of the same number in the next block.
void fiber_main() {
  for (;;) {
    (*body)();
    const Copies& own = current->copies;
    if (!own.open.empty() || !own.committed.empty()) fail("a thread ended before its copies had landed");
    const Products& products = current->products;
    if (!products.open.empty() || !products.committed.empty()) fail("a thread ended before its products were complete");
    current->finished = true;
    give_way();
  }
}

void start(Fiber& fiber) {
  void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (stack == MAP_FAILED) fail("no memory for a stack");
  mprotect(stack, 4096, PROT_NONE);  // a stack overflow causes a fault
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  fiber.started = true;
  swapcontext(&entry_return, &context);
}

// Tells the observer which thread runs, and the last barriers of its block and warp.
void observe_current() {
  place.thread = threadIdx.x;
  place.block_time = here->time;
  place.warp_time = here->warps[threadIdx.x / kWarp].time;
  place.own_time = std::max(place.warp_time, current->fenced);
  observe_thread(&place, &here->window);
}

void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.index;
  observe_current();
  if (_setjmp(scheduler) == 0) {
    if (fiber.started) _longjmp(fiber.resume, 1);
    start(fiber);
  }
}

// Waits until `expected` threads have arrived; the last of them calls complete().
template <typename Complete>
void wait(Barrier& barrier, unsigned expected, Site site, Complete complete) {
  if (barrier.arrived > 0 && (barrier.site.line != site.line || strcmp(barrier.site.file, site.file) != 0)) {
    fprintf(stderr, "%s:%d and %s:%d: ", barrier.site.file, barrier.site.line, site.file, site.line);
    fail("threads wait for each other at different lines");
  }
  barrier.site = site;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.passed;
    complete();
    observe_current();
    return;
  }
  current->waits_for = &barrier.passed;
  current->seen = barrier.passed;
  give_way();
}

// Gives every runnable fiber of a group one turn. Returns false if there was none.
bool run_group(const unsigned* sequence, unsigned count) {
  bool progress = false;
  for (unsigned i = 0; i < count; ++i) {
    Fiber& fiber = here->fibers[sequence[i]];
    if (fiber.finished || fiber.asleep || (fiber.waits_for != nullptr && *fiber.waits_for == fiber.seen)) continue;
    fiber.waits_for = nullptr;
    resume(fiber);
    here->running -= fiber.finished;
    progress = true;
  }
  return progress;
}

// Runs a block until all of its threads have ended, wait or sleep. Returns whether it made progress beyond sleeping.
bool run_block(const std::vector<unsigned>& sequence) {
  bool any_asleep = false;
  for (unsigned t = 0; t < threads; ++t) {
    any_asleep |= here->fibers[t].asleep;
    here->fibers[t].asleep = false;
  }
  const unsigned group = order == kShuffled ? threads : kWarp;
  unsigned turns = 0;
  for (bool progress = true; progress;) {
    progress = false;
    for (unsigned first = 0; first < threads; first += group) {
      while (run_group(&sequence[first], group)) progress = true;
    }
    turns += progress;
  }
  const bool asleep = std::any_of(here->fibers, here->fibers + threads, [](const Fiber& f) { return f.asleep; });
  if (here->running > 0 && !asleep) fail("a barrier that not every thread reaches");
  return !(any_asleep && asleep && turns <= 1);
}

std::vector<unsigned> ordered(unsigned count) {
  static std::mt19937 random(0);
  std::vector<unsigned> sequence(count);
  for (unsigned i = 0; i < count; ++i) sequence[i] = order == kBackward ? count - 1 - i : i;
  if (order == kShuffled) std::shuffle(sequence.begin(), sequence.end(), random);
  return sequence;
}

}  // namespace

void fail(const char* what) {
  fprintf(stderr, "emulated device: %s (block %u,%u,%u thread %u)\n", what, blockIdx.x, blockIdx.y, blockIdx.z,
          threadIdx.x);
  print_reports();
  abort();
}

void block_barrier(Site site) {
  wait(here->barrier, threads, site, [] {
    observe_block_barrier();
    here->time = ++here->last;
    for (unsigned w = 0; w < threads / kWarp; ++w) here->warps[w].time = here->time;
  });
}

void warp_barrier(Site site) {
  wait(here->warps[threadIdx.x / kWarp].barrier, kWarp, site, [] {});
}

void warpgroup_barrier(Site site) {
  wait(here->warpgroups[threadIdx.x / kWarpgroup], kWarpgroup, site, [] {});
}

// What a thread does after a fence has a later time than what the fence orders.
void fence() {
  observe_fence();
  current->fenced = ++here->last;
  observe_current();
}

void warp_fence(Site site) {
  Warp& warp = here->warps[threadIdx.x / kWarp];
  wait(warp.barrier, kWarp, site, [&] { warp.time = ++here->last; });
}

void sleep() {
  current->asleep = true;
  give_way();
}

void* lane_values() {
  Warp& warp = here->warps[threadIdx.x / kWarp];
  return warp.values[warp.barrier.passed & 1];
}

bool block_or(bool value, Site site) {
  const unsigned turn = here->barrier.passed & 1;
  here->votes[turn] |= value;
  if (here->barrier.arrived + 1 == threads) here->votes[turn ^ 1] = false;  // all threads have read the previous vote
  block_barrier(site);
  return here->votes[turn];
}

unsigned long launches = 0;

Copies& copies() { return current->copies; }
Products& products() { return current->products; }

namespace {

// Makes `here` the block of this number, with all threads at their start and shared memory filled with NaN.
void enter(unsigned slot, dim3 index, size_t asked_bytes) {
  const size_t shared_bytes = asked_bytes + sizeof(float4) * kWarp;  // more, to notice writes past the end
  while (blocks.size() <= slot) blocks.push_back(std::make_unique<Block>());
  here = blocks[slot].get();
  here->index = index;
  here->running = threads;
  here->votes[0] = here->votes[1] = false;
  here->time = here->last = 0;
  here->barrier = {};
  here->shared.assign(shared_bytes, poison);
#ifdef CPR_SANITIZE
  here->shadow.resize(std::max(here->shadow.size(), shared_bytes));  // tagged by launch and block, so never cleared
#endif
  here->window = {cpr::dynamic_shared, asked_bytes, here->shadow.data()};
  for (Warp& warp : here->warps) warp.time = 0, warp.barrier = {};
  for (Barrier& barrier : here->warpgroups) barrier = {};
  for (unsigned t = 0; t < threads; ++t) {
    here->fibers[t].finished = here->fibers[t].asleep = false;
    here->fibers[t].waits_for = nullptr;
    here->fibers[t].fenced = 0;
    here->fibers[t].index = dim3(t, 0, 0);
  }
}

// Returns the linear indices of the blocks to run. The grids of the kernels have fewer than 2^32
// blocks.
std::vector<unsigned> chosen(dim3 grid) {
  std::vector<unsigned> indices;
  const auto along = [](unsigned size) {
    if (chosen_blocks == kEdges && size > kWhole) return std::vector<unsigned>{0, size - 2, size - 1};
    const bool last = chosen_blocks == kLast && size > kWhole;
    std::vector<unsigned> at;
    for (unsigned i = last ? size - 1 : 0; i < size; ++i) at.push_back(i);
    return at;
  };
  for (const unsigned z : along(grid.z)) {
    for (const unsigned y : along(grid.y)) {
      for (const unsigned x : along(grid.x)) indices.push_back((z * grid.y + y) * grid.x + x);
    }
  }
  return indices;
}

// Runs the first `resident` blocks to their end, in turns.
void run_resident(unsigned resident, const std::vector<unsigned>& sequence, size_t asked_bytes) {
  for (unsigned idle = 0, ended = 0; ended < resident;) {
    bool progress = false;
    ended = 0;
    for (unsigned slot = 0; slot < resident; ++slot) {
      here = blocks[slot].get();
      if (here->running > 0) {
        blockIdx = here->index;
        place.block = (here->index.z * gridDim.y + here->index.y) * gridDim.x + here->index.x;
        memcpy(cpr::dynamic_shared, here->shared.data(), here->shared.size());
        progress |= run_block(sequence);
        memcpy(here->shared.data(), cpr::dynamic_shared, here->shared.size());
      }
      if (here->running > 0) continue;
      ++ended;
      for (size_t i = asked_bytes; i < here->shared.size(); ++i) {
        if (here->shared[i] != poison) fail("a write past the shared memory asked for");
      }
    }
    idle = progress ? 0 : idle + 1;
    if (idle > kPatience) fail("blocks that wait for each other, or for one that is not resident");
  }
}

}  // namespace

cudaError_t run(const cudaLaunchConfig_t& config, const void* function, const std::function<void()>& kernel) {
  if (refused() != cudaSuccess) return refused();
  const dim3 grid = config.gridDim;
  threads = config.blockDim.x * config.blockDim.y * config.blockDim.z;
  if (threads == 0 || threads > kMaxThreads || threads % kWarp != 0 || config.blockDim.x != threads ||
      config.dynamicSmemBytes > allowed_shared(function) || grid.x == 0 || grid.x > INT32_MAX || grid.y == 0 ||
      grid.y > 65535 || grid.z == 0 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  const std::vector<unsigned> indices = chosen(grid);
  const unsigned count = static_cast<unsigned>(indices.size());
  bool cooperative = false;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    cooperative |= config.attrs[i].id == cudaLaunchAttributeCooperative && config.attrs[i].val.cooperative != 0;
  }
  if (cooperative && count > static_cast<unsigned>(processors)) return cudaErrorCooperativeLaunchTooLarge;
  place = {static_cast<unsigned>(++launches), 0, 0, 0, 0, 0, cooperative};
  observe_launch(config.stream, cooperative);
  body = &kernel;
  gridDim = grid;
  blockDim = config.blockDim;
  const std::vector<unsigned> sequence = ordered(threads);
  const unsigned resident = cooperative ? count : 1;
  unsigned entered = 0;
  for (const unsigned i : ordered(count)) {
    const unsigned b = indices[i];
    enter(entered++, dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y), config.dynamicSmemBytes);
    if (entered < resident) continue;
    run_resident(resident, sequence, config.dynamicSmemBytes);
    entered = 0;
  }
  observe_thread(nullptr, nullptr);
  observe_end_of_launch();
  return cudaSuccess;
}

}  // namespace emulation

// Sets the order of the threads of a block and of the blocks of a grid: 0 forward, 1 backward, 2 shuffled.
extern "C" __attribute__((visibility("default"))) void emulation_set_order(int order) {
  emulation::order = static_cast<emulation::Order>(order);
}

// Runs all blocks (0), the first and the last two along every long axis (1), or only the last (2), for calls too large
// to run whole.
extern "C" __attribute__((visibility("default"))) void emulation_choose_blocks(int chosen) {
  emulation::chosen_blocks = static_cast<emulation::Chosen>(chosen);
}

// Sets the byte that uninitialised shared memory consists of.
extern "C" __attribute__((visibility("default"))) void emulation_set_poison(int byte) {
  emulation::poison = static_cast<unsigned char>(byte);
}

extern "C" __attribute__((visibility("default"))) unsigned long emulation_launches() { return emulation::launches; }
