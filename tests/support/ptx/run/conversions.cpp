// Moves, packing, conversions between types, and address conversions.
#include "operations.h"

namespace ptx {
namespace {

using Sink = std::function<void(const std::string&, Class, Handler)>;

struct Copy1 {
  template <typename T>
  T operator()(T a) const {
    return a;
  }
};

template <typename R>
struct Cast {
  template <typename T>
  R operator()(T a) const {
    return static_cast<R>(a);
  }
};

// The low bits of a wider register, extended as the sign of T says.
template <typename T>
struct Low {
  int64_t operator()(int64_t a) const { return static_cast<int64_t>(static_cast<T>(a)); }
};

// Rounding to an integral value.
struct Nearest {
  template <typename T>
  T operator()(T a) const {
    return std::nearbyint(a);
  }
};
struct Truncate {
  template <typename T>
  T operator()(T a) const {
    return std::trunc(a);
  }
};
struct Floor {
  template <typename T>
  T operator()(T a) const {
    return std::floor(a);
  }
};
struct Ceiling {
  template <typename T>
  T operator()(T a) const {
    return std::ceil(a);
  }
};

// Rounds, then clamps to the range of R; NaN gives 0.
template <typename R, typename Round>
struct ToInteger {
  template <typename T>
  R operator()(T a) const {
    const T rounded = Round()(a);
    if (a != a) return 0;
    constexpr R kLeast = std::numeric_limits<R>::min(), kGreatest = std::numeric_limits<R>::max();
    if (rounded <= static_cast<T>(kLeast)) return kLeast;
    if (rounded >= static_cast<T>(kGreatest)) return kGreatest;
    return static_cast<R>(rounded);
  }
};

float widen_half(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  uint32_t word = sign | 0x7f800000u | (magnitude & 0x3ffu) << 13;
  float value;
  if (magnitude < 0x7c00u) {
    word = magnitude << 13;
    memcpy(&value, &word, sizeof value);
    return (sign != 0 ? -1.0f : 1.0f) * (value * 0x1p112f);
  }
  memcpy(&value, &word, sizeof value);
  return value;
}

uint16_t narrow_to_half(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const float magnitude = std::fabs(x);
  if (x != x) return 0x7fff;
  if (magnitude >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x1p-14f) return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::rint(magnitude * 0x1p24f)));
  const uint32_t rebased = (bits & 0x7fffffffu) - (112u << 23);
  return static_cast<uint16_t>(sign | (rebased + 0xfffu + (rebased >> 13 & 1)) >> 13);
}

uint16_t narrow_to_bfloat(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return x != x ? 0x7fff : static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

struct WidenHalf {
  float operator()(uint16_t a) const { return widen_half(a); }
};
struct WidenBfloat {
  float operator()(uint16_t a) const {
    const uint32_t word = static_cast<uint32_t>(a) << 16;
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
  }
};
struct ToHalf {
  uint16_t operator()(float a) const { return narrow_to_half(a); }
  uint32_t operator()(float a, float b) const {
    return static_cast<uint32_t>(narrow_to_half(a)) << 16 | narrow_to_half(b);
  }
};
struct ToBfloat {
  uint16_t operator()(float a) const { return narrow_to_bfloat(a); }
  uint32_t operator()(float a, float b) const {
    return static_cast<uint32_t>(narrow_to_bfloat(a)) << 16 | narrow_to_bfloat(b);
  }
};

// a b + c of two bfloat16 numbers. Rounded to float with the last bit set if anything is lost, so that the second
// rounding is right.
struct MultiplyAddPair {
  static uint16_t one(uint32_t a, uint32_t b, uint32_t c) {
    const auto widen = [](uint32_t bits) -> double { return WidenBfloat()(static_cast<uint16_t>(bits)); };
    const double sum = std::fma(widen(a), widen(b), widen(c));
    float rounded = static_cast<float>(sum);
    if (std::fabs(static_cast<double>(rounded)) > std::fabs(sum)) rounded = std::nextafterf(rounded, 0);
    uint32_t bits;
    memcpy(&bits, &rounded, sizeof bits);
    if (rounded != sum && rounded == rounded) bits |= 1;
    memcpy(&rounded, &bits, sizeof bits);
    return narrow_to_bfloat(rounded);
  }
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t c) const {
    return one(a, b, c) | static_cast<uint32_t>(one(a >> 16, b >> 16, c >> 16)) << 16;
  }
};

template <typename T, typename Part>
void pack(Warp& w, const Instruction& in, uint32_t lanes) {
  for_lanes(lanes, [&](int i) {
    T packed = 0;
    for (int part = 0; part < in.operands - 1; ++part) {
      packed |= static_cast<T>(get<Part>(w.rows + in.at[1 + part], i)) << (8 * sizeof(Part) * part);
    }
    put<T>(w.rows + in.at[0], i, packed);
  });
}

template <typename T, typename Part>
void unpack(Warp& w, const Instruction& in, uint32_t lanes) {
  for_lanes(lanes, [&](int i) {
    const T packed = get<T>(w.rows + in.at[in.operands - 1], i);
    for (int part = 0; part < in.operands - 1; ++part) {
      put<Part>(w.rows + in.at[part], i, static_cast<Part>(packed >> (8 * sizeof(Part) * part)));
    }
  });
}

template <uint64_t kWindow, bool kToGeneric>
void convert_address(Warp& w, const Instruction& in, uint32_t lanes) {
  for_lanes(lanes, [&](int i) {
    const uint64_t address = get<uint64_t>(w.rows + in.at[1], i);
    put<uint64_t>(w.rows + in.at[0], i, kToGeneric ? address + kWindow : address - kWindow);
  });
}

// Selects bytes of two words, the plain mode of prmt.
void permute(Warp& w, const Instruction& in, uint32_t lanes) {
  for_lanes(lanes, [&](int i) {
    const uint64_t bytes =
        static_cast<uint64_t>(get<uint32_t>(w.rows + in.at[2], i)) << 32 | get<uint32_t>(w.rows + in.at[1], i);
    const uint32_t selector = get<uint32_t>(w.rows + in.at[3], i);
    uint32_t out = 0;
    for (int b = 0; b < 4; ++b) {
      const uint32_t choice = selector >> (4 * b) & 15;
      uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (choice & 7))) & 0xff;
      if (choice & 8) byte = byte & 0x80 ? 0xff : 0;
      out |= byte << (8 * b);
    }
    put<uint32_t>(w.rows + in.at[0], i, out);
  });
}

void add_moves(const Sink& add) {
  for (const char* type : {"b16", "u16", "s16", "f16"})
    add(std::string("mov.") + type, Class::kMove, each1<uint16_t, uint16_t, Copy1>);
  for (const char* type : {"b32", "u32", "s32", "f32"})
    add(std::string("mov.") + type, Class::kMove, each1<uint32_t, uint32_t, Copy1>);
  for (const char* type : {"b64", "u64", "s64", "f64"})
    add(std::string("mov.") + type, Class::kMove, each1<uint64_t, uint64_t, Copy1>);
  add("mov.b32 pack", Class::kMove, pack<uint32_t, uint16_t>);
  add("mov.b64 pack", Class::kMove, pack<uint64_t, uint32_t>);
  add("mov.b32 unpack", Class::kMove, unpack<uint32_t, uint16_t>);
  add("mov.b64 unpack", Class::kMove, unpack<uint64_t, uint32_t>);
  add("cvta.global.u64", Class::kMove, convert_address<0, true>);
  add("cvta.to.global.u64", Class::kMove, convert_address<0, false>);
  add("cvta.shared.u64", Class::kMove, convert_address<kSharedWindow, true>);
  add("cvta.to.shared.u64", Class::kMove, convert_address<kSharedWindow, false>);
  add("cvta.local.u64", Class::kMove, convert_address<kLocalWindow, true>);
  add("cvta.to.local.u64", Class::kMove, convert_address<kLocalWindow, false>);
  add("prmt.b32", Class::kInteger, permute);
}

template <typename T>
void add_from_integer(const Sink& add, const std::string& from) {
  add("cvt.s8." + from, Class::kConversion, each1<int8_t, T, Cast<int8_t>>);
  add("cvt.u8." + from, Class::kConversion, each1<uint8_t, T, Cast<uint8_t>>);
  add("cvt.s16." + from, Class::kConversion, each1<int16_t, T, Cast<int16_t>>);
  add("cvt.u16." + from, Class::kConversion, each1<uint16_t, T, Cast<uint16_t>>);
  add("cvt.s32." + from, Class::kMove, each1<int32_t, T, Cast<int32_t>>);
  add("cvt.u32." + from, Class::kMove, each1<uint32_t, T, Cast<uint32_t>>);
  add("cvt.s64." + from, from[0] == 's' ? Class::kInteger : Class::kMove, each1<int64_t, T, Cast<int64_t>>);
  add("cvt.u64." + from, Class::kMove, each1<uint64_t, T, Cast<uint64_t>>);
  add("cvt.s64." + from + ".low", Class::kInteger, each1<int64_t, int64_t, Low<T>>);
  add("cvt.u64." + from + ".low", Class::kInteger, each1<int64_t, int64_t, Low<T>>);
  add("cvt.rn.f32." + from, Class::kConversion, each1<float, T, Cast<float>>);
  add("cvt.rz.f32." + from, Class::kConversion, rounded<_MM_ROUND_TOWARD_ZERO, each1<float, T, Cast<float>>>);
  add("cvt.rn.f64." + from, Class::kFloat64, each1<double, T, Cast<double>>);
}

template <typename T, typename Round>
void add_to_integer(const Sink& add, const std::string& round, const std::string& from) {
  const Class kind = sizeof(T) == 8 ? Class::kFloat64 : Class::kConversion;
  for (const std::string& flags : {round, round + ".ftz", round + ".sat"}) {
    add("cvt" + flags + ".s32." + from, kind, each1<int32_t, T, ToInteger<int32_t, Round>>);
    add("cvt" + flags + ".u32." + from, kind, each1<uint32_t, T, ToInteger<uint32_t, Round>>);
    add("cvt" + flags + ".u16." + from, kind, each1<uint16_t, T, ToInteger<uint16_t, Round>>);
    add("cvt" + flags + ".s64." + from, kind, each1<int64_t, T, ToInteger<int64_t, Round>>);
    add("cvt" + flags + ".u64." + from, kind, each1<uint64_t, T, ToInteger<uint64_t, Round>>);
    add("cvt" + flags + "." + from + "." + from, kind, each1<T, T, Round>);
  }
}

void add_floats(const Sink& add) {
  add_to_integer<float, Nearest>(add, ".rni", "f32");
  add_to_integer<float, Truncate>(add, ".rzi", "f32");
  add_to_integer<float, Floor>(add, ".rmi", "f32");
  add_to_integer<float, Ceiling>(add, ".rpi", "f32");
  add_to_integer<double, Nearest>(add, ".rni", "f64");
  add_to_integer<double, Truncate>(add, ".rzi", "f64");
  add_to_integer<double, Floor>(add, ".rmi", "f64");
  add_to_integer<double, Ceiling>(add, ".rpi", "f64");
  add("cvt.sat.f32.f32", Class::kFloat32, each1<float, float, Saturate>);
  add("cvt.sat.ftz.f32.f32", Class::kFloat32, each1<float, float, Saturate>);
  add("cvt.ftz.sat.f32.f32", Class::kFloat32, each1<float, float, Saturate>);
  add("cvt.f64.f32", Class::kFloat64, each1<double, float, Cast<double>>);
  add("cvt.ftz.f64.f32", Class::kFloat64, each1<double, float, Flushed<Cast<double>>>);
  add("cvt.rn.f32.f64", Class::kFloat64, each1<float, double, Cast<float>>);
  add("cvt.f32.f16", Class::kConversion, each1<float, uint16_t, WidenHalf>);
  add("cvt.f32.bf16", Class::kConversion, each1<float, uint16_t, WidenBfloat>);
  add("cvt.rn.f16.f32", Class::kConversion, each1<uint16_t, float, ToHalf>);
  add("cvt.rn.bf16.f32", Class::kConversion, each1<uint16_t, float, ToBfloat>);
  add("cvt.rn.f16x2.f32", Class::kConversion, each2<uint32_t, float, ToHalf>);
  add("cvt.rn.bf16x2.f32", Class::kConversion, each2<uint32_t, float, ToBfloat>);
  add("fma.rn.bf16x2", Class::kFloat32, each3<uint32_t, uint32_t, MultiplyAddPair>);
}

}  // namespace

void add_conversions(const std::function<void(const Opcode&)>& sink) {
  const Sink add = [&](const std::string& name, Class kind, Handler handler) { sink({name.c_str(), kind, handler}); };
  add_moves(add);
  add_from_integer<int8_t>(add, "s8");
  add_from_integer<uint8_t>(add, "u8");
  add_from_integer<int16_t>(add, "s16");
  add_from_integer<uint16_t>(add, "u16");
  add_from_integer<int32_t>(add, "s32");
  add_from_integer<uint32_t>(add, "u32");
  add_from_integer<int64_t>(add, "s64");
  add_from_integer<uint64_t>(add, "u64");
  add_floats(add);
}

}  // namespace ptx
