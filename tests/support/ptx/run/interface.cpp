// The table of opcodes, and the C interface of the interpreter.
#include <sstream>
#include <unordered_map>

#include "machine.h"

#define PTX_API extern "C" __attribute__((visibility("default")))

namespace ptx {

const char* const kClassNames[] = {
    "move",        "fp32",          "fp64",        "special",      "int",     "int64",     "predicate",  "conversion",
    "load global", "store global",  "load shared", "store shared", "local",   "parameter", "copy async", "load matrix",
    "mma",         "warpgroup mma", "shuffle",     "atomic",       "barrier", "branch",    "other"};
static_assert(sizeof kClassNames / sizeof *kClassNames == static_cast<size_t>(Class::kCount));

namespace {

std::unordered_map<std::string, Opcode> make_table() {
  std::unordered_map<std::string, Opcode> table;
  const auto add = [&](const Opcode& opcode) {
    const auto entry = table.emplace(opcode.name, opcode).first;
    entry->second.name = entry->first.c_str();
  };
  add_arithmetic(add);
  add_comparisons(add);
  add_conversions(add);
  add_memory(add);
  add_warp(add);
  add_warpgroup(add);
  return table;
}

// Removes what does not change the result here: the order and scope of memory accesses, caching hints, and whether all
// threads of a warp take part.
std::string without_hints(const std::string& name) {
  std::istringstream parts(name);
  std::string part, kept;
  const bool memory = name.compare(0, 2, "ld") == 0 || name.compare(0, 2, "st") == 0 ||
                      name.compare(0, 4, "atom") == 0 || name.compare(0, 3, "red") == 0 ||
                      name.compare(0, 8, "cp.async") == 0;
  static const char* const hints[] = {"weak", "volatile", "relaxed", "acquire", "release", "acq_rel",
                                      "gpu",  "cta",      "sys",     "nc",      "cg",      "cs",
                                      "lu",   "cv",       "wb",      "wt",      "ca"};
  while (std::getline(parts, part, '.')) {
    bool hint = part.find("::") != std::string::npos;
    for (const char* word : hints) hint |= part == word && name.compare(0, 8, "cp.async") != 0;
    if (kept.empty() || !memory || !hint) kept += (kept.empty() ? "" : ".") + part;
  }
  return kept;
}

std::vector<std::unique_ptr<Machine>> machines;
std::unordered_map<const void*, std::pair<int, int>> kernels;  // host function: machine, function
std::string last_error, text;

}  // namespace

const Opcode* find_opcode(const std::string& name, int braces) {
  static const std::unordered_map<std::string, Opcode> table = make_table();
  const std::string full = without_hints(name) + (braces == 1 ? " pack" : braces == 2 ? " unpack" : "");
  const auto found = table.find(full);
  return found == table.end() ? nullptr : &found->second;
}

}  // namespace ptx

// Returns the number of the machine for this text of PTX; -1 if it cannot be parsed, see ptx_error.
PTX_API int ptx_load(const char* source) {
  try {
    ptx::machines.push_back(std::make_unique<ptx::Machine>(source));
    return static_cast<int>(ptx::machines.size()) - 1;
  } catch (const ptx::Error& error) {
    ptx::last_error = error.what();
    return -1;
  }
}

PTX_API const char* ptx_error() { return ptx::last_error.c_str(); }

// Returns the names of the entries, separated by newlines.
PTX_API const char* ptx_entries(int machine) {
  ptx::text.clear();
  for (const ptx::Function& function : ptx::machines[machine]->module.functions) {
    if (function.entry) ptx::text += function.name + "\n";
  }
  return ptx::text.c_str();
}

// From now on the host function stands for this entry.
PTX_API void ptx_bind(const void* host_function, int machine, const char* entry) {
  ptx::kernels[host_function] = {machine, ptx::machines[machine]->module.find(entry)};
}

// Runs the entry that stands for the host function. Returns the number of matrix products, or -1 if it failed.
PTX_API long ptx_launch(const void* host_function, const uint32_t* grid, uint32_t threads, uint64_t dynamic_shared,
                        const void* const* arguments, int cooperative) {
  const auto found = ptx::kernels.find(host_function);
  if (found == ptx::kernels.end()) {
    ptx::last_error = "a launch of a kernel that is not in the PTX";
    return -1;
  }
  ptx::Machine& machine = *ptx::machines[found->second.first];
  const uint64_t before = machine.products;
  try {
    const uint32_t blocks[3] = {grid[0], grid[1], grid[2]};
    machine.launch(found->second.second, blocks, threads, dynamic_shared, arguments, cooperative != 0);
    return static_cast<long>(machine.products - before);
  } catch (const ptx::Error& error) {
    ptx::last_error = error.what();
    return -1;
  }
}

PTX_API void ptx_set_order(int order) {
  for (auto& machine : ptx::machines) machine->order = static_cast<ptx::Order>(order);
}

PTX_API void ptx_set_product_model(int machine, int group, int extra_bits) {
  ptx::machines[machine]->product_model = {group, extra_bits};
}

PTX_API void ptx_reset(int machine) {
  ptx::machines[machine]->counts.assign(ptx::machines[machine]->module.instructions, {});
  ptx::machines[machine]->launches.clear();
}

// While set, launches are recorded but not executed: the plan of a call, whatever its size.
PTX_API void ptx_set_dry(int machine, int dry) { ptx::machines[machine]->dry = dry != 0; }

// Returns the instructions that were executed since the last reset (all: every instruction), one a line: function,
// opcode, class, file, line, executions by warps, lanes, units, the least possible units, and both of generic accesses
// to shared memory (see Count), separated by tabs.
PTX_API const char* ptx_counts(int machine, int all) {
  const ptx::Machine& m = *ptx::machines[machine];
  std::ostringstream out;
  for (const ptx::Function& function : m.module.functions) {
    for (const ptx::Instruction& in : function.code) {
      const ptx::Count& count = m.counts[in.number];
      if (count.executed == 0 && all == 0) continue;
      const auto file = static_cast<size_t>(in.file);
      out << function.name << '\t' << in.opcode->name << '\t' << ptx::kClassNames[static_cast<int>(in.opcode->kind)]
          << '\t' << (file < m.module.files.size() ? m.module.files[file] : "") << '\t' << in.line << '\t'
          << count.executed << '\t' << count.lanes << '\t' << count.units << '\t' << count.least << '\t'
          << count.shared_units << '\t' << count.shared_least << '\n';
    }
  }
  ptx::text = out.str();
  return ptx::text.c_str();
}

// Returns the launches since the last reset, one a line: kernel, the grid along x, y and z, threads of a block, bytes
// of dynamic shared memory.
PTX_API const char* ptx_launches(int machine) {
  std::ostringstream out;
  for (const ptx::Launch& launch : ptx::machines[machine]->launches) {
    out << launch.kernel << '\t' << launch.grid[0] << '\t' << launch.grid[1] << '\t' << launch.grid[2] << '\t'
        << launch.threads << '\t' << launch.shared_bytes << '\n';
  }
  ptx::text = out.str();
  return ptx::text.c_str();
}
