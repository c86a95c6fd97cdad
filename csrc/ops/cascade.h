// The arguments and outputs of a cascade, checked and dense; for the operators that contain one.
#pragma once

#include <string>
#include <vector>

#include "cpr_fast.h"
#include "ops/ops.h"

namespace cpr::ops {

struct Cascade {
  // Throws std::invalid_argument; the message names the argument.
  Cascade(const Tensor& queries, const Tensor& memory, std::vector<int64_t> views, std::vector<int64_t> keep,
          const OptionalTensor& query_ids, const OptionalTensor& memory_ids, const std::string& precision);
  Cascade(const Cascade&) = delete;
  Cascade& operator=(const Cascade&) = delete;

  Tensor queries, memory;  // [V, B, D], [V, K, D]
  std::vector<int64_t> views, keep;
  OptionalTensor query_ids, memory_ids;
  Tensor indices, scores;  // [B, keep[-1]], uninitialised
  cpr_cascade_args args;   // points into the members
};

}  // namespace cpr::ops
