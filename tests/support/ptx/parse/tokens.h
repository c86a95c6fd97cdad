// The tokens of PTX text.
#pragma once

#include <algorithm>
#include <cctype>
#include <string>

#include "module.h"

namespace ptx {

// Reads tokens one by one: names (with the dots of opcodes and the $ and % of labels and registers), numbers, strings
// and single punctuation characters. Comments are skipped. The empty token is the end.
class Tokens {
 public:
  explicit Tokens(const std::string& text) : text_(text) { advance(); }

  const std::string& peek() const { return token_; }

  std::string take() {
    std::string taken = std::move(token_);
    advance();
    return taken;
  }

  bool accept(const char* expected) {
    if (token_ != expected) return false;
    advance();
    return true;
  }

  void expect(const char* expected) {
    if (!accept(expected)) fail(std::string("expected '") + expected + "', found '" + token_ + "'");
  }

  void skip_to(const char* last) {
    while (!token_.empty() && token_ != last) advance();
    advance();
  }

  // Skips the rest of the line of the current token, which must be the first of its statement.
  void skip_line() {
    at_ = text_.find('\n', begin_);
    if (at_ == std::string::npos) at_ = text_.size();
    advance();
  }

  [[noreturn]] void fail(const std::string& what) const {
    const size_t from = text_.rfind('\n', begin_ == 0 ? 0 : begin_ - 1), to = text_.find('\n', begin_);
    const size_t first = from == std::string::npos ? 0 : from + 1;
    throw Error(what + " in '" + text_.substr(first, to - first) + "'");
  }

 private:
  static bool in_name(char c) {
    return isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' || c == '.';
  }

  void skip_blanks() {
    for (;;) {
      while (at_ < text_.size() && isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
      if (text_.compare(at_, 2, "//") != 0) return;
      at_ = std::min(text_.find('\n', at_), text_.size());
    }
  }

  void advance() {
    skip_blanks();
    begin_ = at_;
    if (at_ >= text_.size()) {
      token_.clear();
      return;
    }
    if (text_[at_] == '"') {
      at_ = text_.find('"', at_ + 1) + 1;
    } else if (in_name(text_[at_])) {
      while (at_ < text_.size() && (in_name(text_[at_]) || text_.compare(at_, 2, "::") == 0)) {
        at_ += in_name(text_[at_]) ? 1 : 2;
      }
    } else {
      ++at_;
    }
    token_ = text_.substr(begin_, at_ - begin_);
  }

  const std::string& text_;
  size_t at_ = 0, begin_ = 0;
  std::string token_;
};

}  // namespace ptx
