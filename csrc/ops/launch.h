// Helpers to run a kernel on tensors of torch: dense inputs, new outputs, the number of threads, the CUDA stream.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <vector>

#include "ops/checks.h"

namespace cpr::ops {

inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Returns an uninitialised dense tensor on the device of `like`. It calls the allocator directly, because an allocation
// through the dispatcher costs 2 us and an operator has up to five outputs.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t axis = shape.size(); axis-- > 1;) strides[axis - 1] = strides[axis] * shape[axis];
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                                  dtype, device_type, like.get_device_index(), &made));
  return Tensor(made);
}

// Checks optional int64 ids or slots and returns them dense.
inline OptionalTensor dense_int64(const char* name, const OptionalTensor& tensor, const std::vector<int64_t>& shape,
                                  const Tensor& like) {
  if (!tensor) return std::nullopt;
  check(tensor->scalar_type() == ScalarType::Long, name, ": expected dtype int64");
  check(tensor->device() == like.device(), name, ": expected the same device as the features");
  check_shape(name, *tensor, shape);
  return dense(*tensor);
}

inline const int64_t* pointer(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr<int64_t>() : nullptr;
}

// Returns the number of threads set by torch.set_num_threads.
inline int num_threads() {
  uint32_t threads;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads));
  return static_cast<int>(threads);
}

inline void raise_failure(const char* failure) {
  if (failure != nullptr) throw std::runtime_error(failure);
}

#ifdef CPR_FAST_WITH_CUDA
// Returns the current CUDA stream. The function is looked up by name in libtorch_cuda: a library that links to it could
// not be loaded by a CPU build of torch.
inline void* current_cuda_stream(const Tensor& tensor) {
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const auto get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  if (get_stream == nullptr) throw std::runtime_error("cpr_fast: this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get_stream(tensor.get_device_index(), &stream));
  return stream;
}

inline Tensor workspace(const Tensor& like, size_t bytes) {
  return empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}
#endif

}  // namespace cpr::ops
