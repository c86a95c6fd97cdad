// The products of warpgroups on the emulated device. Like instructions.cpp, this file is never instrumented and reports
// its accesses itself.
#include <map>

#include "emulated_warpgroup.h"
#include "scheduler.h"

namespace cpr {
extern float4 dynamic_shared[];
}

namespace emulation {

extern unsigned long matrix_products;

namespace {
constexpr uint32_t kUnderWay = 0x7fc0beefu;  // a sum whose product is under way: a NaN

int lane() { return static_cast<int>(threadIdx.x) % kWarp; }

const unsigned char* shared_memory() { return reinterpret_cast<const unsigned char*>(cpr::dynamic_shared); }

uint16_t element_at(const Factor& factor, int k, int n) {
  const uint32_t address = factor.at(static_cast<uint32_t>(k), static_cast<uint32_t>(n));
  if (address + 2 > kSharedBytes) fail("a product reads beyond shared memory");
  uint16_t bits;
  memcpy(&bits, shared_memory() + address, sizeof bits);
  return bits;
}

// Column c of those that the thread has of a product.
int column_of(int c) { return c / 2 * 8 + lane() % 4 * 2 + c % 2; }

std::vector<uint16_t> read_columns(const Factor& factor, int columns) {
  std::vector<uint16_t> read;
  for (int c = 0; c < columns / 4; ++c) {
    for (int k = 0; k < 16; ++k) read.push_back(element_at(factor, k, column_of(c)));
  }
  return read;
}

// Tells the observer that the warp begins or ends to read the vectors of a factor; one thread does so for all.
void observe_factor(const Product& product, bool done, const void* caller) {
  if (lane() != 0) return;
  const int columns = static_cast<int>(product.columns.size()) / 4;
  const int k_step = product.other.transposed ? 1 : 8, n_step = product.other.transposed ? 8 : 1;
  for (int k = 0; k < 16; k += k_step) {
    for (int n = 0; n < columns; n += n_step) {
      const uint32_t at = product.other.at(static_cast<uint32_t>(k), static_cast<uint32_t>(n));
      if (at + 16 <= kSharedBytes) observe_product(shared_memory() + at, done, caller);
    }
  }
}

bool is_under_way(const float* sum, size_t count) {
  bool marked = true;
  for (size_t i = 0; i < count; ++i) marked &= __float_as_uint(sum[i]) == kUnderWay;
  return marked;
}

// Adds a product to the sums of the thread.
void add(const Product& product, std::vector<float>& sums) {
  for (size_t at = 0; at < sums.size(); ++at) {
    const size_t column = at / 4 * 2 + at % 2;
    double y[16];
    for (size_t k = 0; k < 16; ++k) y[k] = product.element.widen(product.columns[column * 16 + k]);
    sums[at] = product_sum(product.rows[at / 2 % 2], y, sums[at], product.element.least_exponent);
    if (!product.defined) sums[at] = __uint_as_float(kUnderWay);
  }
}
}  // namespace

uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(shared) - shared_memory());
}

void publish_to_products() { observe_publication(); }

void fence_registers() { products().fenced = true; }

void start_product(const Started& started, Site site) {
  const void* caller = __builtin_return_address(0);
  struct Row {
    uint32_t words[4];
  };
  const uint32_t* words = started.factor;
  const Row* lanes = exchange(kWholeWarp, Row{{words[0], words[1], words[2], words[3]}}, site);
  Product product = {};
  product.sum = started.sum, product.factor = started.factor, product.element = started.element;
  memcpy(product.words, words, sizeof product.words);
  for (int half = 0; half < 2; ++half) {
    for (int k = 0; k < 16; ++k) {
      const uint32_t word = lanes[lane() / 4 * 4 + k % 8 / 2].words[half + k / 8 * 2];
      product.rows[half][k] = started.element.widen(static_cast<uint16_t>(word >> k % 2 * 16));
    }
  }
  warpgroup_barrier(site);
  product.other = Factor(started.other, started.transposed);
  if (!product.other.valid) fail("a matrix descriptor with bits that have no meaning");
  product.accumulates = started.accumulates;
  Products& own = products();
  product.defined = own.fenced;
  if (!own.fenced) observe_fault("fence", "a product without a fence since the last commit or wait", caller);
  product.columns = read_columns(product.other, started.columns);
  observe_factor(product, false, caller);
  const size_t count = static_cast<size_t>(started.columns) / 2;
  bool follows = false;
  for (const auto* list : {&own.committed, &own.open}) {
    for (const Product& other : *list) follows |= other.sum == started.sum;
  }
  if (!follows) {
    product.before.assign(started.sum, started.sum + count);
    for (size_t i = 0; i < count; ++i) started.sum[i] = __uint_as_float(kUnderWay);
  }
  own.open.push_back(std::move(product));
  if (lane() == 0) matrix_products += static_cast<unsigned long>(started.columns) / 8;
}

void commit_products() {
  Products& own = products();
  for (Product& product : own.open) own.committed.push_back(std::move(product));
  own.open.clear();
  own.fenced = false;
}

void wait_for_products() {
  const void* caller = __builtin_return_address(0);
  Products& own = products();
  std::map<float*, std::vector<float>> sums;
  for (Product& product : own.committed) {
    if (!product.before.empty()) sums[product.sum] = product.before;
    std::vector<float>& sum = sums[product.sum];
    if (!product.accumulates) sum.assign(sum.size(), 0.0f);
    if (memcmp(product.factor, product.words, sizeof product.words) != 0 || !is_under_way(product.sum, sum.size()) ||
        read_columns(product.other, static_cast<int>(product.columns.size()) / 4) != product.columns) {
      observe_fault("product under way", "what it uses was written", caller);
      product.defined = false;
    }
    observe_factor(product, true, caller);
    add(product, sum);
  }
  own.committed.clear();
  own.fenced = false;
  for (auto& [place, sum] : sums) {
    Product* next = nullptr;  // the first that goes on with these sums
    for (Product& open : own.open) next = next == nullptr && open.sum == place ? &open : next;
    if (next != nullptr) {
      next->before = sum;
    } else {
      memcpy(place, sum.data(), sum.size() * sizeof(float));
    }
  }
}

const char* register_under_way(const void* address, size_t bytes, bool write) {
  const auto overlaps = [&](const void* begin, size_t size) {
    const auto at = reinterpret_cast<uintptr_t>(address), from = reinterpret_cast<uintptr_t>(begin);
    return at < from + size && from < at + bytes;
  };
  const Products& own = products();
  for (const auto* list : {&own.committed, &own.open}) {
    for (const Product& product : *list) {
      if (overlaps(product.sum, product.columns.size() / 8 * sizeof(float))) return "a sum of a product";
      if (write && overlaps(product.factor, sizeof product.words)) return "a factor of a product";
    }
  }
  return nullptr;
}

}  // namespace emulation
