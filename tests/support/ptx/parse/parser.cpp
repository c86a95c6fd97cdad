// Parses the PTX that nvcc writes.
#include "declarations.h"

namespace ptx {
namespace {

// Returns the bits of an immediate operand: those of the type of the opcode, except where PTX fixes it to 32.
int immediate_bits(const std::string& opcode, int position, bool in_braces) {
  const bool shift = (starts_with(opcode, "shl") || starts_with(opcode, "shr")) && position == 2;
  if (shift || (starts_with(opcode, "bfi") && position >= 3)) return 32;
  for (const char* prefix : {"bar", "cp.", "shfl", "vote", "nanosleep"}) {
    if (starts_with(opcode, prefix)) return 32;
  }
  const int bits = bits_of(opcode);
  return in_braces && starts_with(opcode, "mov") ? bits / 2 : bits;
}

class Parser : Declarations {
 public:
  explicit Parser(const std::string& text) : Declarations(text) {}

  Module run() {
    read_files();
    while (!tokens_.peek().empty()) read_directive();
    for (const auto& [function, pc, callee] : calls_) {
      const int found = module_.find(callee);
      if (found < 0 && callee != "__assertfail") throw Error("a call of the unknown function " + callee);
      module_.functions[function].code[pc].callee = found;
    }
    return std::move(module_);
  }

 private:
  struct Call {
    size_t function, pc;
    std::string callee;
  };

  void read_files() {  // they stand at the end of the text
    for (size_t at = text_.find("\t.file\t"); at != std::string::npos; at = text_.find("\t.file\t", at + 1)) {
      const size_t number = strtoul(text_.c_str() + at + 7, nullptr, 10);
      const size_t open = text_.find('"', at), close = text_.find('"', open + 1);
      if (module_.files.size() <= number) module_.files.resize(number + 1);
      module_.files[number] = text_.substr(open + 1, close - open - 1);
    }
  }

  void read_directive() {
    const std::string token = tokens_.peek();
    if (token == ".version" || token == ".address_size" || token == ".file") {
      tokens_.skip_line();
    } else if (token == ".target") {
      tokens_.take();
      module_.target = tokens_.peek();
      tokens_.skip_line();
    } else if (token == ".section") {  // debug information: the rest of the file
      while (!tokens_.peek().empty()) tokens_.skip_to("}");
    } else if (token == ".entry" || token == ".func") {
      tokens_.take();
      read_function(token == ".entry");
    } else if (token == ".visible" || token == ".weak" || token == ".extern") {
      tokens_.take();
    } else if (token == ".global" || token == ".const" || token == ".shared") {
      tokens_.take();
      read_variable(token);
    } else {
      tokens_.fail("an unknown directive");
    }
  }

  void read_function(bool entry) {
    Function function;
    function.entry = entry;
    if (tokens_.peek() == "(") tokens_.fail("a function that returns a value");
    function.name = tokens_.take();
    read_parameters(function);
    while (tokens_.peek() != "{" && tokens_.peek() != ";") tokens_.take();  // .maxntid and the like
    if (tokens_.accept(";")) return;                                        // a declaration
    tokens_.expect("{");
    function_ = &function;
    labels_.clear(), jumps_.clear(), constants_.clear();
    scopes_.assign(1, {});
    arguments_ = 0;
    place_specials();
    while (!scopes_.empty()) read_statement();
    finish_function();
    module_.functions.push_back(std::move(function));
  }

  void read_statement() {
    const std::string token = tokens_.peek();
    if (token.empty()) tokens_.fail("the end of the file within a function");
    if (token == ".loc") {
      read_location();
    } else if (token == ".pragma") {
      tokens_.skip_to(";");
    } else if (tokens_.accept("{")) {
      scopes_.emplace_back();
      arguments_ = 0;
    } else if (tokens_.accept("}")) {
      scopes_.pop_back();
    } else if (tokens_.accept(".reg")) {
      declare_registers();
    } else if (token == ".local" || token == ".shared" || token == ".param") {
      declare_variable(tokens_.take());
    } else {
      read_instruction();
    }
  }

  void read_location() {
    tokens_.take();
    file_ = atoi(tokens_.take().c_str());
    line_ = atoi(tokens_.peek().c_str());
    tokens_.skip_line();
  }

  // Reads one register, number or symbol into the next operand.
  void read_value(Instruction& in, const std::string& opcode, bool in_braces) {
    if (in.operands >= kMaxOperands) in.more.push_back(0);
    const bool negative = tokens_.accept("-");
    const std::string token = tokens_.take();
    uint32_t& row = in.operands < kMaxOperands ? in.at[in.operands] : in.more.back();
    uint64_t address;
    in.wide_last = false;
    if (const Register* found = find_register(token)) {
      row = found->offset;
      in.wide_last = found->bits == 64;
      in.wide_value |= in.wide_last;
    } else if (isdigit(static_cast<unsigned char>(token[0]))) {
      row = number(token, negative, immediate_bits(opcode, in.operands, in_braces));
    } else if (find_symbol(token, &address)) {
      row = constant(address, bits_of(opcode));
    } else {
      tokens_.fail("an unknown operand '" + token + "'");
    }
    ++in.operands;
  }

  // Reads base [+ displacement], after the bracket.
  void read_address(Instruction& in, bool first) {
    const std::string base = tokens_.take();
    uint32_t row = 0;
    int64_t displacement = 0;
    uint64_t address;
    if (const Register* found = find_register(base)) {
      row = found->offset;
      in.wide_address = found->bits == 64 || !first;
    } else if (find_symbol(base, &address)) {
      row = kZero * kRow;
      in.wide_address = true;
      displacement = static_cast<int64_t>(address);
    } else {
      tokens_.fail("an unknown address '" + base + "'");
    }
    if (tokens_.accept("+")) {
      const bool negative = tokens_.accept("-");
      const int64_t offset = strtoll(tokens_.take().c_str(), nullptr, 0);
      displacement += negative ? -offset : offset;
    }
    tokens_.expect("]");
    if (first) {
      in.at[in.operands++] = row;
      in.displacement = displacement;
      address_bits_ = in.wide_address;
    } else {
      in.second_address = row;
      in.second_displacement = displacement;
      in.wide_address = address_bits_;
    }
  }

  void read_operands(Instruction& in, const std::string& opcode, int* braces) {
    bool first_address = true;
    while (tokens_.peek() != ";") {
      if (tokens_.accept("{")) {
        *braces = in.operands == 0 ? 2 : 1;
        do read_value(in, opcode, true);
        while (tokens_.accept(","));
        tokens_.expect("}");
      } else if (tokens_.accept("[")) {
        read_address(in, first_address);
        first_address = false;
      } else {
        read_value(in, opcode, false);
      }
      if (!tokens_.accept(",") && !tokens_.accept("|")) break;
    }
    tokens_.expect(";");
  }

  void read_call() {
    const std::string callee = tokens_.take();
    tokens_.expect(",");
    tokens_.expect("(");
    for (uint32_t place = 0; !tokens_.accept(")"); place += 8) {
      if (scope_arguments_[tokens_.take()] != place) tokens_.fail("arguments in another order than declared");
      tokens_.accept(",");
    }
    tokens_.expect(";");
    calls_.push_back({module_.functions.size(), function_->code.size(), callee});
  }

  void read_instruction() {
    Instruction in;
    in.file = file_, in.line = line_;
    if (tokens_.accept("@")) {
      in.guard_negated = tokens_.accept("!");
      const Register* guard = find_register(tokens_.take());
      if (guard == nullptr || guard->bits != 1) tokens_.fail("an unknown guard");
      in.guard = static_cast<int>(guard->offset);
    }
    std::string name = tokens_.take();
    if (tokens_.accept(":")) {
      labels_[name] = static_cast<uint32_t>(function_->code.size());
      return;
    }
    int braces = 0;
    if (name == "bra" || name == "bra.uni") {
      jumps_.push_back({static_cast<uint32_t>(function_->code.size()), tokens_.take()});
      tokens_.expect(";");
    } else if (name == "call.uni" || name == "call") {
      read_call();
    } else {
      read_operands(in, name, &braces);
    }
    if (starts_with(name, "ld.param") && !function_->entry) name.replace(3, 5, "argument");
    if (starts_with(name, "ld.") || starts_with(name, "st.")) in.vector = in.operands - 1, braces = 0;
    in.wide_value &= bits_of(name) < 64;
    if (starts_with(name, "cvt.") && in.wide_last && bits_of(name) < 64) name += ".low";
    in.opcode = find_opcode(name, starts_with(name, "mov") ? braces : 0);
    if (in.opcode == nullptr) tokens_.fail("the interpreter does not know the opcode " + name);
    in.number = module_.instructions++;
    function_->code.push_back(in);
  }

  void finish_function() {
    Function& f = *function_;
    for (const auto& [pc, label] : jumps_) {
      if (labels_.count(label) == 0) throw Error("a branch to the unknown label " + label);
      f.code[pc].target = labels_[label];
    }
    f.constant_rows = f.frame_bytes;
    f.frame_bytes += static_cast<uint32_t>(f.constants.size());
    const auto place = [&](uint32_t& offset) {
      if (offset & kConstantMark) offset = f.constant_rows + (offset & ~kConstantMark);
    };
    for (Instruction& in : f.code) {
      for (uint32_t& offset : in.at) place(offset);
      for (uint32_t& offset : in.more) place(offset);
    }
    f.local_bytes = (f.local_bytes + 15) / 16 * 16;
    find_reconvergence(f);
  }

  std::unordered_map<std::string, uint32_t> labels_;
  std::vector<std::pair<uint32_t, std::string>> jumps_;
  std::vector<Call> calls_;
  bool address_bits_ = false;  // of the first address of the instruction
  int file_ = 0, line_ = 0;
};

}  // namespace

Module parse(const std::string& text) { return Parser(text).run(); }

}  // namespace ptx
