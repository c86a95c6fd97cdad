// Loads, stores, atomics and asynchronous copies, with the sectors and wavefronts that they take.
#include <algorithm>

#include "operations.h"

namespace ptx {
namespace {

using Sink = std::function<void(const std::string&, Class, Handler)>;

enum Space { kGeneric, kGlobal, kShared, kLocal, kEntryParameter, kArgument };

// Where the lanes of an access point to.
struct Access {
  uint64_t address[kLanes];
  uint8_t* pointer[kLanes];
};

[[noreturn]] void fail(const char* what, uint64_t address) {
  char text[160];
  snprintf(text, sizeof text, "%s, address 0x%llx", what, static_cast<unsigned long long>(address));
  throw Error(text);
}

uint64_t address_of(const Warp& w, const Instruction& in, uint32_t row, int64_t displacement, bool wide, int lane) {
  const uint8_t* base = w.rows + row;
  (void)in;
  if (wide) return get<uint64_t>(base, lane) + static_cast<uint64_t>(displacement);
  return static_cast<uint32_t>(get<uint32_t>(base, lane) + static_cast<uint32_t>(displacement));
}

uint8_t* shared_pointer(Warp& w, uint64_t address, uint32_t bytes) {
  if (address + bytes > w.machine->shared_bytes) fail("shared memory: outside the block's", address);
  return w.block->shared.data() + address;
}

uint8_t* local_pointer(Warp& w, uint64_t address, uint32_t bytes, int lane) {
  if (address + bytes > kLocalBytes) fail("local memory: outside the thread's", address);
  return w.local.data() + static_cast<size_t>(lane) * kLocalBytes + address;
}

template <Space kSpace>
uint8_t* pointer_of(Warp& w, uint64_t address, uint32_t bytes, int lane) {
  if (address % bytes != 0) fail("an address that is not aligned to the access", address);
  if constexpr (kSpace == kShared) return shared_pointer(w, address, bytes);
  if constexpr (kSpace == kLocal) return local_pointer(w, address, bytes, lane);
  if constexpr (kSpace == kEntryParameter) {
    if (address + bytes > w.machine->parameters.size()) fail("parameters: outside the kernel's", address);
    return w.machine->parameters.data() + address;
  }
  if constexpr (kSpace == kArgument)
    return w.frame().arguments.data() + address * kLanes + static_cast<size_t>(lane) * 8;
  if constexpr (kSpace == kGeneric) {
    if (address >= kLocalWindow) return local_pointer(w, address - kLocalWindow, bytes, lane);
    if (address >= kSharedWindow) return shared_pointer(w, address - kSharedWindow, bytes);
  }
  if (address < 4096) fail("global memory: a null pointer", address);
  return reinterpret_cast<uint8_t*>(address);
}

// Adds the sectors of 32 bytes that the lanes touch.
void count_sectors(Count& count, const uint64_t* address, uint32_t lanes, uint32_t bytes) {
  uint64_t sectors[2 * kLanes];
  int found = 0;
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
    const uint64_t at = address[__builtin_ctz(rest)];
    for (uint64_t sector = at >> 5; sector <= (at + bytes - 1) >> 5; ++sector) {
      int i = found;
      while (i > 0 && sectors[i - 1] != sector) --i;
      if (i == 0) sectors[found++] = sector;
    }
  }
  count.units += static_cast<uint64_t>(found);
  count.least += (static_cast<uint64_t>(__builtin_popcount(lanes)) * bytes + 31) / 32;
}

}  // namespace

// Adds the wavefronts: a group of lanes whose words lie in different banks, or are the same word, is served at once;
// 8 and 16 bytes a lane are served by half and quarter warps.
void count_wavefronts(Count& count, const uint64_t* address, uint32_t lanes, uint32_t bytes) {
  const int group = bytes <= 4 ? kLanes : bytes == 8 ? 16 : 8;
  for (int first = 0; first < kLanes; first += group) {
    uint32_t words[32][kLanes];
    uint8_t depth[32] = {};
    int deepest = 0;
    for (int lane = first; lane < first + group; ++lane) {
      if (!(lanes >> lane & 1)) continue;
      for (uint32_t word = static_cast<uint32_t>(address[lane]) / 4, end = word + (bytes + 3) / 4; word < end; ++word) {
        uint32_t* bank = words[word % 32];
        uint8_t& deep = depth[word % 32];
        int i = deep;
        while (i > 0 && bank[i - 1] != word) --i;
        if (i == 0) bank[deep++] = word;
        deepest = std::max<int>(deepest, deep);
      }
    }
    count.units += static_cast<uint64_t>(deepest);
    count.least += deepest > 0;
  }
}

namespace {

template <Space kSpace>
void locate(Warp& w, const Instruction& in, uint32_t lanes, int operand, uint32_t bytes, Access& access) {
  for_lanes(lanes, [&](int i) {
    access.address[i] = address_of(w, in, in.at[operand], in.displacement, in.wide_address, i);
    access.pointer[i] = pointer_of<kSpace>(w, access.address[i], bytes, i);
  });
  const uint64_t first = access.address[__builtin_ctz(lanes)];
  const bool shared = kSpace == kShared || (kSpace == kGeneric && first >= kSharedWindow && first < kLocalWindow);
  const bool global = kSpace == kGlobal || (kSpace == kGeneric && first < kSharedWindow);
  Count& count = w.machine->count(in);
  if (shared && kSpace == kShared) count_wavefronts(count, access.address, lanes, bytes);
  if (shared && kSpace == kGeneric) {
    Count wavefronts;
    count_wavefronts(wavefronts, access.address, lanes, bytes);
    count.shared_units += wavefronts.units, count.shared_least += wavefronts.least;
  }
  if (global) count_sectors(count, access.address, lanes, bytes);
}

// T: the type of an element in memory; where the register is wider, it is extended as its sign says.
template <Space kSpace, typename T>
void load(Warp& w, const Instruction& in, uint32_t lanes) {
  Access access;
  const int elements = in.vector;
  locate<kSpace>(w, in, lanes, elements, static_cast<uint32_t>(sizeof(T)) * elements, access);
  for (int e = 0; e < elements; ++e) {
    uint8_t* out = w.rows + in.at[e];
    for_lanes(lanes, [&](int i) {
      T value;
      memcpy(&value, access.pointer[i] + e * sizeof(T), sizeof(T));
      if (sizeof(T) < 8 && in.wide_value)
        put<int64_t>(out, i, static_cast<int64_t>(value));
      else if constexpr (sizeof(T) < 4)
        put<int32_t>(out, i, static_cast<int32_t>(value));
      else
        put<T>(out, i, value);
    });
  }
}

template <Space kSpace, typename T>
void store(Warp& w, const Instruction& in, uint32_t lanes) {
  Access access;
  const int elements = in.vector;
  locate<kSpace>(w, in, lanes, 0, static_cast<uint32_t>(sizeof(T)) * elements, access);
  for (int e = 0; e < elements; ++e) {
    const uint8_t* source = w.rows + in.at[1 + e];
    for_lanes(lanes, [&](int i) {
      const T value = in.wide_value ? static_cast<T>(get<uint64_t>(source, i)) : get<T>(source, i);
      memcpy(access.pointer[i] + e * sizeof(T), &value, sizeof(T));
    });
  }
}

// An argument of a call, which the instruction keeps for the callee.
template <typename T>
void store_argument(Warp& w, const Instruction& in, uint32_t lanes) {
  uint8_t* slots = w.frame().outgoing.data() + static_cast<size_t>(in.displacement) * kLanes;
  for_lanes(lanes, [&](int i) {
    const T value = get<T>(w.rows + in.at[1], i);
    memcpy(slots + i * 8, &value, sizeof(T));
  });
}

struct AtomicAdd {
  template <typename T>
  T operator()(T old, T value) const {
    return old + value;
  }
};
struct AtomicOr {
  template <typename T>
  T operator()(T old, T value) const {
    return old | value;
  }
};
struct AtomicAnd {
  template <typename T>
  T operator()(T old, T value) const {
    return old & value;
  }
};
struct AtomicMax {
  template <typename T>
  T operator()(T old, T value) const {
    return old > value ? old : value;
  }
};
struct AtomicMin {
  template <typename T>
  T operator()(T old, T value) const {
    return old < value ? old : value;
  }
};
struct AtomicExchange {
  template <typename T>
  T operator()(T, T value) const {
    return value;
  }
};

// kReturns: atom, which keeps the old value; otherwise red.
template <Space kSpace, typename T, typename F, bool kReturns>
void atomic(Warp& w, const Instruction& in, uint32_t lanes) {
  Access access;
  locate<kSpace>(w, in, lanes, kReturns, sizeof(T), access);
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
    const int i = __builtin_ctz(rest);
    T old;
    memcpy(&old, access.pointer[i], sizeof old);
    const T result = F()(old, get<T>(w.rows + in.at[kReturns + 1], i));
    memcpy(access.pointer[i], &result, sizeof result);
    if (kReturns) put<T>(w.rows + in.at[0], i, old);
  }
}

template <Space kSpace, typename T>
void compare_and_swap(Warp& w, const Instruction& in, uint32_t lanes) {
  Access access;
  locate<kSpace>(w, in, lanes, 1, sizeof(T), access);
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
    const int i = __builtin_ctz(rest);
    T old;
    memcpy(&old, access.pointer[i], sizeof old);
    if (old == get<T>(w.rows + in.at[2], i)) {
      const T value = get<T>(w.rows + in.at[3], i);
      memcpy(access.pointer[i], &value, sizeof value);
    }
    put<T>(w.rows + in.at[0], i, old);
  }
}

void copy_async(Warp& w, const Instruction& in, uint32_t lanes) {
  Copy copy = {};
  copy.lanes = lanes;
  copy.bytes = *w.row<uint32_t>(in.at[1]);
  for_lanes(lanes, [&](int i) {
    copy.to[i] = static_cast<uint32_t>(address_of(w, in, in.at[0], in.displacement, in.wide_address, i));
    copy.from[i] = address_of(w, in, in.second_address, in.second_displacement, true, i);
    copy.valid[i] = in.operands > 2 ? std::min(get<uint32_t>(w.rows + in.at[2], i), copy.bytes) : copy.bytes;
    pointer_of<kShared>(w, copy.to[i], copy.bytes, i);
    pointer_of<kGlobal>(w, copy.from[i], copy.bytes, i);
  });
  count_sectors(w.machine->count(in), copy.from, lanes, copy.bytes);
  w.open.push_back(copy);
}

void commit_copies(Warp& w, const Instruction&, uint32_t lanes) {
  if (lanes != kAllLanes) throw Error("cp.async.commit_group by a part of a warp");
  w.committed.push_back(std::move(w.open));
  w.open.clear();
}

void wait_for_copies(Warp& w, const Instruction& in, uint32_t) { complete_copies(w, *w.row<uint32_t>(in.at[0])); }

template <Space kSpace>
void add_space(const Sink& add, const std::string& space, Class loads, Class stores) {
  const auto both = [&](const std::string& type, Handler reader, Handler writer) {
    add("ld" + space + type, loads, reader);
    if (kSpace != kEntryParameter && kSpace != kArgument) add("st" + space + type, stores, writer);
  };
  for (const char* form : {"", ".v2", ".v4"}) {
    const std::string at = form;
    for (const char* type : {".u8", ".b8"}) both(at + type, load<kSpace, uint8_t>, store<kSpace, uint8_t>);
    both(at + ".s8", load<kSpace, int8_t>, store<kSpace, int8_t>);
    for (const char* type : {".u16", ".b16"}) both(at + type, load<kSpace, uint16_t>, store<kSpace, uint16_t>);
    both(at + ".s16", load<kSpace, int16_t>, store<kSpace, int16_t>);
    for (const char* type : {".u32", ".b32", ".s32", ".f32"})
      both(at + type, load<kSpace, uint32_t>, store<kSpace, uint32_t>);
    for (const char* type : {".u64", ".b64", ".s64", ".f64"})
      both(at + type, load<kSpace, uint64_t>, store<kSpace, uint64_t>);
  }
}

template <Space kSpace, typename T>
void add_atomics(const Sink& add, const std::string& space, const std::string& type) {
  const auto both = [&](const std::string& name, Handler returning, Handler plain) {
    add("atom" + space + name + type, Class::kAtomic, returning);
    add("red" + space + name + type, Class::kAtomic, plain);
  };
  both(".add", atomic<kSpace, T, AtomicAdd, true>, atomic<kSpace, T, AtomicAdd, false>);
  both(".or", atomic<kSpace, T, AtomicOr, true>, atomic<kSpace, T, AtomicOr, false>);
  both(".and", atomic<kSpace, T, AtomicAnd, true>, atomic<kSpace, T, AtomicAnd, false>);
  both(".max", atomic<kSpace, T, AtomicMax, true>, atomic<kSpace, T, AtomicMax, false>);
  both(".min", atomic<kSpace, T, AtomicMin, true>, atomic<kSpace, T, AtomicMin, false>);
  both(".exch", atomic<kSpace, T, AtomicExchange, true>, atomic<kSpace, T, AtomicExchange, false>);
  add("atom" + space + ".cas" + type, Class::kAtomic, compare_and_swap<kSpace, T>);
}

template <Space kSpace>
void add_atomics(const Sink& add, const std::string& space) {
  add_atomics<kSpace, int32_t>(add, space, ".s32");
  add_atomics<kSpace, uint32_t>(add, space, ".u32");
  add_atomics<kSpace, uint32_t>(add, space, ".b32");
  add_atomics<kSpace, int64_t>(add, space, ".s64");
  add_atomics<kSpace, uint64_t>(add, space, ".u64");
  add_atomics<kSpace, uint64_t>(add, space, ".b64");
}

}  // namespace

void complete_copies(Warp& w, size_t pending) {
  for (; w.committed.size() > pending; w.committed.pop_front()) {
    for (const Copy& copy : w.committed.front()) {
      for (uint32_t rest = copy.lanes; rest != 0; rest &= rest - 1) {
        const int i = __builtin_ctz(rest);
        uint8_t* to = w.block->shared.data() + copy.to[i];
        memcpy(to, reinterpret_cast<const void*>(copy.from[i]), copy.valid[i]);
        memset(to + copy.valid[i], 0, copy.bytes - copy.valid[i]);
      }
    }
  }
}

void add_memory(const std::function<void(const Opcode&)>& sink) {
  const Sink add = [&](const std::string& name, Class kind, Handler handler) { sink({name.c_str(), kind, handler}); };
  add_space<kGeneric>(add, "", Class::kLoadGlobal, Class::kStoreGlobal);
  add_space<kGlobal>(add, ".global", Class::kLoadGlobal, Class::kStoreGlobal);
  add_space<kShared>(add, ".shared", Class::kLoadShared, Class::kStoreShared);
  add_space<kLocal>(add, ".local", Class::kLocal, Class::kLocal);
  add_space<kEntryParameter>(add, ".param", Class::kParameter, Class::kParameter);
  add_space<kArgument>(add, ".argument", Class::kParameter, Class::kParameter);
  add("st.param.b32", Class::kParameter, store_argument<uint32_t>);
  add("st.param.f32", Class::kParameter, store_argument<uint32_t>);
  add("st.param.b64", Class::kParameter, store_argument<uint64_t>);
  add_atomics<kGeneric>(add, "");
  add_atomics<kGlobal>(add, ".global");
  add_atomics<kShared>(add, ".shared");
  add("cp.async.cg.shared.global", Class::kCopyAsync, copy_async);
  add("cp.async.ca.shared.global", Class::kCopyAsync, copy_async);
  add("cp.async.commit_group", Class::kCopyAsync, commit_copies);
  add("cp.async.wait_group", Class::kCopyAsync, wait_for_copies);
}

}  // namespace ptx
