// Argument checks of the operators. A message names the argument, what was expected and what was passed.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpr_fast.h"
#include "ops/ops.h"

namespace cpr::ops {

using torch::headeronly::ScalarType;

inline std::string text(const char* part) { return part; }
inline std::string text(int64_t part) { return std::to_string(part); }
inline std::string text(double part) { return std::to_string(part); }
inline std::string text(const std::vector<int64_t>& shape) {
  std::string listed = "[";
  for (size_t axis = 0; axis < shape.size(); ++axis) listed += (axis ? ", " : "") + std::to_string(shape[axis]);
  return listed + "]";
}
inline std::string text(const Tensor& tensor) {  // its shape
  std::vector<int64_t> shape;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) shape.push_back(tensor.size(axis));
  return text(shape);
}

// Throws std::invalid_argument (ValueError in Python) unless `condition` holds. The message is assembled from its parts
// only if it is thrown.
template <class... Parts>
inline void check(bool condition, const Parts&... parts) {
  if (!condition) throw std::invalid_argument((text(parts) + ...));
}

inline void check_shape(const char* name, const Tensor& tensor, const std::vector<int64_t>& shape) {
  bool equal = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t axis = 0; equal && axis < shape.size(); ++axis) equal = tensor.size(axis) == shape[axis];
  check(equal, name, ": expected shape ", shape, ", got ", tensor);
}

inline int dtype_code(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return CPR_F32;
    case ScalarType::BFloat16:
      return CPR_BF16;
    case ScalarType::Half:
      return CPR_F16;
    case ScalarType::Double:
      return CPR_F64;
    default:
      throw std::invalid_argument(std::string(name) + ": expected a floating-point dtype");
  }
}

inline int choice(const char* name, const std::string& value, const std::vector<const char*>& names) {
  std::string listed;
  for (size_t code = 0; code < names.size(); ++code) {
    if (value == names[code]) return static_cast<int>(code);
    listed += std::string(code ? ", '" : "'") + names[code] + "'";
  }
  throw std::invalid_argument(std::string(name) + ": expected one of " + listed + ", got '" + value + "'");
}

// Checks the modes [B] of own_key, in host memory, or null.
inline void check_self_modes(const int64_t* modes, int64_t B) {
  for (int64_t b = 0; modes != nullptr && b < B; ++b) {
    check(modes[b] >= 0 && modes[b] <= 2, "self_positive: expected 0, 1 or 2, got ", modes[b]);
  }
}

}  // namespace cpr::ops
