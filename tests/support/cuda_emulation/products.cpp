// The matrix products of tensor cores, by one of three models of their sums of 16 products and an addend.
//
// A100 and H100 follow the parameters of Xie et al., "MMA-Sim", arXiv 2511.10909, who compared them with the hardware.
// Products are exact. Every term is truncated towards zero to a number
// of bits below the greatest exponent, where the exponent of a product is the sum of those of its factors (not
// normalised); the terms are added exactly and the sum is truncated to float. An A100 keeps 24 such bits and adds eight
// products at a time, an H100 keeps 25 and adds all 16. The third model is worse than any of them: 23 bits below the
// greatest term.
#include "emulated_tensor_core.h"
#include "scheduler.h"

namespace emulation {

unsigned long matrix_products = 0;

namespace {
enum TensorCore { kWorst = 0, kA100 = 1, kH100 = 2 };
TensorCore tensor_core = kWorst;

// Returns 2^exponent, for -1022 <= exponent <= 1023.
double power_of_two(int exponent) {
  const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

float towards_zero(double value) {
  const float rounded = static_cast<float>(value);
  return fabs(rounded) > fabs(value) ? nextafterf(rounded, 0.0f) : rounded;
}

// Sums 17 addends less exactly than any tensor core: each is truncated to 24 bits relative to the greatest.
float truncated_sum(const double (&addends)[17]) {
  double greatest = 0;
  for (const double addend : addends) greatest = fabs(addend) > greatest ? fabs(addend) : greatest;
  double total = 0;
  if (greatest > 0 && greatest < HUGE_VAL) {
    uint64_t bits;
    memcpy(&bits, &greatest, sizeof bits);  // products of 16-bit floats, and floats, are normal doubles
    const int exponent = static_cast<int>(bits >> 52) - 1023;
    const double scale = power_of_two(23 - exponent);
    int64_t units = 0;
    for (const double addend : addends) units += addend == addend ? static_cast<int64_t>(addend * scale) : 0;
    total = static_cast<double>(units) * power_of_two(exponent - 23);
    for (const double addend : addends) total = addend == addend ? total : addend;
  } else {
    for (const double addend : addends) total += addend;
  }
  return towards_zero(total);
}

int exponent_of(double value, int least) {
  const int exponent = value == 0 ? -1000 : ilogb(value);
  return value != 0 && exponent < least ? least : exponent;
}

struct Term {
  double value;
  int exponent;
};

// Sums terms as a tensor core that keeps `bits` bits below the greatest exponent.
float fused_sum(const Term* terms, int count, int bits) {
  int greatest = -1000;
  double plain = 0;
  for (int i = 0; i < count; ++i) {
    plain += terms[i].value;
    greatest = terms[i].exponent > greatest ? terms[i].exponent : greatest;
  }
  if (!(fabs(plain) < HUGE_VAL)) return static_cast<float>(plain);
  if (greatest == -1000) return 0;
  int64_t units = 0;
  for (int i = 0; i < count; ++i) units += static_cast<int64_t>(terms[i].value * power_of_two(bits - greatest));
  return towards_zero(static_cast<double>(units) * power_of_two(greatest - bits));
}

}  // namespace

float product_sum(const double (&x)[16], const double (&y)[16], float addend, int least_exponent) {
  double addends[17];
  Term terms[17];
  for (int k = 0; k < 16; ++k) {
    addends[k] = x[k] * y[k];
    terms[k] = {addends[k],
                addends[k] == 0 ? -1000 : exponent_of(x[k], least_exponent) + exponent_of(y[k], least_exponent)};
  }
  if (tensor_core == kA100) {
    for (int half = 0; half < 2; ++half) {
      Term part[9];
      for (int k = 0; k < 8; ++k) part[k] = terms[8 * half + k];
      part[8] = {addend, exponent_of(addend, -126)};
      addend = fused_sum(part, 9, 24);
    }
    return addend;
  }
  addends[16] = addend;
  terms[16] = {addend, exponent_of(addend, -126)};
  return tensor_core == kH100 ? fused_sum(terms, 17, 25) : truncated_sum(addends);
}

void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Element element, Site site) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const Operands* lanes = exchange(kWholeWarp, Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}}, site);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  matrix_products += lane == 0;
  for (int at = 0; at < 4; ++at) {
    const int row = lane / 4 + at / 2 * 8, column = lane % 4 * 2 + at % 2;
    double x[16], y[16];
    for (int k = 0; k < 16; ++k) {
      const Operands& of_row = lanes[row % 8 * 4 + k % 8 / 2];
      const Operands& of_column = lanes[column * 4 + k % 8 / 2];
      x[k] = element.widen(static_cast<uint16_t>(of_row.a[row / 8 + k / 8 * 2] >> k % 2 * 16));
      y[k] = element.widen(static_cast<uint16_t>(of_column.b[k / 8] >> k % 2 * 16));
    }
    sum[at] = product_sum(x, y, sum[at], element.least_exponent);
  }
}

}  // namespace emulation

// Returns the number of matrix products so far: tests check that a call used tensor cores.
extern "C" __attribute__((visibility("default"))) unsigned long emulation_products() {
  return emulation::matrix_products;
}

// Sets the model of the sums of tensor cores: 0 worse than any, 1 of an A100, 2 of an H100.
extern "C" __attribute__((visibility("default"))) void emulation_set_tensor_core(int model) {
  emulation::tensor_core = static_cast<emulation::TensorCore>(model);
}
