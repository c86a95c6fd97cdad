// A parsed PTX module. Every register, immediate, symbol and special register of a function is a row of its frame: 32
// lanes of 4 or 8 bytes (16-bit values are zero-extended to 4), or one 4-byte mask for a predicate. An operand is the
// byte offset of its row, so that an instruction does not care what kind of operand it has.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kMaxOperands = 16;
constexpr uint64_t kSharedWindow = uint64_t{1} << 60;  // generic addresses of shared memory start here
constexpr uint64_t kLocalWindow = uint64_t{1} << 61;   // and those of local memory here

struct Warp;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&, uint32_t lanes);

// What an instruction costs. The names in kClassNames are those of the tables in bench/results.
enum class Class : uint8_t {
  kMove,  // a copy between registers, an address conversion or a constant: usually no instruction of the device
  kFloat32,
  kFloat64,
  kSpecial,  // exponentials and other functions of the special function unit
  kInteger,
  kInteger64,
  kPredicate,
  kConversion,
  kLoadGlobal,
  kStoreGlobal,
  kLoadShared,
  kStoreShared,
  kLocal,
  kParameter,
  kCopyAsync,
  kLoadMatrix,
  kMma,
  kWarpgroupMma,
  kShuffle,
  kAtomic,
  kBarrier,
  kBranch,
  kOther,
  kCount
};
extern const char* const kClassNames[];

enum class Flow : uint8_t { kNext, kBranch, kReturn, kCall, kBarrier, kYield };

struct Opcode {
  const char* name;
  Class kind;
  Handler execute;
  Flow flow = Flow::kNext;
};

// Returns the entry of an opcode, or null if the interpreter does not know it. braces: operands within braces, which
// tell a pack (1: the source has them) and an unpack (2: the destination) from a plain move.
const Opcode* find_opcode(const std::string& name, int braces);

struct Instruction {
  const Opcode* opcode = nullptr;
  uint32_t at[kMaxOperands] = {};  // byte offsets of rows in the frame
  int operands = 0;
  std::vector<uint32_t> more;   // the rows of operands beyond kMaxOperands
  int64_t displacement = 0;     // added to the address
  uint32_t second_address = 0;  // the row of the second address of cp.async; `second_displacement` is added
  int64_t second_displacement = 0;
  bool wide_address = false;  // the address row holds 8 bytes a lane
  bool wide_value = false;    // a value row of a load or store holds 8 bytes a lane
  bool wide_last = false;     // the row of the last operand does
  int vector = 1;             // elements of a load or store
  int guard = -1;             // the predicate row; -1: always executed
  bool guard_negated = false;
  uint32_t target = 0, reconvergence = 0;  // of a branch; `code.size()` is the end of the function
  int callee = -1;
  int file = 0, line = 0;
  uint32_t number = 0;  // in the module

  uint32_t row(int operand) const { return operand < kMaxOperands ? at[operand] : more[operand - kMaxOperands]; }
};

// The rows that every frame starts with.
enum Special : int { kTid = 0, kNtid = 3, kCtaid = 6, kNctaid = 9, kLaneId = 12, kZero = 13, kSpecials = 14 };

struct Parameter {
  std::string name;
  uint32_t offset, bytes;
};

struct Function {
  std::string name;
  bool entry = false;
  std::vector<Parameter> parameters;
  uint32_t parameter_bytes = 0;
  uint32_t call_bytes = 0;  // of the arguments that it passes to other functions, per lane
  uint32_t local_bytes = 0;
  uint32_t special_rows = 0, constant_rows = 0;  // byte offsets; constants end at frame_bytes
  uint32_t frame_bytes = 0;
  std::vector<uint8_t> constants;
  std::vector<Instruction> code;
};

struct Module {
  std::string target;  // for example sm_80
  std::vector<Function> functions;
  std::vector<std::string> files;           // by number
  std::map<std::string, uint64_t> globals;  // addresses of variables in global memory
  std::vector<std::unique_ptr<uint8_t[]>> storage;
  uint32_t static_shared = 0;  // dynamic shared memory starts here
  uint32_t instructions = 0;

  int find(const std::string& name) const {
    for (size_t i = 0; i < functions.size(); ++i) {
      if (functions[i].name == name) return static_cast<int>(i);
    }
    return -1;
  }
};

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Parses PTX. Throws an Error that names the statement that it does not understand.
Module parse(const std::string& text);

// Sets the reconvergence point of every branch: the immediate post-dominator of its block.
void find_reconvergence(Function& function);

}  // namespace ptx
