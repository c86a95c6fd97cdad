#include "machine.h"

#include <algorithm>
#include <numeric>
#include <random>

namespace ptx {

Machine::Machine(const std::string& text) : module(parse(text)), counts(module.instructions) {
  if (module.target.compare(0, 4, "sm_9") == 0) product_model = {16, 2};
}

std::vector<uint32_t> Machine::ordered(uint32_t count) const {
  static std::mt19937 random(0);
  std::vector<uint32_t> sequence(count);
  std::iota(sequence.begin(), sequence.end(), 0);
  if (order == kBackward) std::reverse(sequence.begin(), sequence.end());
  if (order == kShuffled) std::shuffle(sequence.begin(), sequence.end(), random);
  return sequence;
}

namespace {

// Makes a frame of the function the current one of the warp, for these threads.
void push_frame(Warp& warp, const Function& function, uint32_t lanes, uint32_t local_base) {
  if (warp.frames.size() == warp.depth) warp.frames.push_back(std::make_unique<Frame>());
  Frame& frame = *warp.frames[warp.depth++];
  frame.function = &function;
  warp.rows = frame.rows.at_least(function.frame_bytes);
  frame.outgoing.at_least(function.call_bytes * kLanes);
  frame.local_base = local_base;
  const auto end = static_cast<uint32_t>(function.code.size());
  frame.parts.assign(1, {0, end, lanes});
  memcpy(warp.rows + function.constant_rows, function.constants.data(), function.constants.size());
  const Machine& machine = *warp.machine;
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint32_t thread = warp.index * kLanes + static_cast<uint32_t>(lane);
    uint32_t* at = warp.row<uint32_t>(0) + lane;
    for (int i = 0; i < 3; ++i) {
      at[(kTid + i) * kLanes] = i == 0 ? thread : 0;
      at[(kNtid + i) * kLanes] = i == 0 ? machine.threads : 1;
      at[(kCtaid + i) * kLanes] = warp.block->index[i];
      at[(kNctaid + i) * kLanes] = machine.grid[i];
    }
    at[kLaneId * kLanes] = static_cast<uint32_t>(lane);
  }
  memset(warp.row<uint8_t>(kZero * 4 * kLanes), 0, 8 * kLanes);
  // Addresses of local variables are offsets in the memory of the thread; the frame of a called function follows.
}

}  // namespace

void Machine::start(Warp& warp) {
  warp.machine = this;
  warp.depth = 0;
  warp.open.clear(), warp.committed.clear();
  warp.open_products.clear(), warp.committed_products.clear(), warp.products.clear();
  warp.registers_fenced = false;
  warp.state = State::kReady;
  warp.local.at_least(size_t{kLocalBytes} * kLanes);
  push_frame(warp, *kernel, kAllLanes, 0);
}

void Machine::enter(Block& block, uint32_t index) {
  block.index[0] = index % grid[0], block.index[1] = index / grid[0] % grid[1],
  block.index[2] = index / grid[0] / grid[1];
  block.running = threads / kLanes;
  memset(block.shared.at_least(shared_bytes), 0xff, shared_bytes);  // a NaN in every float
  for (Barrier& barrier : block.barriers) barrier = {};
  while (block.warps.size() < block.running) block.warps.push_back(std::make_unique<Warp>());
  for (uint32_t w = 0; w < block.running; ++w) {
    block.warps[w]->block = &block;
    block.warps[w]->index = w;
    start(*block.warps[w]);
  }
}

void Machine::call(Warp& warp, const Instruction& in) {
  if (in.callee < 0) throw Error("an assertion of the kernel failed");
  Frame& caller = warp.frame();
  const Function& function = module.functions[in.callee];
  const uint32_t base = caller.local_base + caller.function->local_bytes;
  if (base + function.local_bytes > kLocalBytes)
    throw Error("local memory: more than " + std::to_string(kLocalBytes) + " bytes");
  if (base != 0 && function.local_bytes != 0) throw Error("a called function with local variables");
  push_frame(warp, function, caller.parts.back().lanes, base);
  const size_t bytes = size_t{function.parameter_bytes} * kLanes;
  if (bytes > 0) memcpy(warp.frame().arguments.at_least(bytes), caller.outgoing.data(), bytes);
}

// The warp waits until all warps have arrived. A reduction is the `or` of the predicates of all threads.
void Machine::arrive(Warp& warp, const Instruction& in, const Part& part) {
  const std::vector<Part>& parts = warp.frame().parts;
  const auto end = static_cast<uint32_t>(warp.frame().function->code.size());
  bool whole = part.lanes == kAllLanes;
  if (!whole && warp.depth == 1) {  // the other threads may have ended
    whole = std::all_of(parts.begin(), parts.end() - 1, [&](const Part& p) { return p.pc == end; });
  }
  if (!whole) throw Error("a barrier that only some threads of a warp reach");
  const bool reduces = in.operands >= 3;
  const uint32_t number = *warp.row<uint32_t>(in.at[reduces ? 1 : 0]);
  if (number >= 16) throw Error("a barrier above 15");
  Barrier& barrier = warp.block->barriers[number];
  if (reduces) barrier.votes |= *warp.row<uint32_t>(in.at[2]) & part.lanes;
  warp.reduced_row = reduces ? static_cast<int64_t>(in.at[0]) : -1;
  warp.waits_for = number;
  warp.state = State::kWaiting;
  uint32_t expected = threads / kLanes;
  if (!reduces && in.operands == 2) expected = *warp.row<uint32_t>(in.at[1]) / kLanes;
  if (++barrier.arrived < expected) return;
  const uint32_t result = barrier.votes != 0 ? kAllLanes : 0;
  barrier = {};
  for (auto& other : warp.block->warps) {
    if (other->state != State::kWaiting || other->waits_for != number) continue;
    if (other->reduced_row >= 0) *other->row<uint32_t>(static_cast<uint32_t>(other->reduced_row)) = result;
    other->state = State::kReady;
  }
}

namespace {

// Ends the frame of the warp if all its threads are at its end; otherwise joins the parts at a reconvergence point.
void join(Warp& warp) {
  Frame& frame = warp.frame();
  frame.parts.pop_back();
  if (!frame.parts.empty()) return;
  if (--warp.depth > 0) {
    warp.rows = warp.frame().rows.data();
    return;
  }
  if (!warp.open.empty() || !warp.committed.empty()) throw Error("a thread ended before its copies had landed");
  if (!warp.open_products.empty() || !warp.committed_products.empty())
    throw Error("a thread ended before its products were complete");
  warp.state = State::kFinished;
  --warp.block->running;
}

void branch(Warp& warp, const Instruction& in, uint32_t taken, Count& count) {
  std::vector<Part>& parts = warp.frame().parts;
  Part& part = parts.back();
  const auto end = static_cast<uint32_t>(warp.frame().function->code.size());
  const uint32_t target = in.opcode->flow == Flow::kReturn ? end : in.target;
  if (taken == part.lanes) {
    part.pc = target;
  } else if (taken == 0) {
    ++part.pc;
  } else {
    ++count.units;
    const uint32_t next = part.pc + 1, rest = part.lanes & ~taken, joined = in.reconvergence;
    part.pc = joined;
    if (next != joined) parts.push_back({next, joined, rest});
    if (target != joined) parts.push_back({target, joined, taken});
  }
}

}  // namespace

void Machine::run_warp(Warp& warp) {
  while (warp.state == State::kReady) {
    Part& part = warp.frame().parts.back();
    if (part.pc == part.reconvergence) {
      join(warp);
      continue;
    }
    const Instruction& in = warp.frame().function->code[part.pc];
    uint32_t lanes = part.lanes;
    if (in.guard >= 0) {
      const uint32_t guard = *warp.row<uint32_t>(static_cast<uint32_t>(in.guard));
      lanes &= in.guard_negated ? ~guard : guard;
    }
    Count& count = counts[in.number];
    ++count.executed;
    count.lanes += static_cast<uint64_t>(__builtin_popcount(lanes));
    switch (in.opcode->flow) {
      case Flow::kNext:
        if (lanes != 0) in.opcode->execute(warp, in, lanes);
        ++part.pc;
        break;
      case Flow::kBranch:
      case Flow::kReturn:
        branch(warp, in, lanes, count);
        break;
      case Flow::kCall:
        if (lanes != 0) call(warp, in);
        ++part.pc;  // of the caller
        break;
      case Flow::kBarrier:
        if (lanes != part.lanes) throw Error("a barrier under a predicate that only some threads have");
        arrive(warp, in, part);
        ++part.pc;
        break;
      case Flow::kYield:
        ++part.pc;
        warp.state = State::kAsleep;
        break;
    }
  }
}

// Returns where a warp is, for an error message.
std::string Machine::place_of(Warp& warp) const {
  if (warp.depth == 0) return " (" + kernel->name + ")";
  const Frame& frame = warp.frame();
  const uint32_t pc = frame.parts.empty() ? 0 : frame.parts.back().pc;
  std::string place = " (block " + std::to_string(warp.block->index[0]) + "," + std::to_string(warp.block->index[1]) +
                      "," + std::to_string(warp.block->index[2]) + " warp " + std::to_string(warp.index);
  if (pc < frame.function->code.size()) {
    const Instruction& in = frame.function->code[pc];
    const auto file = static_cast<size_t>(in.file);
    place += std::string(", ") + in.opcode->name;
    if (file < module.files.size()) place += " at " + module.files[file] + ":" + std::to_string(in.line);
  }
  return place + ")";
}

// Runs a block until all of its warps have ended, wait or sleep. Returns whether it made progress beyond sleeping.
bool Machine::run_block(Block& block, const std::vector<uint32_t>& sequence) {
  bool slept = false;
  for (uint32_t w : sequence) {
    if (block.warps[w]->state != State::kAsleep) continue;
    block.warps[w]->state = State::kReady;
    slept = true;
  }
  int turns = 0;
  for (bool progress = true; progress; turns += progress) {
    progress = false;
    for (uint32_t w : sequence) {
      if (block.warps[w]->state != State::kReady) continue;
      try {
        run_warp(*block.warps[w]);
      } catch (const Error& error) {
        throw Error(error.what() + place_of(*block.warps[w]));
      }
      progress = true;
    }
  }
  bool asleep = false;
  for (uint32_t w : sequence) asleep |= block.warps[w]->state == State::kAsleep;
  if (block.running > 0 && !asleep) throw Error("a barrier that not every warp reaches");
  if (block.running == 0) check_warpgroups(block, threads / kLanes);
  return !(slept && asleep && turns <= 1);
}

void Machine::run_resident(uint32_t count) {
  const std::vector<uint32_t> sequence = ordered(threads / kLanes);
  uint32_t idle = 0;
  for (uint32_t ended = 0; ended < count;) {
    bool progress = false;
    ended = 0;
    for (uint32_t slot = 0; slot < count; ++slot) {
      if (blocks[slot]->running > 0) progress |= run_block(*blocks[slot], sequence);
      ended += blocks[slot]->running == 0;
    }
    idle = progress ? 0 : idle + 1;
    if (idle > kPatience) throw Error("blocks that wait for each other");
  }
}

void Machine::launch(int function, const uint32_t (&blocks_along)[3], uint32_t block_threads, uint64_t dynamic_shared,
                     const void* const* arguments, bool cooperative) {
  kernel = &module.functions[function];
  std::copy(blocks_along, blocks_along + 3, grid);
  threads = block_threads;
  shared_bytes = static_cast<uint32_t>(module.static_shared + dynamic_shared);
  parameters.assign(kernel->parameter_bytes, 0);
  for (size_t i = 0; i < kernel->parameters.size(); ++i) {
    memcpy(parameters.data() + kernel->parameters[i].offset, arguments[i], kernel->parameters[i].bytes);
  }
  launches.push_back({kernel->name, {grid[0], grid[1], grid[2]}, threads, dynamic_shared});
  if (dry) return;
  const uint32_t total = grid[0] * grid[1] * grid[2], resident = cooperative ? total : 1;
  uint32_t entered = 0;
  for (const uint32_t b : ordered(total)) {
    while (blocks.size() <= entered) blocks.push_back(std::make_unique<Block>());
    enter(*blocks[entered++], b);
    if (entered < resident) continue;
    run_resident(entered);
    entered = 0;
  }
}

}  // namespace ptx
