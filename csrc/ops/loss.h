// The outputs of a loss over a memory; for the operators that compute one.
#pragma once

#include "cpr_fast.h"
#include "ops/launch.h"
#include "ops/ops.h"

namespace cpr::ops {

// Uninitialised tensors of `dtype` on the device of `like`: [B] each, and grad_query [B, D].
struct Loss {
  Loss(const Tensor& like, int64_t B, int64_t D, ScalarType dtype)
      : loss(empty(like, {B}, dtype)),
        grad_query(empty(like, {B, D}, dtype)),
        own_coefficient(empty(like, {B}, dtype)),
        lse_all(empty(like, {B}, dtype)),
        lse_positive(empty(like, {B}, dtype)) {}

  cpr_mil_nce_outputs pointers() {
    return {.loss = loss.mutable_data_ptr(),
            .grad_query = grad_query.mutable_data_ptr(),
            .own_coefficient = own_coefficient.mutable_data_ptr(),
            .lse_all = lse_all.mutable_data_ptr(),
            .lse_positive = lse_positive.mutable_data_ptr()};
  }

  Tensor loss, grad_query, own_coefficient, lse_all, lse_positive;
};

}  // namespace cpr::ops
