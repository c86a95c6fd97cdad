// What a PTX file declares: functions with their parameters, registers, variables and constants.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <unordered_map>

#include "module.h"
#include "tokens.h"

namespace ptx {

constexpr uint32_t kConstantMark = 1u << 31;  // in the offset of a constant, until the size of the frame is known
constexpr uint32_t kRow = 4 * kLanes;

struct Register {
  uint32_t offset;
  int bits;  // 1 for a predicate
};

inline bool starts_with(const std::string& text, const char* prefix) {
  return text.compare(0, strlen(prefix), prefix) == 0;
}

inline bool ends_with(const std::string& text, const char* suffix) {
  const size_t length = strlen(suffix);
  return text.size() >= length && text.compare(text.size() - length, length, suffix) == 0;
}

inline int bits_of(const std::string& type) {
  if (ends_with(type, "pred")) return 1;
  return ends_with(type, "64") ? 64 : ends_with(type, "16") ? 16 : ends_with(type, "8") ? 8 : 32;
}

class Declarations {
 protected:
  explicit Declarations(const std::string& text) : text_(text), tokens_(text) {}

  struct Declared {
    std::string name;
    uint32_t bytes, alignment;
  };

  // Reads [.align n] .type name [size].
  Declared read_declared() {
    uint32_t alignment = 0, unit = 0;
    while (starts_with(tokens_.peek(), ".")) {
      const std::string word = tokens_.take();
      if (word == ".align") {
        alignment = static_cast<uint32_t>(strtoul(tokens_.take().c_str(), nullptr, 10));
      } else if (word != ".ptr" && word != ".global" && word != ".shared") {
        unit = static_cast<uint32_t>(bits_of(word)) / 8;
      }
    }
    Declared declared = {tokens_.take(), unit, std::max(alignment, unit)};
    if (tokens_.accept("[")) {
      declared.bytes = 0;
      if (!tokens_.accept("]")) {
        declared.bytes = unit * static_cast<uint32_t>(strtoul(tokens_.take().c_str(), nullptr, 10));
        tokens_.expect("]");
      }
    }
    return declared;
  }

  void read_variable(const std::string& space) {
    const Declared declared = read_declared();
    if (space == ".shared") {
      module_.static_shared = (module_.static_shared + 15) / 16 * 16;
      shared_[declared.name] = module_.static_shared;
      module_.static_shared += declared.bytes;
    } else {
      module_.storage.push_back(std::make_unique<uint8_t[]>(declared.bytes + 16));
      uint8_t* data = module_.storage.back().get();
      data += (16 - reinterpret_cast<uintptr_t>(data) % 16) % 16;
      module_.globals[declared.name] = reinterpret_cast<uint64_t>(data);
      if (tokens_.accept("=")) {
        tokens_.expect("{");
        for (uint32_t i = 0; !tokens_.accept("}"); ++i) {
          data[i] = static_cast<uint8_t>(strtoul(tokens_.take().c_str(), nullptr, 10));
          tokens_.accept(",");
        }
      }
    }
    tokens_.expect(";");
  }

  void read_parameters(Function& function) {
    if (!tokens_.accept("(")) return;
    while (!tokens_.accept(")")) {
      tokens_.expect(".param");
      const Declared declared = read_declared();
      const uint32_t unit = function.entry ? std::max(declared.alignment, 1u) : 8;
      if (!function.entry && declared.bytes > 8) tokens_.fail("an argument of more than 8 bytes");
      const uint32_t offset = (function.parameter_bytes + unit - 1) / unit * unit;
      function.parameters.push_back({declared.name, offset, declared.bytes});
      function.parameter_bytes = offset + std::max(declared.bytes, function.entry ? 0u : 8u);
      tokens_.accept(",");
    }
  }

  void place_specials() {
    static const char* const names[] = {"%tid.x",    "%tid.y",    "%tid.z",   "%ntid.x",  "%ntid.y",
                                        "%ntid.z",   "%ctaid.x",  "%ctaid.y", "%ctaid.z", "%nctaid.x",
                                        "%nctaid.y", "%nctaid.z", "%laneid"};
    uint32_t offset = 0;
    for (const char* name : names) scopes_[0][name] = {offset, 32}, offset += kRow;
    function_->frame_bytes = offset + 2 * kRow;  // and the row of 64-bit zeros
  }

  void declare_registers() {
    const int bits = bits_of(tokens_.take());
    const uint32_t bytes = bits == 1 ? 4 : bits == 64 ? 2 * kRow : kRow;
    const auto declare = [&](const std::string& name) {
      scopes_.back()[name] = {function_->frame_bytes, bits};
      function_->frame_bytes += bytes;
    };
    function_->frame_bytes = (function_->frame_bytes + kRow - 1) / kRow * kRow;
    do {
      const std::string name = tokens_.take();
      if (tokens_.accept("<")) {
        const int count = atoi(tokens_.take().c_str());
        for (int i = 0; i < count; ++i) declare(name + std::to_string(i));
        tokens_.expect(">");
      } else {
        declare(name);
      }
    } while (tokens_.accept(","));
    function_->frame_bytes = (function_->frame_bytes + kRow - 1) / kRow * kRow;
    tokens_.expect(";");
  }

  void declare_variable(const std::string& space) {
    if (space == ".shared") return read_variable(space);
    const Declared declared = read_declared();
    tokens_.expect(";");
    if (space == ".local") {
      const uint32_t unit = std::max(declared.alignment, 1u),
                     offset = (function_->local_bytes + unit - 1) / unit * unit;
      locals_[declared.name] = offset;
      function_->local_bytes = offset + declared.bytes;
    } else {  // an argument of a call
      scope_arguments_[declared.name] = arguments_;
      arguments_ += 8;
      function_->call_bytes = std::max(function_->call_bytes, arguments_);
    }
  }

  const Register* find_register(const std::string& name) const {
    for (size_t i = scopes_.size(); i-- > 0;) {
      const auto found = scopes_[i].find(name);
      if (found != scopes_[i].end()) return &found->second;
    }
    return nullptr;
  }

  // Returns whether a name is a variable or parameter, and its address.
  bool find_symbol(const std::string& name, uint64_t* address) const {
    for (const Parameter& parameter : function_->parameters) {
      if (parameter.name == name) return *address = parameter.offset, true;
    }
    for (const auto* table : {&locals_, &shared_, &scope_arguments_}) {
      const auto found = table->find(name);
      if (found != table->end()) return *address = found->second, true;
    }
    const auto found = module_.globals.find(name);
    if (found == module_.globals.end()) return false;
    return *address = found->second, true;
  }

  uint32_t constant(uint64_t value, int bits) {
    if (bits == 1) value = value != 0 ? kAllLanes : 0;
    if (bits <= 16 && bits > 1) value &= (1u << bits) - 1;
    const int wide = bits == 64;
    if (!wide) value = static_cast<uint32_t>(value);
    const auto key = std::make_pair(value, wide);
    const auto found = constants_.find(key);
    if (found != constants_.end()) return found->second;
    auto& bytes = function_->constants;
    const auto offset = static_cast<uint32_t>(bytes.size()) | kConstantMark;
    const size_t width = wide ? 8 : 4;
    for (int lane = 0; lane < kLanes; ++lane) {
      bytes.insert(bytes.end(), reinterpret_cast<uint8_t*>(&value), reinterpret_cast<uint8_t*>(&value) + width);
    }
    return constants_[key] = offset;
  }

  uint32_t number(const std::string& text, bool negative, int bits) {
    if (starts_with(text, "0f") || starts_with(text, "0d"))
      return constant(strtoull(text.c_str() + 2, nullptr, 16), bits);
    const uint64_t value = strtoull(text.c_str(), nullptr, 0);
    return constant(negative ? 0 - value : value, bits);
  }

  const std::string& text_;
  Tokens tokens_;
  Module module_;
  Function* function_ = nullptr;
  std::vector<std::unordered_map<std::string, Register>> scopes_;
  std::map<std::string, uint64_t> locals_, shared_, scope_arguments_;
  std::map<std::pair<uint64_t, int>, uint32_t> constants_;
  uint32_t arguments_ = 0;  // bytes of the arguments of the call being read
};

}  // namespace ptx
