// Arithmetic, selections and bit operations.
#include "operations.h"

namespace ptx {
namespace {

using Add = std::plus<>;
using Subtract = std::minus<>;
using Multiply = std::multiplies<>;

struct Divide {
  template <typename T>
  T operator()(T a, T b) const {
    if constexpr (std::is_integral_v<T>) {
      if (b == 0) return static_cast<T>(~T{0});
      if (std::is_signed_v<T> && b == static_cast<T>(-1))
        return static_cast<T>(0 - static_cast<std::make_unsigned_t<T>>(a));
    }
    return a / b;
  }
};

struct Remainder {
  template <typename T>
  T operator()(T a, T b) const {
    if (b == 0) return a;
    return std::is_signed_v<T> && b == static_cast<T>(-1) ? T{0} : static_cast<T>(a % b);
  }
};

struct MultiplyAdd {
  template <typename T>
  T operator()(T a, T b, T c) const {
    if constexpr (std::is_same_v<T, float>)
      return __builtin_fmaf(a, b, c);
    else if constexpr (std::is_same_v<T, double>)
      return __builtin_fma(a, b, c);
    else
      return static_cast<T>(a * b + c);
  }
};

template <typename R>
struct WideMultiply {
  template <typename T>
  R operator()(T a, T b) const {
    return static_cast<R>(a) * static_cast<R>(b);
  }
  template <typename T>
  R operator()(T a, T b, R c) const {
    return static_cast<R>(a) * static_cast<R>(b) + c;
  }
};

template <typename Wide>
struct HighMultiply {
  template <typename T>
  T operator()(T a, T b) const {
    return static_cast<T>(static_cast<Wide>(a) * static_cast<Wide>(b) >> (8 * sizeof(T)));
  }
};

// -0 is less than +0, and a NaN gives the other operand.
struct Minimum {
  template <typename T>
  T operator()(T a, T b) const {
    if (a != a) return b;
    if (std::is_floating_point_v<T> && a == b) return std::signbit(static_cast<double>(a)) ? a : b;
    return b < a ? b : a;
  }
};

struct Maximum {
  template <typename T>
  T operator()(T a, T b) const {
    if (a != a) return b;
    if (std::is_floating_point_v<T> && a == b) return std::signbit(static_cast<double>(a)) ? b : a;
    return a < b || b != b ? (b != b ? a : b) : a;
  }
};

struct MinimumNumber : Minimum {
  template <typename T>
  T operator()(T a, T b) const {
    return b != b ? a : Minimum()(a, b);
  }
};

struct Negate {
  template <typename T>
  T operator()(T a) const {
    return static_cast<T>(std::is_floating_point_v<T> ? -a : T{0} - a);
  }
};

struct Absolute {
  template <typename T>
  T operator()(T a) const {
    return a < 0 || (a == 0 && std::is_floating_point_v<T>)
               ? static_cast<T>(std::is_floating_point_v<T> ? std::fabs(static_cast<double>(a)) : -a)
               : a;
  }
};

struct SquareRoot {
  template <typename T>
  T operator()(T a) const {
    return std::sqrt(a);
  }
};

// The device does not define the last bits of these functions. Here they are rounded correctly.
struct Exponential2 {
  float operator()(float a) const { return static_cast<float>(std::exp2(static_cast<double>(a))); }
};
struct Logarithm2 {
  float operator()(float a) const { return static_cast<float>(std::log2(static_cast<double>(a))); }
};
struct Reciprocal {
  template <typename T>
  T operator()(T a) const {
    return T{1} / a;
  }
};
struct ReciprocalRoot {
  float operator()(float a) const { return static_cast<float>(1 / std::sqrt(static_cast<double>(a))); }
};

// Only the upper half of the input is used, and the lower half of the result is zero.
struct CoarseReciprocal {
  double operator()(double a) const {
    uint64_t bits;
    memcpy(&bits, &a, sizeof bits);
    bits &= ~uint64_t{0xffffffff};
    memcpy(&a, &bits, sizeof bits);
    double inverse = 1 / a;
    memcpy(&bits, &inverse, sizeof bits);
    bits &= ~uint64_t{0xffffffff};
    memcpy(&inverse, &bits, sizeof bits);
    return inverse;
  }
};

struct PopulationCount {
  template <typename T>
  uint32_t operator()(T a) const {
    return static_cast<uint32_t>(__builtin_popcountll(a));
  }
};
struct LeadingZeros {  // of bfind.shiftamt: 2^32 - 1 if there is no bit
  uint32_t operator()(uint32_t a) const { return a == 0 ? ~0u : static_cast<uint32_t>(__builtin_clz(a)); }
};
struct LeadingBit {
  uint32_t operator()(uint32_t a) const { return a == 0 ? ~0u : 31u - static_cast<uint32_t>(__builtin_clz(a)); }
};
struct CountLeadingZeros {
  uint32_t operator()(uint32_t a) const { return a == 0 ? 32u : static_cast<uint32_t>(__builtin_clz(a)); }
};
struct Reverse {
  uint32_t operator()(uint32_t a) const {
    uint32_t out = 0;
    for (int i = 0; i < 32; ++i) out |= (a >> i & 1) << (31 - i);
    return out;
  }
};

struct FunnelLeft {  // the upper word of both, shifted
  uint32_t operator()(uint32_t low, uint32_t high, uint32_t by) const {
    return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) << by % 32 >> 32);
  }
};

template <typename T, bool kLeft>
void shift(Warp& w, const Instruction& in, uint32_t lanes) {
  uint8_t* out = w.rows + in.at[0];
  const uint8_t *a = w.rows + in.at[1], *b = w.rows + in.at[2];
  for_lanes(lanes, [&](int i) {
    constexpr uint32_t kBits = 8 * sizeof(T);
    const uint32_t by = get<uint32_t>(b, i);
    const T value = get<T>(a, i), beyond = kLeft || value >= 0 ? T{0} : static_cast<T>(-1);
    put<T>(out, i, by >= kBits ? beyond : static_cast<T>(kLeft ? value << by : value >> by));
  });
}

template <typename T>
void insert_bits(Warp& w, const Instruction& in, uint32_t lanes) {
  uint8_t* rows = w.rows;
  for_lanes(lanes, [&](int i) {
    const T field = get<T>(rows + in.at[1], i), base = get<T>(rows + in.at[2], i);
    const uint32_t position = get<uint32_t>(rows + in.at[3], i) & 0xff,
                   length = get<uint32_t>(rows + in.at[4], i) & 0xff;
    constexpr uint32_t kBits = 8 * sizeof(T);
    const T ones = length >= kBits ? static_cast<T>(~T{0}) : static_cast<T>((T{1} << length) - 1);
    const T mask = position >= kBits ? T{0} : static_cast<T>(ones << position);
    put<T>(rows + in.at[0], i,
           static_cast<T>((base & ~mask) | ((position >= kBits ? T{0} : field << position) & mask)));
  });
}

template <typename T>
void select(Warp& w, const Instruction& in, uint32_t lanes) {
  uint8_t* out = w.rows + in.at[0];
  const uint8_t *a = w.rows + in.at[1], *b = w.rows + in.at[2];
  const uint32_t chosen = *w.row<uint32_t>(in.at[3]);
  for_lanes(lanes, [&](int i) { put<T>(out, i, chosen >> i & 1 ? get<T>(a, i) : get<T>(b, i)); });
}

using Sink = std::function<void(const std::string&, Class, Handler)>;

// Two and three operands in the default rounding, in other roundings, and with flushing.
template <typename F>
void add_rounded2(const Sink& add, const std::string& name, Class kind) {
  using T = float;
  for (const char* mode : {"", ".rn"}) {
    add(name + mode + ".f32", kind, each2<T, T, F>);
    add(name + mode + ".ftz.f32", kind, each2<T, T, Flushed<F>>);
    add(name + mode + ".f64", Class::kFloat64, each2<double, double, F>);
  }
  add(name + ".rm.f32", kind, rounded<_MM_ROUND_DOWN, each2<T, T, F>>);
  add(name + ".rp.f32", kind, rounded<_MM_ROUND_UP, each2<T, T, F>>);
  add(name + ".rz.f32", kind, rounded<_MM_ROUND_TOWARD_ZERO, each2<T, T, F>>);
  add(name + ".rz.ftz.f32", kind, rounded<_MM_ROUND_TOWARD_ZERO, each2<T, T, Flushed<F>>>);
}

void add_floats(const Sink& add) {
  using T = float;
  add_rounded2<Add>(add, "add", Class::kFloat32);
  add_rounded2<Subtract>(add, "sub", Class::kFloat32);
  add_rounded2<Multiply>(add, "mul", Class::kFloat32);
  add_rounded2<Divide>(add, "div", Class::kSpecial);
  add_rounded2<MinimumNumber>(add, "min", Class::kFloat32);
  add_rounded2<Maximum>(add, "max", Class::kFloat32);
  for (const char* mode : {".approx", ".full"}) {
    add(std::string("div") + mode + ".f32", Class::kSpecial, each2<T, T, Divide>);
    add(std::string("div") + mode + ".ftz.f32", Class::kSpecial, each2<T, T, Flushed<Divide>>);
  }
  add("fma.rn.f32", Class::kFloat32, each3<T, T, MultiplyAdd>);
  add("fma.rn.ftz.f32", Class::kFloat32, each3<T, T, Flushed<MultiplyAdd>>);
  add("fma.rn.sat.f32", Class::kFloat32, each3<T, T, Saturated<MultiplyAdd>>);
  add("fma.rm.f32", Class::kFloat32, rounded<_MM_ROUND_DOWN, each3<T, T, MultiplyAdd>>);
  add("fma.rp.f32", Class::kFloat32, rounded<_MM_ROUND_UP, each3<T, T, MultiplyAdd>>);
  add("fma.rz.f32", Class::kFloat32, rounded<_MM_ROUND_TOWARD_ZERO, each3<T, T, MultiplyAdd>>);
  add("fma.rm.ftz.f32", Class::kFloat32, rounded<_MM_ROUND_DOWN, each3<T, T, Flushed<MultiplyAdd>>>);
  add("fma.rn.f64", Class::kFloat64, each3<double, double, MultiplyAdd>);
  const auto unary = [&](const std::string& name, Class kind, Handler plain, Handler flush) {
    add(name + ".f32", kind, plain);
    add(name + ".ftz.f32", kind, flush);
  };
  unary("neg", Class::kFloat32, each1<T, T, Negate>, each1<T, T, Flushed<Negate>>);
  unary("abs", Class::kFloat32, each1<T, T, Absolute>, each1<T, T, Flushed<Absolute>>);
  unary("sqrt.rn", Class::kSpecial, each1<T, T, SquareRoot>, each1<T, T, Flushed<SquareRoot>>);
  unary("sqrt.approx", Class::kSpecial, each1<T, T, SquareRoot>, each1<T, T, Flushed<SquareRoot>>);
  unary("rsqrt.approx", Class::kSpecial, each1<T, T, ReciprocalRoot>, each1<T, T, Flushed<ReciprocalRoot>>);
  unary("ex2.approx", Class::kSpecial, each1<T, T, Exponential2>, each1<T, T, Flushed<Exponential2>>);
  unary("lg2.approx", Class::kSpecial, each1<T, T, Logarithm2>, each1<T, T, Flushed<Logarithm2>>);
  unary("rcp.rn", Class::kSpecial, each1<T, T, Reciprocal>, each1<T, T, Flushed<Reciprocal>>);
  unary("rcp.approx", Class::kSpecial, each1<T, T, Reciprocal>, each1<T, T, Flushed<Reciprocal>>);
  add("neg.f64", Class::kFloat64, each1<double, double, Negate>);
  add("abs.f64", Class::kFloat64, each1<double, double, Absolute>);
  add("sqrt.rn.f64", Class::kFloat64, each1<double, double, SquareRoot>);
  add("rcp.rn.f64", Class::kFloat64, each1<double, double, Reciprocal>);
  add("rcp.approx.ftz.f64", Class::kFloat64, each1<double, double, CoarseReciprocal>);
}

template <typename S, typename U>
void add_integers(const Sink& add, const std::string& bits, Class kind) {
  const auto both = [&](const std::string& name, Handler is_signed, Handler is_unsigned) {
    add(name + ".s" + bits, kind, is_signed);
    add(name + ".u" + bits, kind, is_unsigned);
  };
  both("add", each2<U, U, Add>, each2<U, U, Add>);
  both("sub", each2<U, U, Subtract>, each2<U, U, Subtract>);
  both("mul.lo", each2<U, U, Multiply>, each2<U, U, Multiply>);
  both("mad.lo", each3<U, U, MultiplyAdd>, each3<U, U, MultiplyAdd>);
  both("div", each2<S, S, Divide>, each2<U, U, Divide>);
  both("rem", each2<S, S, Remainder>, each2<U, U, Remainder>);
  both("min", each2<S, S, Minimum>, each2<U, U, Minimum>);
  both("max", each2<S, S, Maximum>, each2<U, U, Maximum>);
  both("shr", shift<S, false>, shift<U, false>);
  add("neg.s" + bits, kind, each1<S, S, Negate>);
  add("abs.s" + bits, kind, each1<S, S, Absolute>);
  add("and.b" + bits, kind, each2<U, U, std::bit_and<>>);
  add("or.b" + bits, kind, each2<U, U, std::bit_or<>>);
  add("xor.b" + bits, kind, each2<U, U, std::bit_xor<>>);
  add("not.b" + bits, kind, each1<U, U, std::bit_not<>>);
  add("shl.b" + bits, kind, shift<U, true>);
  add("shr.b" + bits, kind, shift<U, false>);
  for (const char* type : {".b", ".s", ".u"}) add("selp" + (type + bits), kind, select<U>);
}

void add_bits(const Sink& add) {
  add("shf.l.wrap.b32", Class::kInteger, each3<uint32_t, uint32_t, FunnelLeft>);
  add("mul.wide.s32", Class::kInteger64, each2<int64_t, int32_t, WideMultiply<int64_t>>);
  add("mul.wide.u32", Class::kInteger64, each2<uint64_t, uint32_t, WideMultiply<uint64_t>>);
  add("mul.wide.s16", Class::kInteger, each2<int32_t, int16_t, WideMultiply<int32_t>>);
  add("mul.wide.u16", Class::kInteger, each2<uint32_t, uint16_t, WideMultiply<uint32_t>>);
  add("mad.wide.s32", Class::kInteger64, each3<int64_t, int32_t, WideMultiply<int64_t>>);
  add("mad.wide.u32", Class::kInteger64, each3<uint64_t, uint32_t, WideMultiply<uint64_t>>);
  add("mul.hi.s32", Class::kInteger, each2<int32_t, int32_t, HighMultiply<int64_t>>);
  add("mul.hi.u32", Class::kInteger, each2<uint32_t, uint32_t, HighMultiply<uint64_t>>);
  add("mul.hi.s64", Class::kInteger64, each2<int64_t, int64_t, HighMultiply<__int128>>);
  add("mul.hi.u64", Class::kInteger64, each2<uint64_t, uint64_t, HighMultiply<unsigned __int128>>);
  add("popc.b32", Class::kInteger, each1<uint32_t, uint32_t, PopulationCount>);
  add("popc.b64", Class::kInteger, each1<uint32_t, uint64_t, PopulationCount>);
  add("brev.b32", Class::kInteger, each1<uint32_t, uint32_t, Reverse>);
  add("clz.b32", Class::kInteger, each1<uint32_t, uint32_t, CountLeadingZeros>);
  add("bfind.u32", Class::kInteger, each1<uint32_t, uint32_t, LeadingBit>);
  add("bfind.shiftamt.u32", Class::kInteger, each1<uint32_t, uint32_t, LeadingZeros>);
  add("bfi.b32", Class::kInteger, insert_bits<uint32_t>);
  add("bfi.b64", Class::kInteger64, insert_bits<uint64_t>);
  add("selp.f32", Class::kInteger, select<uint32_t>);
  add("selp.f64", Class::kInteger64, select<uint64_t>);
}

}  // namespace

void add_arithmetic(const std::function<void(const Opcode&)>& sink) {
  const Sink add = [&](const std::string& name, Class kind, Handler handler) { sink({name.c_str(), kind, handler}); };
  add_floats(add);
  add_integers<int32_t, uint32_t>(add, "32", Class::kInteger);
  add_integers<int64_t, uint64_t>(add, "64", Class::kInteger64);
  add_integers<int16_t, uint16_t>(add, "16", Class::kInteger);
  add_bits(add);
}

}  // namespace ptx
