// Instructions of a whole warp: shuffles, votes, matrices and their products; and what only controls the execution.
#include <algorithm>
#include <cmath>

#include "operations.h"
#include "products.h"

namespace ptx {

void count_wavefronts(Count& count, const uint64_t* address, uint32_t lanes, uint32_t bytes);

namespace {

using Sink = std::function<void(const std::string&, Class, Handler)>;

enum Shuffle { kUp, kDown, kButterfly, kIndexed };

void require_members(Warp& w, uint32_t mask_row, uint32_t lanes) {
  const uint32_t members = *w.row<uint32_t>(mask_row);
  if ((members & lanes) != members) throw Error("a warp instruction names threads that do not reach it together");
}

// Operands: the value, optionally the predicate of a valid source, then the source, distance, clamp and members.
template <Shuffle kKind>
void shuffle(Warp& w, const Instruction& in, uint32_t lanes) {
  const int first = in.operands == 6 ? 2 : 1;  // of the source
  require_members(w, in.at[first + 3], lanes);
  uint32_t source[kLanes], valid = 0;
  memcpy(source, w.rows + in.at[first], sizeof source);
  for_lanes(lanes, [&](int lane) {
    const int by = get<int32_t>(w.rows + in.at[first + 1], lane) & 31;
    const uint32_t clamp = get<uint32_t>(w.rows + in.at[first + 2], lane);
    const int segments = static_cast<int>(clamp >> 8 & 31), bound = static_cast<int>(clamp & 31);
    const int least = lane & segments, greatest = least | (bound & ~segments);
    int from = kKind == kUp          ? lane - by
               : kKind == kDown      ? lane + by
               : kKind == kButterfly ? lane ^ by
                                     : least | (by & ~segments);
    const bool inside = kKind == kUp ? from >= greatest : from <= greatest;
    if (!inside) from = lane;
    if (!(lanes >> from & 1)) throw Error("a shuffle reads a thread that does not reach it");
    valid |= static_cast<uint32_t>(inside) << lane;
    put<uint32_t>(w.rows + in.at[0], lane, source[from]);
  });
  if (first == 2) {
    uint32_t& out = *w.row<uint32_t>(in.at[1]);
    out = (out & ~lanes) | (valid & lanes);
  }
}

enum Vote { kAny, kEvery, kBallot };

template <Vote kKind>
void vote(Warp& w, const Instruction& in, uint32_t lanes) {
  require_members(w, in.at[2], lanes);
  const uint32_t votes = *w.row<uint32_t>(in.at[1]) & lanes;
  if (kKind == kBallot) {
    for_lanes(lanes, [&](int i) { put<uint32_t>(w.rows + in.at[0], i, votes); });
    return;
  }
  uint32_t& out = *w.row<uint32_t>(in.at[0]);
  const bool result = kKind == kAny ? votes != 0 : votes == lanes;
  out = (out & ~lanes) | (result ? lanes : 0);
}

template <typename T, typename F>
void reduce(Warp& w, const Instruction& in, uint32_t lanes) {
  require_members(w, in.at[2], lanes);
  T result = get<T>(w.rows + in.at[1], __builtin_ctz(lanes));
  for (uint32_t rest = lanes & (lanes - 1); rest != 0; rest &= rest - 1) {
    result = F()(result, get<T>(w.rows + in.at[1], __builtin_ctz(rest)));
  }
  for_lanes(lanes, [&](int i) { put<T>(w.rows + in.at[0], i, result); });
}

struct Greater {
  template <typename T>
  T operator()(T a, T b) const {
    return std::max(a, b);
  }
};
struct Lesser {
  template <typename T>
  T operator()(T a, T b) const {
    return std::min(a, b);
  }
};

// Loads 8 x 8 matrices of 16-bit elements: lane 8 m + r holds the address of row r of matrix m.
template <int kMatrices, bool kTransposed>
void load_matrices(Warp& w, const Instruction& in, uint32_t lanes) {
  if (lanes != kAllLanes) throw Error("ldmatrix by a part of a warp");
  uint64_t address[kLanes];
  const uint16_t* rows[kLanes];
  for (int i = 0; i < 8 * kMatrices; ++i) {
    address[i] = get<uint32_t>(w.rows + in.at[kMatrices], i) + static_cast<uint32_t>(in.displacement);
    if (address[i] % 16 != 0) throw Error("ldmatrix: a row that is not aligned to 16 bytes");
    if (address[i] + 16 > w.machine->shared_bytes)
      throw Error("ldmatrix: a row outside the shared memory of the block");
    rows[i] = reinterpret_cast<const uint16_t*>(w.block->shared.data() + address[i]);
  }
  count_wavefronts(w.machine->count(in), address, kMatrices == 4 ? kAllLanes : (1u << 8 * kMatrices) - 1, 16);
  for (int m = 0; m < kMatrices; ++m) {
    uint32_t* out = w.row<uint32_t>(in.at[m]);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int along = lane / 4, across = lane % 4 * 2;
      uint32_t low, high;
      if (kTransposed)
        low = rows[m * 8 + across][along], high = rows[m * 8 + across + 1][along];
      else
        low = rows[m * 8 + along][across], high = rows[m * 8 + along][across + 1];
      out[lane] = low | high << 16;
    }
  }
}

// d [16, 8] = a [16, 16] b [16, 8] + c; lane l holds rows l/4 and l/4 + 8, and columns 2(l%4) and 2(l%4) + 1.
template <typename Type>
void multiply(Warp& w, const Instruction& in, uint32_t lanes) {
  if (lanes != kAllLanes) throw Error("mma by a part of a warp");
  ++w.machine->products;
  Fragment rows[16], columns[8];
  const uint32_t *a[4], *b[2];
  for (int i = 0; i < 4; ++i) a[i] = w.row<uint32_t>(in.at[4 + i]);
  for (int i = 0; i < 2; ++i) b[i] = w.row<uint32_t>(in.at[8 + i]);
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int half = 0; half < 2; ++half) {
      const int k = lane % 4 * 2 + half;
      const auto part = [&](uint32_t word) { return Type::widen(word >> (16 * half) & 0xffff); };
      rows[lane / 4].set(k, part(a[0][lane]));
      rows[lane / 4 + 8].set(k, part(a[1][lane]));
      rows[lane / 4].set(k + 8, part(a[2][lane]));
      rows[lane / 4 + 8].set(k + 8, part(a[3][lane]));
      columns[lane / 4].set(k, part(b[0][lane]));
      columns[lane / 4].set(k + 8, part(b[1][lane]));
    }
  }
  for (int i = 0; i < 4; ++i) {
    float* out = w.row<float>(in.at[i]);
    const float* sum = w.row<float>(in.at[10 + i]);
    for (int lane = 0; lane < kLanes; ++lane) {
      const Fragment &row = rows[lane / 4 + i / 2 * 8], &column = columns[lane % 4 * 2 + i % 2];
      out[lane] = add_products(w.machine->product_model, row, column, sum[lane]);
    }
  }
}

void nothing(Warp&, const Instruction&, uint32_t) {}

void trap(Warp&, const Instruction&, uint32_t) { throw Error("a trap of the kernel"); }

void active_mask(Warp& w, const Instruction& in, uint32_t lanes) {
  for_lanes(lanes, [&](int i) { put<uint32_t>(w.rows + in.at[0], i, lanes); });
}

void add_control(const std::function<void(const Opcode&)>& sink) {
  for (const char* name : {"bra", "bra.uni"}) sink({name, Class::kBranch, nothing, Flow::kBranch});
  for (const char* name : {"ret", "ret.uni", "exit"}) sink({name, Class::kBranch, nothing, Flow::kReturn});
  for (const char* name : {"call", "call.uni"}) sink({name, Class::kBranch, nothing, Flow::kCall});
  for (const char* name : {"bar.sync", "barrier.sync", "barrier.sync.aligned", "bar.red.or.pred", "barrier.cta.sync",
                           "barrier.cta.sync.aligned", "barrier.cta.red.or.pred"}) {
    sink({name, Class::kBarrier, nothing, Flow::kBarrier});
  }
  sink({"nanosleep.u32", Class::kOther, nothing, Flow::kYield});
  for (const char* name : {"bar.warp.sync", "membar.gl", "membar.cta", "membar.sys", "fence.acq_rel.gpu",
                           "fence.sc.gpu", "fence.acq_rel.cta", "fence.proxy.async", "fence.proxy.async.shared::cta",
                           "griddepcontrol.wait", "griddepcontrol.launch_dependents"}) {
    sink({name, Class::kOther, nothing});
  }
  sink({"trap", Class::kOther, trap});
  sink({"activemask.b32", Class::kOther, active_mask});
}

}  // namespace

void add_warp(const std::function<void(const Opcode&)>& sink) {
  const Sink add = [&](const std::string& name, Class kind, Handler handler) { sink({name.c_str(), kind, handler}); };
  add_control(sink);
  add("shfl.sync.up.b32", Class::kShuffle, shuffle<kUp>);
  add("shfl.sync.down.b32", Class::kShuffle, shuffle<kDown>);
  add("shfl.sync.bfly.b32", Class::kShuffle, shuffle<kButterfly>);
  add("shfl.sync.idx.b32", Class::kShuffle, shuffle<kIndexed>);
  add("vote.sync.any.pred", Class::kShuffle, vote<kAny>);
  add("vote.sync.all.pred", Class::kShuffle, vote<kEvery>);
  add("vote.sync.ballot.b32", Class::kShuffle, vote<kBallot>);
  for (const char* type : {"u32", "s32"})
    add(std::string("redux.sync.add.") + type, Class::kShuffle, reduce<uint32_t, std::plus<>>);
  add("redux.sync.max.u32", Class::kShuffle, reduce<uint32_t, Greater>);
  add("redux.sync.min.u32", Class::kShuffle, reduce<uint32_t, Lesser>);
  add("redux.sync.max.s32", Class::kShuffle, reduce<int32_t, Greater>);
  add("redux.sync.min.s32", Class::kShuffle, reduce<int32_t, Lesser>);
  add("redux.sync.or.b32", Class::kShuffle, reduce<uint32_t, std::bit_or<>>);
  add("ldmatrix.sync.aligned.m8n8.x1.shared.b16", Class::kLoadMatrix, load_matrices<1, false>);
  add("ldmatrix.sync.aligned.m8n8.x2.shared.b16", Class::kLoadMatrix, load_matrices<2, false>);
  add("ldmatrix.sync.aligned.m8n8.x4.shared.b16", Class::kLoadMatrix, load_matrices<4, false>);
  add("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16", Class::kLoadMatrix, load_matrices<2, true>);
  add("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", Class::kLoadMatrix, load_matrices<4, true>);
  add("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", Class::kMma, multiply<Bfloat>);
  add("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", Class::kMma, multiply<Half>);
}

}  // namespace ptx
