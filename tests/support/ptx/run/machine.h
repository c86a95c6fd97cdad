// The machine that executes a module: warps in lockstep, their blocks and memories, and the counts of what they did.
//
// The threads of a warp execute each instruction together. Where they part, a stack holds the parts; they join again at
// the reconvergence point of the branch. A warp runs until it waits at a barrier, ends or sleeps; blocks run one after
// another, those of a cooperative launch in turns.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../../cuda_emulation/matrix_descriptor.h"
#include "../parse/module.h"

namespace ptx {

// What one instruction of the module did in all launches since the last reset.
struct Count {
  uint64_t executed = 0;  // by a warp, predicated off or not
  uint64_t lanes = 0;     // that were active
  uint64_t units = 0;  // global memory: sectors of 32 bytes; shared memory: wavefronts; branches: times threads parted
  uint64_t least = 0;  // the units that the same bytes need at least
  uint64_t shared_units = 0, shared_least = 0;  // of a generic access that found shared memory: its wavefronts
};

struct Launch {
  std::string kernel;
  uint32_t grid[3];
  uint32_t threads;
  uint64_t shared_bytes;
};

// Memory that is not cleared when it grows: frames are large, and most of their rows are never used.
class Buffer {
 public:
  uint8_t* data() { return data_.get(); }
  uint8_t* at_least(size_t bytes) {
    if (bytes > bytes_) {
      bytes_ = (bytes + 63) / 64 * 64;
      data_.reset(static_cast<uint8_t*>(std::aligned_alloc(64, bytes_)));
      memset(data_.get(), 0, bytes_);
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(uint8_t* data) const { std::free(data); }
  };
  std::unique_ptr<uint8_t[], Free> data_;
  size_t bytes_ = 0;
};

// Threads of a warp that are at the same place.
struct Part {
  uint32_t pc, reconvergence, lanes;
};

struct Frame {
  const Function* function = nullptr;
  Buffer rows, arguments, outgoing;  // arguments: 8 bytes per lane and argument
  std::vector<Part> parts;
  uint32_t local_base = 0;
};

// An asynchronous copy of a warp to shared memory. It is executed when it is waited for, so that a missing wait shows.
struct Copy {
  uint32_t lanes, bytes;
  uint32_t to[kLanes], valid[kLanes];
  uint64_t from[kLanes];
};

// The part of a warp in a product of a warpgroup. It is executed when it is waited for; until then its sums are NaN,
// and neither they nor its factors may be written.
struct Product {
  const Instruction* in;
  uint32_t rows[4][kLanes];       // the factor in registers
  Factor factor;                  // the one in shared memory
  std::vector<uint16_t> columns;  // what that was when the product was started: [columns][16]
  std::vector<float> before;      // the sums; empty if they are those of the product before
  bool accumulates;
};

enum class State : uint8_t { kReady, kWaiting, kAsleep, kFinished };

struct Block;
struct Machine;

struct Warp {
  Machine* machine = nullptr;
  Block* block = nullptr;
  uint8_t* rows = nullptr;  // of the current frame
  std::vector<std::unique_ptr<Frame>> frames;
  size_t depth = 0;  // frames in use
  Buffer local;
  uint32_t index = 0;
  State state = State::kFinished;
  uint32_t waits_for = 0;    // number of the barrier
  int64_t reduced_row = -1;  // the predicate that receives the result of the barrier's reduction
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> committed;
  std::vector<Product> open_products, committed_products;
  bool registers_fenced = false;  // since the last commit of products and the last wait for them
  std::map<uint32_t, std::vector<uint32_t>> fenced_rows;  // what the registers of the next products held at that fence
  std::vector<uint32_t> products;  // the numbers of the instructions that the warpgroup executes together

  Frame& frame() { return *frames[depth - 1]; }
  template <typename T>
  T* row(uint32_t offset) {
    return reinterpret_cast<T*>(rows + offset);
  }
};

struct Barrier {
  uint32_t arrived = 0, votes = 0;
};

struct Block {
  uint32_t index[3] = {};
  std::vector<std::unique_ptr<Warp>> warps;
  Buffer shared;
  Barrier barriers[16];
  uint32_t running = 0;
};

enum Order : int { kForward = 0, kBackward = 1, kShuffled = 2 };

// How tensor cores add: a group of products and the accumulator are truncated to 24 + extra_bits bits relative to the
// greatest of their exponents (that of a product is the sum of those of its factors), summed exactly, and truncated to
// float; groups follow one another. Groups of 8 and one extra bit are an A100, 16 and two an H100 (arXiv 2511.10909).
struct ProductModel {
  int group = 8, extra_bits = 1;
};

constexpr uint32_t kLocalBytes = 16 * 1024;  // of a thread
constexpr uint32_t kPatience = 100000;       // turns of all resident blocks without progress before it fails

struct Machine {
  Module module;
  ProductModel product_model;
  std::vector<Count> counts;
  std::vector<Launch> launches;
  Order order = kForward;
  uint64_t products = 0;  // of matrices
  bool dry = false;       // launches are recorded, but not executed

  // The launch in progress.
  const Function* kernel = nullptr;
  uint32_t grid[3] = {1, 1, 1}, threads = 0;
  uint32_t shared_bytes = 0;
  std::vector<uint8_t> parameters;
  std::vector<std::unique_ptr<Block>> blocks;  // reused

  explicit Machine(const std::string& text);
  void launch(int function, const uint32_t (&grid)[3], uint32_t threads, uint64_t dynamic_shared,
              const void* const* arguments, bool cooperative);
  Count& count(const Instruction& in) { return counts[in.number]; }

 private:
  void enter(Block& block, uint32_t index);
  void start(Warp& warp);
  void run_resident(uint32_t count);
  bool run_block(Block& block, const std::vector<uint32_t>& sequence);
  void run_warp(Warp& warp);
  void call(Warp& warp, const Instruction& in);
  std::string place_of(Warp& warp) const;
  void arrive(Warp& warp, const Instruction& in, const Part& part);
  std::vector<uint32_t> ordered(uint32_t count) const;
};

// Calls f(lane) for the active lanes. Without a branch where all are active, which is the rule.
template <typename F>
inline void for_lanes(uint32_t lanes, F f) {
  if (lanes == kAllLanes) {
#pragma GCC ivdep
    for (int i = 0; i < kLanes; ++i) f(i);
  } else {
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) f(__builtin_ctz(rest));
  }
}

// The opcodes of each file.
void add_arithmetic(const std::function<void(const Opcode&)>& add);
void add_comparisons(const std::function<void(const Opcode&)>& add);
void add_conversions(const std::function<void(const Opcode&)>& add);
void add_memory(const std::function<void(const Opcode&)>& add);
void add_warp(const std::function<void(const Opcode&)>& add);
void add_warpgroup(const std::function<void(const Opcode&)>& add);

// Executes the copies of all but the last `pending` commits of the warp.
void complete_copies(Warp& warp, size_t pending);

// Fails unless the warps of each warpgroup of a block that has ended have executed the same products.
void check_warpgroups(const Block& block, uint32_t warps);

}  // namespace ptx
