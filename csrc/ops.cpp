// Schemas and registration of torch.ops.cpr_fast.*, on the LibTorch stable ABI (torch >= 2.10).
//
// Every host function: guard, check, allocate, launch. The argument checks that a user meets first stand in
// cpr_fast/ops/*.py; the ones here keep the kernels safe when torch.ops is called directly.
// Letters: B queries, V views, K memory entries, D width, n stages, P positives, T frames, H x W pixels.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpr_fast.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

std::string text(const char* part) { return part; }
std::string text(int64_t part) { return std::to_string(part); }
std::string text(double part) { return std::to_string(part); }
std::string text(const std::vector<int64_t>& shape) {
  std::string listed = "[";
  for (size_t axis = 0; axis < shape.size(); ++axis) listed += (axis ? ", " : "") + std::to_string(shape[axis]);
  return listed + "]";
}
std::string text(const Tensor& tensor) {  // its shape
  std::vector<int64_t> shape;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) shape.push_back(tensor.size(axis));
  return text(shape);
}

// The message is put together of its parts only when the check fails.
template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) throw std::invalid_argument((text(parts) + ...));
}

void check_shape(const char* name, const Tensor& tensor, const std::vector<int64_t>& shape) {
  bool equal = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t axis = 0; equal && axis < shape.size(); ++axis) equal = tensor.size(axis) == shape[axis];
  check(equal, name, ": expected shape ", shape, ", got ", tensor);
}

Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

// Uninitialised, dense, on the device of `like`. Straight to the allocator: an output by way of the dispatcher costs
// 2 us, and an operator has up to five.
Tensor empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
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

// int64 ids or slots, dense, on the device of `like`; null where absent.
OptionalTensor dense_int64(const char* name, const OptionalTensor& tensor, const std::vector<int64_t>& shape,
                           const Tensor& like) {
  if (!tensor) return std::nullopt;
  check(tensor->scalar_type() == ScalarType::Long, name, ": expected dtype int64");
  check(tensor->device() == like.device(), name, ": expected the same device as the features");
  check_shape(name, *tensor, shape);
  return dense(*tensor);
}

const int64_t* pointer(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr<int64_t>() : nullptr; }

int dtype_code(const char* name, const Tensor& tensor) {
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

int choice(const char* name, const std::string& value, const std::vector<const char*>& names) {
  std::string listed;
  for (size_t code = 0; code < names.size(); ++code) {
    if (value == names[code]) return static_cast<int>(code);
    listed += std::string(code ? ", '" : "'") + names[code] + "'";
  }
  throw std::invalid_argument(std::string(name) + ": expected one of " + listed + ", got '" + value + "'");
}

// torch's own thread pool, so that torch.set_num_threads is honoured and no second OpenMP runtime is loaded.
void parallel_for(int64_t count, int64_t grain, cpr_range_body body, void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, body, context));
}

void raise_failure(const char* failure) {
  if (failure != nullptr) throw std::runtime_error(failure);
}

#ifdef CPR_FAST_WITH_CUDA
// The current stream is asked of libtorch_cuda by name: a link to it would keep this library from loading on CPU torch.
void* current_cuda_stream(const Tensor& tensor) {
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

Tensor workspace(const Tensor& like, size_t bytes) {
  return empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}
#endif

// ---- cascade_select --------------------------------------------------------------------------------------
std::tuple<Tensor, Tensor> cascade_select(const Tensor& queries_in, const Tensor& memory_in, std::vector<int64_t> views,
                                          std::vector<int64_t> keep, const OptionalTensor& query_ids_in,
                                          const OptionalTensor& memory_ids_in, std::string precision, bool cuda) {
  check(queries_in.dim() == 3, "queries: expected shape [V, B, D], got ", queries_in);
  check(memory_in.dim() == 3, "memory: expected shape [V, K, D], got ", memory_in);
  const int64_t V = queries_in.size(0), B = queries_in.size(1), D = queries_in.size(2), K = memory_in.size(1);
  check_shape("memory", memory_in, {V, K, D});
  check(V > 0 && B > 0 && K > 0 && D > 0, "queries, memory: expected V, B, K, D >= 1");
  check(queries_in.scalar_type() == memory_in.scalar_type(), "memory: expected the dtype of queries");
  check(queries_in.device() == memory_in.device(), "memory: expected the device of queries");
  check(!views.empty() && views.size() == keep.size(), "views, keep: expected n >= 1 entries each");
  for (size_t s = 0; s < views.size(); ++s) {
    check(views[s] >= 0 && views[s] < V, "views: expected 0..", V - 1);
    check(keep[s] >= 1 && (s == 0 || keep[s] <= keep[s - 1]), "keep: expected non-increasing values >= 1");
  }
  check(!query_ids_in || memory_ids_in, "query_ids: requires memory_ids");
  const int dtype = dtype_code("queries", queries_in);
  check(dtype != CPR_F64, "queries: expected float32, bfloat16 or float16, got float64");

  const Tensor queries = dense(queries_in), memory = dense(memory_in);
  const OptionalTensor query_ids = dense_int64("query_ids", query_ids_in, {B}, queries);
  const OptionalTensor memory_ids = dense_int64("memory_ids", memory_ids_in, {K}, queries);
  Tensor indices = empty(queries, {B, keep.back()}, ScalarType::Long);
  Tensor scores = empty(queries, {B, keep.back()}, ScalarType::Float);
  const cpr_cascade_args args{.queries = queries.const_data_ptr(),
                              .memory = memory.const_data_ptr(),
                              .query_ids = pointer(query_ids),
                              .memory_ids = pointer(memory_ids),
                              .indices = indices.mutable_data_ptr<int64_t>(),
                              .scores = scores.mutable_data_ptr<float>(),
                              .views = views.data(),
                              .keep = keep.data(),
                              .V = V,
                              .B = B,
                              .K = K,
                              .D = D,
                              .n = static_cast<int64_t>(views.size()),
                              .dtype = dtype,
                              .precision = choice("precision", precision, {"fp32", "bf16"})};
  if (!cuda) raise_failure(cpr_cascade_select_cpu(&args, parallel_for));
#ifdef CPR_FAST_WITH_CUDA
  if (cuda) {
    const torch::stable::accelerator::DeviceGuard guard(queries.get_device_index());
    Tensor scratch = workspace(queries, cpr_cascade_select_cuda_workspace(&args));
    raise_failure(cpr_cascade_select_cuda(&args, scratch.mutable_data_ptr(), current_cuda_stream(queries)));
  }
#endif
  return {indices, scores};
}

// ---- mil_nce ---------------------------------------------------------------------------------------------
// The checked, dense inputs of both mil_nce ops; `args` points into the tensors.
struct MilNce {
  Tensor query, own_key, memory;
  OptionalTensor positives, query_ids, memory_ids, self_mode;
  cpr_mil_nce_args args;
  ScalarType accumulator;
};

void check_values(const MilNce& call) {
  const int64_t *slots = call.args.positives, K = call.args.K;
  for (int64_t i = 0; slots != nullptr && i < call.args.B * call.args.P; ++i) {
    if (slots[i] < -1 || slots[i] >= K) {
      throw std::out_of_range("positives: expected memory slots 0.." + std::to_string(K - 1) + " or -1, got " +
                              std::to_string(slots[i]));
    }
  }
  const int64_t* modes = call.args.self_mode;
  for (int64_t b = 0; modes != nullptr && b < call.args.B; ++b) {
    check(modes[b] >= 0 && modes[b] <= 2, "self_positive: expected 0, 1 or 2, got ", modes[b]);
  }
}

MilNce mil_nce_inputs(const Tensor& query, const Tensor& own_key, const Tensor& memory, const OptionalTensor& positives,
                      const OptionalTensor& query_ids, const OptionalTensor& memory_ids,
                      const OptionalTensor& self_mode, const std::string& same_id, const std::string& self_positive,
                      double temperature, bool cuda) {
  check(query.dim() == 2, "query: expected shape [B, D], got ", query);
  check(memory.dim() == 2, "memory: expected shape [K, D], got ", memory);
  const int64_t B = query.size(0), D = query.size(1), K = memory.size(0);
  check(B > 0 && D > 0 && K > 0, "query, memory: expected B, K, D >= 1");
  check_shape("own_key", own_key, {B, D});
  check_shape("memory", memory, {K, D});
  check(own_key.scalar_type() == query.scalar_type(), "own_key: expected the dtype of query");
  check(memory.scalar_type() == query.scalar_type(), "memory: expected the dtype of query");
  check(own_key.device() == query.device(), "own_key: expected the device of query");
  check(memory.device() == query.device(), "memory: expected the device of query");
  check(!query_ids || memory_ids, "query_ids: requires memory_ids");
  check(temperature > 0, "temperature: expected a positive number, got ", temperature);
  check(!positives || positives->dim() == 2, "positives: expected shape [B, P]");
  const int64_t P = positives ? positives->size(1) : 0;
  const int dtype = dtype_code("query", query);
  check(!cuda || dtype != CPR_F64, "query: expected float32, bfloat16 or float16 on CUDA, got float64");

  MilNce call{.query = dense(query),
              .own_key = dense(own_key),
              .memory = dense(memory),
              .positives = dense_int64("positives", positives, {B, P}, query),
              .query_ids = dense_int64("query_ids", query_ids, {B}, query),
              .memory_ids = dense_int64("memory_ids", memory_ids, {K}, query),
              .self_mode = dense_int64("self_positive", self_mode, {B}, query),
              .args = {},
              .accumulator = dtype == CPR_F64 ? ScalarType::Double : ScalarType::Float};
  call.args = {.query = call.query.const_data_ptr(),
               .own_key = call.own_key.const_data_ptr(),
               .memory = call.memory.const_data_ptr(),
               .positives = pointer(call.positives),
               .query_ids = pointer(call.query_ids),
               .memory_ids = pointer(call.memory_ids),
               .self_mode = pointer(call.self_mode),
               .B = B,
               .K = K,
               .D = D,
               .P = P,
               .dtype = dtype,
               .same_id = choice("same_id", same_id, {"positive", "ignore", "negative"}),
               .self_positive = choice("self_positive", self_positive, {"keep", "denominator", "drop_both"}),
               .temperature = temperature};
  if (!cuda) check_values(call);
  return call;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mil_nce(
    const Tensor& query, const Tensor& own_key, const Tensor& memory, const OptionalTensor& positives,
    const OptionalTensor& query_ids, const OptionalTensor& memory_ids, const OptionalTensor& self_mode,
    const std::string& same_id, const std::string& self_positive, double temperature, bool cuda) {
  const MilNce call = mil_nce_inputs(query, own_key, memory, positives, query_ids, memory_ids, self_mode, same_id,
                                     self_positive, temperature, cuda);
  const int64_t B = call.args.B, D = call.args.D;
  const auto new_row = [&] { return empty(call.query, {B}, call.accumulator); };
  Tensor loss = new_row(), own_coefficient = new_row(), lse_all = new_row(), lse_positive = new_row();
  Tensor grad_query = empty(call.query, {B, D}, call.accumulator);
  const cpr_mil_nce_outputs outputs{.loss = loss.mutable_data_ptr(),
                                    .grad_query = grad_query.mutable_data_ptr(),
                                    .own_coefficient = own_coefficient.mutable_data_ptr(),
                                    .lse_all = lse_all.mutable_data_ptr(),
                                    .lse_positive = lse_positive.mutable_data_ptr()};
  if (!cuda) raise_failure(cpr_mil_nce_forward_cpu(&call.args, &outputs, parallel_for));
#ifdef CPR_FAST_WITH_CUDA
  if (cuda) {
    const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
    Tensor scratch = workspace(query, cpr_mil_nce_forward_cuda_workspace(&call.args));
    raise_failure(
        cpr_mil_nce_forward_cuda(&call.args, &outputs, scratch.mutable_data_ptr(), current_cuda_stream(query)));
  }
#endif
  return {loss, grad_query, own_coefficient, lse_all, lse_positive};
}

Tensor mil_nce_grad_memory(const Tensor& query, const Tensor& own_key, const Tensor& memory,
                           const OptionalTensor& positives, const OptionalTensor& query_ids,
                           const OptionalTensor& memory_ids, const OptionalTensor& self_mode,
                           const std::string& same_id, const std::string& self_positive, double temperature,
                           const Tensor& lse_all_in, const Tensor& lse_positive_in, const Tensor& grad_loss_in,
                           bool cuda) {
  const MilNce call = mil_nce_inputs(query, own_key, memory, positives, query_ids, memory_ids, self_mode, same_id,
                                     self_positive, temperature, cuda);
  const auto row = [&](const char* name, const Tensor& tensor) {
    check_shape(name, tensor, {call.args.B});
    check(tensor.scalar_type() == call.accumulator, name, ": expected the accumulator's dtype");
    return dense(tensor);
  };
  const Tensor lse_all = row("lse_all", lse_all_in), lse_positive = row("lse_positive", lse_positive_in);
  const Tensor grad_loss = row("grad_loss", grad_loss_in);
  Tensor grad_memory = empty(call.memory, {call.args.K, call.args.D}, call.accumulator);
  if (!cuda) {
    raise_failure(cpr_mil_nce_grad_memory_cpu(&call.args, grad_loss.const_data_ptr(), lse_all.const_data_ptr(),
                                              lse_positive.const_data_ptr(), grad_memory.mutable_data_ptr(),
                                              parallel_for));
  }
#ifdef CPR_FAST_WITH_CUDA
  if (cuda) {
    const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
    raise_failure(cpr_mil_nce_grad_memory_cuda(&call.args, grad_loss.const_data_ptr(), lse_all.const_data_ptr(),
                                               lse_positive.const_data_ptr(), grad_memory.mutable_data_ptr(),
                                               current_cuda_stream(query)));
  }
#endif
  return grad_memory;
}

// ---- tvl1_flow -------------------------------------------------------------------------------------------
std::tuple<Tensor, Tensor> tvl1_flow(const Tensor& frames_in, double tau, double lambda, double theta, int64_t scales,
                                     double scale_step, int64_t warps, double epsilon, int64_t inner_iterations,
                                     int64_t outer_iterations, int64_t median, bool cuda) {
  check(frames_in.dim() == 4, "frames: expected shape [N, T, H, W], got ", frames_in);
  const bool uint8 = frames_in.scalar_type() == ScalarType::Byte;
  check(uint8 || frames_in.scalar_type() == ScalarType::Float, "frames: expected dtype uint8 or float32");
  const int64_t N = frames_in.size(0), T = frames_in.size(1), H = frames_in.size(2), W = frames_in.size(3);
  check(T >= 2 && H >= 1 && W >= 1, "frames: expected T >= 2 and H, W >= 1, got ", frames_in);

  const Tensor frames = dense(frames_in);
  Tensor flow = empty(frames, {N, T - 1, 2, H, W}, ScalarType::Float);
  Tensor pixel_iterations = empty(frames, {N, T - 1}, ScalarType::Long);
  const cpr_tvl1_args args{.frames = frames.const_data_ptr(),
                           .flow = flow.mutable_data_ptr<float>(),
                           .pixel_iterations = pixel_iterations.mutable_data_ptr<int64_t>(),
                           .N = N,
                           .T = T,
                           .H = H,
                           .W = W,
                           .frames_are_uint8 = uint8,
                           .tau = tau,
                           .lambda = lambda,
                           .theta = theta,
                           .scale_step = scale_step,
                           .epsilon = epsilon,
                           .scales = static_cast<int>(scales),
                           .warps = static_cast<int>(warps),
                           .inner_iterations = static_cast<int>(inner_iterations),
                           .outer_iterations = static_cast<int>(outer_iterations),
                           .median = static_cast<int>(median)};
  if (!cuda) raise_failure(cpr_tvl1_flow_cpu(&args, parallel_for));
#ifdef CPR_FAST_WITH_CUDA
  if (cuda) {
    const torch::stable::accelerator::DeviceGuard guard(frames.get_device_index());
    Tensor scratch = workspace(frames, cpr_tvl1_flow_cuda_workspace(&args));
    raise_failure(cpr_tvl1_flow_cuda(&args, scratch.mutable_data_ptr(), current_cuda_stream(frames)));
  }
#endif
  return {flow, pixel_iterations};
}

// ---- one boxed kernel per device ---------------------------------------------------------------------------
template <bool cuda>
std::tuple<Tensor, Tensor> cascade_select_on(const Tensor& queries, const Tensor& memory, std::vector<int64_t> views,
                                             std::vector<int64_t> keep, const OptionalTensor& query_ids,
                                             const OptionalTensor& memory_ids, std::string precision) {
  return cascade_select(queries, memory, views, keep, query_ids, memory_ids, precision, cuda);
}

template <bool cuda>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mil_nce_on(const Tensor& query, const Tensor& own_key,
                                                              const Tensor& memory, const OptionalTensor& positives,
                                                              const OptionalTensor& query_ids,
                                                              const OptionalTensor& memory_ids,
                                                              const OptionalTensor& self_mode, std::string same_id,
                                                              std::string self_positive, double temperature) {
  return mil_nce(query, own_key, memory, positives, query_ids, memory_ids, self_mode, same_id, self_positive,
                 temperature, cuda);
}

template <bool cuda>
Tensor mil_nce_grad_memory_on(const Tensor& query, const Tensor& own_key, const Tensor& memory,
                              const OptionalTensor& positives, const OptionalTensor& query_ids,
                              const OptionalTensor& memory_ids, const OptionalTensor& self_mode, std::string same_id,
                              std::string self_positive, double temperature, const Tensor& lse_all,
                              const Tensor& lse_positive, const Tensor& grad_loss) {
  return mil_nce_grad_memory(query, own_key, memory, positives, query_ids, memory_ids, self_mode, same_id,
                             self_positive, temperature, lse_all, lse_positive, grad_loss, cuda);
}

template <bool cuda>
std::tuple<Tensor, Tensor> tvl1_flow_on(const Tensor& frames, double tau, double lambda, double theta, int64_t scales,
                                        double scale_step, int64_t warps, double epsilon, int64_t inner_iterations,
                                        int64_t outer_iterations, int64_t median) {
  return tvl1_flow(frames, tau, lambda, theta, scales, scale_step, warps, epsilon, inner_iterations, outer_iterations,
                   median, cuda);
}

}  // namespace

STABLE_TORCH_LIBRARY(cpr_fast, m) {
  m.def(
      "cascade_select(Tensor queries, Tensor memory, int[] views, int[] keep, Tensor? query_ids, Tensor? memory_ids, "
      "str precision) -> (Tensor indices, Tensor scores)");
  m.def(
      "mil_nce(Tensor query, Tensor own_key, Tensor memory, Tensor? positives, Tensor? query_ids, Tensor? memory_ids, "
      "Tensor? self_mode, str same_id, str self_positive, float temperature) -> (Tensor loss, Tensor grad_query, "
      "Tensor own_coefficient, Tensor lse_all, Tensor lse_positive)");
  m.def(
      "mil_nce_grad_memory(Tensor query, Tensor own_key, Tensor memory, Tensor? positives, Tensor? query_ids, "
      "Tensor? memory_ids, Tensor? self_mode, str same_id, str self_positive, float temperature, Tensor lse_all, "
      "Tensor lse_positive, Tensor grad_loss) -> Tensor");
  m.def(
      "tvl1_flow(Tensor frames, float tau, float lambda_, float theta, int scales, float scale_step, int warps, "
      "float epsilon, int inner_iterations, int outer_iterations, int median) -> (Tensor flow, "
      "Tensor pixel_iterations)");
}

STABLE_TORCH_LIBRARY_IMPL(cpr_fast, CPU, m) {
  m.impl("cascade_select", TORCH_BOX(&cascade_select_on<false>));
  m.impl("mil_nce", TORCH_BOX(&mil_nce_on<false>));
  m.impl("mil_nce_grad_memory", TORCH_BOX(&mil_nce_grad_memory_on<false>));
  m.impl("tvl1_flow", TORCH_BOX(&tvl1_flow_on<false>));
}

#ifdef CPR_FAST_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(cpr_fast, CUDA, m) {
  m.impl("cascade_select", TORCH_BOX(&cascade_select_on<true>));
  m.impl("mil_nce", TORCH_BOX(&mil_nce_on<true>));
  m.impl("mil_nce_grad_memory", TORCH_BOX(&mil_nce_grad_memory_on<true>));
  m.impl("tvl1_flow", TORCH_BOX(&tvl1_flow_on<true>));
}
#endif
