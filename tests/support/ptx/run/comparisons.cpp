// Comparisons and operations on predicates.
#include "operations.h"

namespace ptx {
namespace {

using Sink = std::function<void(const std::string&, Class, Handler)>;

struct AndBits {
  uint32_t operator()(uint32_t a, uint32_t b) const { return a & b; }
};
struct OrBits {
  uint32_t operator()(uint32_t a, uint32_t b) const { return a | b; }
};
struct XorBits {
  uint32_t operator()(uint32_t a, uint32_t b) const { return a ^ b; }
};
struct NotBits {
  uint32_t operator()(uint32_t a, uint32_t) const { return ~a; }
};
struct CopyBits {
  uint32_t operator()(uint32_t a, uint32_t) const { return a; }
};

template <typename F>
void predicate(Warp& w, const Instruction& in, uint32_t lanes) {
  const uint32_t a = *w.row<uint32_t>(in.at[1]), b = in.operands > 2 ? *w.row<uint32_t>(in.at[2]) : 0;
  uint32_t& out = *w.row<uint32_t>(in.at[0]);
  out = (out & ~lanes) | (F()(a, b) & lanes);
}

// Unordered comparisons of floats are true if an operand is NaN.
template <typename F>
struct Unordered {
  template <typename T>
  bool operator()(T a, T b) const {
    return F()(a, b) || a != a || b != b;
  }
};
struct NotEqual {  // ordered: false for NaN
  template <typename T>
  bool operator()(T a, T b) const {
    return a < b || b < a;
  }
};
struct IsNan {
  template <typename T>
  bool operator()(T a, T b) const {
    return a != a || b != b;
  }
};
struct AreNumbers {
  template <typename T>
  bool operator()(T a, T b) const {
    return a == a && b == b;
  }
};

template <typename F>
void add_comparison(const Sink& add, const std::string& name) {
  add("setp." + name + ".s16", Class::kPredicate, compare<int16_t, F>);
  add("setp." + name + ".u16", Class::kPredicate, compare<uint16_t, F>);
  add("setp." + name + ".s32", Class::kPredicate, compare<int32_t, F>);
  add("setp." + name + ".u32", Class::kPredicate, compare<uint32_t, F>);
  add("setp." + name + ".b32", Class::kPredicate, compare<uint32_t, F>);
  add("setp." + name + ".s64", Class::kInteger64, compare<int64_t, F>);
  add("setp." + name + ".u64", Class::kInteger64, compare<uint64_t, F>);
  add("setp." + name + ".b64", Class::kInteger64, compare<uint64_t, F>);
}

template <typename F>
void add_float_comparison(const Sink& add, const std::string& name) {
  add("setp." + name + ".f32", Class::kPredicate, compare<float, F>);
  add("setp." + name + ".ftz.f32", Class::kPredicate, compare<float, Flushed<F>>);
  add("setp." + name + ".f64", Class::kFloat64, compare<double, F>);
}

void add_all_comparisons(const Sink& add) {
  add_comparison<std::equal_to<>>(add, "eq");
  add_comparison<std::not_equal_to<>>(add, "ne");
  add_comparison<std::less<>>(add, "lt");
  add_comparison<std::less_equal<>>(add, "le");
  add_comparison<std::greater<>>(add, "gt");
  add_comparison<std::greater_equal<>>(add, "ge");
  add_float_comparison<std::equal_to<>>(add, "eq");
  add_float_comparison<NotEqual>(add, "ne");
  add_float_comparison<std::less<>>(add, "lt");
  add_float_comparison<std::less_equal<>>(add, "le");
  add_float_comparison<std::greater<>>(add, "gt");
  add_float_comparison<std::greater_equal<>>(add, "ge");
  add_float_comparison<Unordered<std::equal_to<>>>(add, "equ");
  add_float_comparison<Unordered<std::not_equal_to<>>>(add, "neu");
  add_float_comparison<Unordered<std::less<>>>(add, "ltu");
  add_float_comparison<Unordered<std::less_equal<>>>(add, "leu");
  add_float_comparison<Unordered<std::greater<>>>(add, "gtu");
  add_float_comparison<Unordered<std::greater_equal<>>>(add, "geu");
  add_float_comparison<IsNan>(add, "nan");
  add_float_comparison<AreNumbers>(add, "num");
}

}  // namespace

void add_comparisons(const std::function<void(const Opcode&)>& sink) {
  const Sink add = [&](const std::string& name, Class kind, Handler handler) { sink({name.c_str(), kind, handler}); };
  add_all_comparisons(add);
  add("and.pred", Class::kPredicate, predicate<AndBits>);
  add("or.pred", Class::kPredicate, predicate<OrBits>);
  add("xor.pred", Class::kPredicate, predicate<XorBits>);
  add("not.pred", Class::kPredicate, predicate<NotBits>);
  add("mov.pred", Class::kMove, predicate<CopyBits>);
}

}  // namespace ptx
