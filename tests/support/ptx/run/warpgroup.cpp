// Products of a warpgroup, whose second factor is in shared memory, and their fences, commits and waits. The rule on
// fences is stricter than that of PTX: the first product after each commit and wait needs one. Registers that a product
// uses may not be written between that fence and the product.
#include <map>

#include "products.h"

namespace ptx {
namespace {

constexpr uint32_t kUnderWay = 0x7fc0beefu;  // a sum whose product is under way: a NaN

void require_warp(uint32_t lanes) {
  if (lanes != kAllLanes) throw Error("wgmma by a part of a warp");
}

int columns_of(const Product& product) { return static_cast<int>(product.columns.size()) / 16; }

std::vector<uint16_t> read_columns(Warp& w, const Factor& factor, int columns) {
  std::vector<uint16_t> read;
  for (int n = 0; n < columns; ++n) {
    for (int k = 0; k < 16; ++k) {
      const uint32_t address = factor.at(static_cast<uint32_t>(k), static_cast<uint32_t>(n));
      if (address + 2 > w.machine->shared_bytes) throw Error("wgmma: a factor outside the shared memory of the block");
      uint16_t element;
      memcpy(&element, w.block->shared.data() + address, sizeof element);
      read.push_back(element);
    }
  }
  return read;
}

// The rows of the sums of a product in the frame: kColumns / 2 of 32 lanes.
std::vector<float> sums_of(Warp& w, const Product& product) {
  std::vector<float> sums;
  for (int i = 0; i < columns_of(product) / 2; ++i) {
    const float* row = w.row<float>(product.in->row(i));
    sums.insert(sums.end(), row, row + kLanes);
  }
  return sums;
}

void set_sums(Warp& w, const Product& product, const float* sums) {
  for (int i = 0; i < columns_of(product) / 2; ++i) {
    memcpy(w.row<float>(product.in->row(i)), sums + i * kLanes, kLanes * sizeof(float));
  }
}

bool same_sums(const Product& a, const Product& b) { return a.in->row(0) == b.in->row(0); }

// Operands: the sums, four registers of a, the descriptor of b, whether to add to the sums, the signs of a and b, and
// whether b is transposed.
template <int kColumns>
void start(Warp& w, const Instruction& in, uint32_t lanes) {
  constexpr int kSums = kColumns / 2;
  require_warp(lanes);
  if (w.depth != 1) throw Error("wgmma in a called function");
  if (!w.registers_fenced) throw Error("wgmma without wgmma.fence since the last commit or wait");
  const auto immediate = [&](int operand) { return *w.row<uint32_t>(in.row(operand)); };
  if (immediate(kSums + 6) != 1 || immediate(kSums + 7) != 1) throw Error("wgmma: factors that are negated");
  Product product = {};
  product.in = &in;
  for (int i = 0; i < 4; ++i) memcpy(product.rows[i], w.row<uint32_t>(in.row(kSums + i)), sizeof product.rows[i]);
  const uint64_t* descriptor = w.row<uint64_t>(in.row(kSums + 4));
  for (int i = 1; i < kLanes; ++i) {
    if (descriptor[i] != descriptor[0]) throw Error("wgmma: descriptors that differ within a warp");
  }
  product.factor = Factor(descriptor[0], immediate(kSums + 8) != 0);
  if (!product.factor.valid) throw Error("wgmma: a descriptor with bits that have no meaning");
  product.accumulates = *w.row<uint32_t>(in.row(kSums + 5)) != 0;
  product.columns = read_columns(w, product.factor, kColumns);
  for (int i = 0; i < kSums + 4; ++i) {
    const auto fenced = w.fenced_rows.find(in.row(i));
    if (fenced != w.fenced_rows.end() && memcmp(fenced->second.data(), w.row<uint32_t>(in.row(i)), 4 * kLanes) != 0)
      throw Error("a register of a wgmma was written since wgmma.fence");
  }
  bool follows = false;
  for (const auto* list : {&w.committed_products, &w.open_products}) {
    for (const Product& other : *list) follows |= same_sums(other, product);
  }
  if (!follows) {
    product.before = sums_of(w, product);
    std::vector<uint32_t> marks(product.before.size(), kUnderWay);
    set_sums(w, product, reinterpret_cast<const float*>(marks.data()));
    for (int i = 0; i < kSums; ++i) w.fenced_rows.erase(in.row(i));
  }
  w.open_products.push_back(std::move(product));
  w.products.push_back(in.number);
  w.machine->products += kColumns / 8;
  Count& count = w.machine->count(in);
  count.units += kColumns / 8, count.least += kColumns / 8;
}

// Adds a product to sums [columns / 2][lanes].
template <typename Type>
void add(Warp& w, const Product& product, std::vector<float>& sums) {
  Fragment rows[16];
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 8; ++i) {
      const uint32_t bits = product.rows[i / 2][lane] >> i % 2 * 16 & 0xffff;
      rows[lane / 4 + i / 2 % 2 * 8].set(i / 4 * 8 + lane % 4 * 2 + i % 2, Type::widen(bits));
    }
  }
  for (int n = 0; n < columns_of(product); ++n) {
    Fragment column;
    for (int k = 0; k < 16; ++k) column.set(k, Type::widen(product.columns[static_cast<size_t>(n * 16 + k)]));
    for (int r = 0; r < 16; ++r) {
      const int lane = r % 8 * 4 + n % 8 / 2, i = n / 8 * 4 + r / 8 * 2 + n % 2;
      float& sum = sums[static_cast<size_t>(i * kLanes + lane)];
      sum = add_products(w.machine->product_model, rows[r], column, sum);
    }
  }
}

bool unchanged(Warp& w, const Product& product) {
  for (const float sum : sums_of(w, product)) {
    uint32_t bits;
    memcpy(&bits, &sum, sizeof bits);
    if (bits != kUnderWay) return false;
  }
  const int sums = columns_of(product) / 2;
  for (int i = 0; i < 4; ++i) {
    if (memcmp(product.rows[i], w.row<uint32_t>(product.in->row(sums + i)), sizeof product.rows[i]) != 0) return false;
  }
  return read_columns(w, product.factor, columns_of(product)) == product.columns;
}

void commit(Warp& w, const Instruction&, uint32_t lanes) {
  require_warp(lanes);
  for (Product& product : w.open_products) w.committed_products.push_back(std::move(product));
  w.open_products.clear();
  w.registers_fenced = false;
}

void fence(Warp& w, const Instruction& in, uint32_t lanes) {
  require_warp(lanes);
  w.registers_fenced = true;
  w.fenced_rows.clear();
  const std::vector<Instruction>& code = w.frame().function->code;
  const auto end = std::find_if(code.begin() + (&in - code.data()), code.end(),
                                [](const Instruction& next) { return next.opcode->execute == commit; });
  for (auto next = code.begin() + (&in - code.data()); next != end; ++next) {
    if (next->opcode->kind != Class::kWarpgroupMma) continue;
    for (int i = 0; i < next->operands - 5; ++i) {  // the sums and the factor
      const uint32_t* row = w.row<uint32_t>(next->row(i));
      w.fenced_rows.emplace(next->row(i), std::vector<uint32_t>(row, row + kLanes));
    }
  }
}

void wait(Warp& w, const Instruction& in, uint32_t lanes) {
  require_warp(lanes);
  if (*w.row<uint32_t>(in.row(0)) != 0) throw Error("wgmma.wait_group: only of all groups");
  std::map<uint32_t, std::pair<const Product*, std::vector<float>>> results;  // by the row of the first sum
  for (const Product& product : w.committed_products) {
    if (!unchanged(w, product)) throw Error("what a wgmma under way uses was written");
    auto& [last, sums] = results[product.in->row(0)];
    if (!product.before.empty()) sums = product.before;
    if (!product.accumulates) sums.assign(sums.size(), 0.0f);
    const bool half = std::string(product.in->opcode->name).find(".f32.f16") != std::string::npos;
    half ? add<Half>(w, product, sums) : add<Bfloat>(w, product, sums);
    last = &product;
  }
  for (auto& [row, result] : results) {
    Product* next = nullptr;  // the first that goes on with these sums
    for (Product& open : w.open_products) next = next == nullptr && same_sums(open, *result.first) ? &open : next;
    if (next != nullptr) {
      next->before = result.second;
    } else {
      set_sums(w, *result.first, result.second.data());
    }
  }
  w.committed_products.clear();
  w.registers_fenced = false;
}

}  // namespace

void check_warpgroups(const Block& block, uint32_t warps) {
  for (uint32_t i = 0; i < warps; ++i) {
    const uint32_t first = i / 4 * 4;
    const bool whole = first + 4 <= warps || block.warps[i]->products.empty();
    if (!whole || block.warps[i]->products != block.warps[first]->products)
      throw Error("wgmma that not every warp of a warpgroup reaches");
  }
}

void add_warpgroup(const std::function<void(const Opcode&)>& sink) {
  for (const char* type : {"bf16", "f16"}) {
    const std::string types = std::string("k16.f32.") + type + "." + type, name = "wgmma.mma_async.sync.aligned.m64n";
    sink({(name + "64" + types).c_str(), Class::kWarpgroupMma, start<64>});
    sink({(name + "128" + types).c_str(), Class::kWarpgroupMma, start<128>});
  }
  sink({"wgmma.fence.sync.aligned", Class::kOther, fence});
  sink({"wgmma.commit_group.sync.aligned", Class::kOther, commit});
  sink({"wgmma.wait_group.sync.aligned", Class::kOther, wait});
}

}  // namespace ptx
