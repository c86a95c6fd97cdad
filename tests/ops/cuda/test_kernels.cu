// Compares the CUDA kernels with the CPU kernels through the C interface. Without torch and Python there is little else
// for compute-sanitizer to check, and every buffer is an allocation of exactly its size.
// Exit status: 0 if all cases agree, 1 if one does not, 77 without a device.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "cpr_fast.h"

namespace {

void require(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

void require(const char* error) {
  if (error == nullptr) return;
  std::fprintf(stderr, "kernel: %s\n", error);
  std::exit(1);
}

void serially(int64_t count, int64_t, cpr_range_body body, void* context) { body(0, count, context); }

// Device memory of exactly the size of a host vector; none for an empty vector.
class DeviceBytes {
 public:
  explicit DeviceBytes(size_t bytes) {
    if (bytes > 0) require(cudaMalloc(&data_, bytes), "cudaMalloc");
  }
  template <typename T>
  explicit DeviceBytes(const std::vector<T>& host) : DeviceBytes(host.size() * sizeof(T)) {
    if (!host.empty()) require(cudaMemcpy(data_, host.data(), host.size() * sizeof(T), cudaMemcpyDefault), "copy in");
  }
  DeviceBytes(const DeviceBytes&) = delete;
  DeviceBytes& operator=(const DeviceBytes&) = delete;
  ~DeviceBytes() { cudaFree(data_); }

  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  template <typename T>
  std::vector<T> read(size_t count) const {
    std::vector<T> host(count);
    require(cudaMemcpy(host.data(), data_, count * sizeof(T), cudaMemcpyDefault), "copy out");
    return host;
  }

 private:
  void* data_ = nullptr;
};

// Captures what `issue` launches on a stream of its own and replays it twice: the kernels must be capturable, and a
// second run on the same workspace must give the same result.
template <typename Issue>
void run_captured(Issue issue) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  require(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "begin capture");
  issue(stream);
  require(cudaStreamEndCapture(stream, &graph), "end capture");
  require(cudaGraphInstantiate(&executable, graph, 0), "instantiate");
  for (int replay = 0; replay < 2; ++replay) require(cudaGraphLaunch(executable, stream), "replay");
  require(cudaStreamSynchronize(stream), "synchronize");
  require(cudaGraphExecDestroy(executable), "destroy");
  require(cudaGraphDestroy(graph), "destroy");
  require(cudaStreamDestroy(stream), "destroy");
}

std::mt19937 generator(0);

std::vector<int64_t> integers(size_t count, int64_t low, int64_t high) {
  std::uniform_int_distribution<int64_t> draw(low, high);
  std::vector<int64_t> values(count);
  for (auto& value : values) value = draw(generator);
  return values;
}

// Returns `count` elements of a cpr_dtype as bytes. lattice: multiples of 1/4 in -1..1, so that scores tie.
std::vector<unsigned char> features(size_t count, int dtype, bool lattice, float scale) {
  std::normal_distribution<float> normal;
  std::uniform_int_distribution<int> quarters(-4, 4);
  std::vector<unsigned char> bytes(count * (dtype == CPR_F32 ? 4 : 2));
  for (size_t i = 0; i < count; ++i) {
    const float value = lattice ? static_cast<float>(quarters(generator)) / 4 : normal(generator) * scale;
    if (dtype == CPR_F32) reinterpret_cast<float*>(bytes.data())[i] = value;
    if (dtype == CPR_BF16) reinterpret_cast<__nv_bfloat16*>(bytes.data())[i] = __float2bfloat16(value);
    if (dtype == CPR_F16) reinterpret_cast<__half*>(bytes.data())[i] = __float2half(value);
  }
  return bytes;
}

const char* dtype_name(int dtype) { return dtype == CPR_F32 ? "float32" : dtype == CPR_BF16 ? "bfloat16" : "float16"; }

struct CascadeCase {
  int64_t B, K, D;
  std::vector<int64_t> views, keep;
  int dtype;
  bool lattice, ids;
};

bool cascade_agrees(const CascadeCase& c) {
  constexpr int64_t V = 2;
  const size_t outputs = c.B * c.keep.back();
  const auto queries = features(V * c.B * c.D, c.dtype, c.lattice, 1),
             memory = features(V * c.K * c.D, c.dtype, c.lattice, 1);
  const auto query_ids = integers(c.ids ? c.B : 0, -1, 4), memory_ids = integers(c.ids ? c.K : 0, -1, 9);
  std::vector<int64_t> indices(outputs);
  std::vector<float> scores(outputs);
  cpr_cascade_args args = {};
  args.V = V, args.B = c.B, args.K = c.K, args.D = c.D, args.n = static_cast<int64_t>(c.views.size());
  args.views = c.views.data(), args.keep = c.keep.data();
  args.dtype = c.dtype, args.precision = CPR_EXACT;
  args.queries = queries.data(), args.memory = memory.data();
  if (c.ids) args.query_ids = query_ids.data(), args.memory_ids = memory_ids.data();
  args.indices = indices.data(), args.scores = scores.data();
  require(cpr_cascade_select_cpu(&args, serially));

  const DeviceBytes device_queries(queries), device_memory(memory), device_query_ids(query_ids),
      device_memory_ids(memory_ids);
  const DeviceBytes device_indices(outputs * sizeof(int64_t)), device_scores(outputs * sizeof(float));
  args.queries = device_queries.as<void>(), args.memory = device_memory.as<void>();
  args.query_ids = device_query_ids.as<int64_t>(), args.memory_ids = device_memory_ids.as<int64_t>();
  args.indices = device_indices.as<int64_t>(), args.scores = device_scores.as<float>();
  const DeviceBytes workspace(cpr_cascade_select_cuda_workspace(&args));
  run_captured([&](cudaStream_t stream) { require(cpr_cascade_select_cuda(&args, workspace.as<void>(), stream)); });

  const bool same = device_indices.read<int64_t>(outputs) == indices && device_scores.read<float>(outputs) == scores;
  std::printf("%s cascade_select B=%ld K=%ld D=%ld n=%zu keep=%ld %s%s%s\n", same ? "ok  " : "FAIL", c.B, c.K, c.D,
              c.views.size(), c.keep.back(), dtype_name(c.dtype), c.lattice ? " ties" : "", c.ids ? " ids" : "");
  return same;
}

struct LossCase {
  int64_t B, K, D, P;
  int dtype, same_id, self_positive;
  bool ids, mode_per_row;
};

// Returns the greatest difference, relative to the greatest magnitude or to 1 if that is less.
float distance(const std::vector<float>& found, const std::vector<float>& expected) {
  float scale = 1, worst = 0;
  for (const float value : expected) scale = std::fmax(scale, std::fabs(value));
  for (size_t i = 0; i < found.size(); ++i) {
    const float difference = std::fabs(found[i] - expected[i]);
    worst = difference <= worst ? worst : difference;  // a NaN is kept
  }
  return worst / scale;
}

bool loss_agrees(const LossCase& c) {
  const float scale = 1 / std::sqrt(static_cast<float>(c.D));
  const auto query = features(c.B * c.D, c.dtype, false, scale), own_key = features(c.B * c.D, c.dtype, false, scale);
  const auto memory = features(c.K * c.D, c.dtype, false, scale);
  const auto positives = integers(c.B * c.P, -1, c.K - 1), self_mode = integers(c.mode_per_row ? c.B : 0, 0, 2);
  const auto query_ids = integers(c.ids ? c.B : 0, -1, 4), memory_ids = integers(c.ids ? c.K : 0, -1, 9);
  const std::vector<float> grad_loss(c.B, 0.5f);
  const size_t sizes[] = {size_t(c.B), size_t(c.B * c.D), size_t(c.B), size_t(c.B), size_t(c.B), size_t(c.K * c.D)};
  std::vector<std::vector<float>> expected;
  for (const size_t size : sizes) expected.emplace_back(size);
  cpr_mil_nce_args args = {};
  args.B = c.B, args.K = c.K, args.D = c.D, args.P = c.P;
  args.dtype = c.dtype, args.same_id = c.same_id, args.self_positive = c.self_positive, args.temperature = 0.07;
  args.query = query.data(), args.own_key = own_key.data(), args.memory = memory.data();
  if (c.P > 0) args.positives = positives.data();
  if (c.ids) args.query_ids = query_ids.data(), args.memory_ids = memory_ids.data();
  if (c.mode_per_row) args.self_mode = self_mode.data();
  const cpr_mil_nce_outputs host = {expected[0].data(), expected[1].data(), expected[2].data(), expected[3].data(),
                                    expected[4].data()};
  require(cpr_mil_nce_forward_cpu(&args, &host, serially));
  require(cpr_mil_nce_grad_memory_cpu(&args, grad_loss.data(), host.lse_all, host.lse_positive, expected[5].data(),
                                      serially));

  const DeviceBytes d_query(query), d_own_key(own_key), d_memory(memory), d_positives(positives),
      d_query_ids(query_ids);
  const DeviceBytes d_memory_ids(memory_ids), d_self_mode(self_mode), d_grad_loss(grad_loss);
  const DeviceBytes loss(sizes[0] * 4), grad_query(sizes[1] * 4), own_coefficient(sizes[2] * 4), lse_all(sizes[3] * 4);
  const DeviceBytes lse_positive(sizes[4] * 4), grad_memory(sizes[5] * 4);
  args.query = d_query.as<void>(), args.own_key = d_own_key.as<void>(), args.memory = d_memory.as<void>();
  args.positives = d_positives.as<int64_t>(), args.query_ids = d_query_ids.as<int64_t>();
  args.memory_ids = d_memory_ids.as<int64_t>(), args.self_mode = d_self_mode.as<int64_t>();
  const cpr_mil_nce_outputs device = {loss.as<void>(), grad_query.as<void>(), own_coefficient.as<void>(),
                                      lse_all.as<void>(), lse_positive.as<void>()};
  const DeviceBytes workspace(cpr_mil_nce_forward_cuda_workspace(&args));
  run_captured([&](cudaStream_t stream) {
    require(cpr_mil_nce_forward_cuda(&args, &device, workspace.as<void>(), stream));
    require(cpr_mil_nce_grad_memory_cuda(&args, d_grad_loss.as<void>(), device.lse_all, device.lse_positive,
                                         grad_memory.as<void>(), stream));
  });

  const DeviceBytes* found[] = {&loss, &grad_query, &own_coefficient, &lse_all, &lse_positive, &grad_memory};
  float worst = 0;
  for (int i = 0; i < 6; ++i) {
    const float error = distance(found[i]->read<float>(sizes[i]), expected[i]);
    worst = error <= worst ? worst : error;
  }
  const bool close = worst < 5e-5f;
  std::printf("%s mil_nce B=%ld K=%ld D=%ld P=%ld %s same_id=%d self=%d%s%s error %.1e\n", close ? "ok  " : "FAIL", c.B,
              c.K, c.D, c.P, dtype_name(c.dtype), c.same_id, c.self_positive, c.ids ? " ids" : "",
              c.mode_per_row ? " per-row" : "", worst);
  return close;
}

struct FlowCase {
  int64_t N, T, H, W;
  bool uint8;
  int warps;
};

// Returns frames of smoothed noise that moves by one pixel per frame; values 0..255.
std::vector<float> moving_noise(const FlowCase& c) {
  constexpr int64_t kBox = 7;
  const int64_t height = c.H + c.T + kBox, width = c.W + c.T + kBox;
  std::uniform_real_distribution<float> draw(0, 255);
  std::vector<float> frames;
  for (int64_t clip = 0; clip < c.N; ++clip) {
    std::vector<float> noise(height * width);
    for (float& value : noise) value = draw(generator);
    for (int64_t i = 0; i < c.T * c.H * c.W; ++i) {
      const int64_t t = i / (c.H * c.W), y = i / c.W % c.H + t, x = i % c.W + t;
      float sum = 0;
      for (int64_t at = 0; at < kBox * kBox; ++at) sum += noise[(y + at / kBox) * width + x + at % kBox];
      frames.push_back(std::floor(sum / (kBox * kBox)));
    }
  }
  return frames;
}

bool flow_agrees(const FlowCase& c) {
  std::vector<float> frames = moving_noise(c);
  const std::vector<unsigned char> bytes(frames.begin(), frames.end());
  for (float& value : frames) value /= 255;
  const size_t pairs = c.N * (c.T - 1), values = pairs * 2 * c.H * c.W;
  std::vector<float> flow(values);
  std::vector<int64_t> counted(pairs);
  cpr_tvl1_args args = {};
  args.N = c.N, args.T = c.T, args.H = c.H, args.W = c.W, args.frames_are_uint8 = c.uint8;
  args.tau = 0.25, args.lambda = 0.15, args.theta = 0.3, args.scale_step = 0.8, args.epsilon = 0.01;
  args.scales = 5, args.warps = c.warps, args.inner_iterations = 30, args.outer_iterations = 10, args.median = 5;
  args.frames = c.uint8 ? static_cast<const void*>(bytes.data()) : frames.data();
  args.flow = flow.data(), args.pixel_iterations = counted.data();
  require(cpr_tvl1_flow_cpu(&args, 1));

  const DeviceBytes d_bytes(bytes), d_frames(frames), d_flow(values * sizeof(float)), d_counted(pairs * 8);
  args.frames = c.uint8 ? d_bytes.as<void>() : d_frames.as<void>();
  args.flow = d_flow.as<float>(), args.pixel_iterations = d_counted.as<int64_t>();
  const DeviceBytes workspace(cpr_tvl1_flow_cuda_workspace(&args));
  run_captured([&](cudaStream_t stream) { require(cpr_tvl1_flow_cuda(&args, workspace.as<void>(), stream)); });

  // The results have the same bits, except where an error sum is within rounding of the threshold of the stop test.
  const std::vector<float> found = d_flow.read<float>(values);
  size_t same = 0;
  for (size_t i = 0; i < values; ++i) same += found[i] == flow[i];
  int64_t expected_count = 0, found_count = 0;
  for (const int64_t count : counted) expected_count += count;
  for (const int64_t count : d_counted.read<int64_t>(pairs)) found_count += count;
  const float error = distance(found, flow);
  const bool close = error < 0.05f && std::llabs(found_count - expected_count) * 50 <= expected_count;
  std::printf("%s tvl1_flow N=%ld T=%ld %ldx%ld %s equal %zu of %zu, error %.1e, pixel-iterations %ld (%ld)\n",
              close ? "ok  " : "FAIL", c.N, c.T, c.W, c.H, c.uint8 ? "uint8" : "float32", same, values, error,
              found_count, expected_count);
  return close;
}

}  // namespace

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no CUDA device\n");
    return 77;
  }
  const std::vector<CascadeCase> cascades = {
      {1, 1, 1, {0}, {1}, CPR_F32, false, false},
      {5, 63, 33, {1, 0}, {70, 9}, CPR_F32, false, true},
      {32, 2048, 128, {1, 0, 1, 0, 1, 0, 1}, {1024, 512, 256, 128, 64, 32, 5}, CPR_F32, false, true},
      {33, 2049, 128, {1, 0, 1}, {1638, 1310, 5}, CPR_F32, true, true},
      {3, 3000, 7, {0, 1}, {2500, 2400}, CPR_F32, true, false},
      {16, 1000, 130, {0, 1, 1}, {500, 250, 20}, CPR_BF16, false, true},
      {16, 1000, 64, {0, 1, 1}, {500, 250, 20}, CPR_F16, false, true},
      {130, 40000, 4, {1, 0}, {20000, 600}, CPR_F32, true, true},
      {3, 16384, 128, {1, 0, 1}, {8192, 4096, 5}, CPR_F32, false, true},
      {40, 300000, 12, {1, 0, 1}, {150000, 70000, 600}, CPR_F32, false, true},  // rows too long for the cache: refined
      {33, 300001, 8, {0, 1}, {200000, 7}, CPR_F32, true, true},
      {5, 300000, 36, {1, 0}, {100000, 50}, CPR_BF16, false, true},
      {5, 300000, 36, {1, 0}, {100000, 50}, CPR_F16, false, false},
  };
  const std::vector<LossCase> losses = {
      {1, 1, 1, 1, CPR_F32, CPR_SAME_POSITIVE, CPR_SELF_KEEP, false, false},
      {5, 65, 33, 3, CPR_F32, CPR_SAME_POSITIVE, CPR_SELF_DENOMINATOR, true, false},
      {32, 2048, 128, 5, CPR_F32, CPR_SAME_NEGATIVE, CPR_SELF_KEEP, true, false},
      {33, 2000, 128, 5, CPR_BF16, CPR_SAME_IGNORE, CPR_SELF_DROP_BOTH, true, false},
      {7, 300, 512, 0, CPR_F16, CPR_SAME_POSITIVE, CPR_SELF_KEEP, false, false},
      {70, 9000, 128, 5, CPR_F16, CPR_SAME_POSITIVE, CPR_SELF_KEEP, true, false},
      {257, 9000, 128, 5, CPR_BF16, CPR_SAME_NEGATIVE, CPR_SELF_KEEP, true, false},
      {33, 1000, 512, 5, CPR_BF16, CPR_SAME_POSITIVE, CPR_SELF_DENOMINATOR, true, true},
      {300, 9000, 20, 4, CPR_F32, CPR_SAME_POSITIVE, CPR_SELF_KEEP, true, true},
  };
  const std::vector<FlowCase> flows = {
      {1, 2, 1, 1, true, 5},     {1, 2, 37, 53, true, 5},
      {2, 3, 64, 129, false, 2}, {1, 2, 256, 340, true, 1},  // a team of many blocks
      {3, 101, 24, 33, true, 1},                             // more pairs than teams
  };
  bool all = true;
  for (const CascadeCase& c : cascades) all &= cascade_agrees(c);
  for (const LossCase& c : losses) all &= loss_agrees(c);
  for (const FlowCase& c : flows) all &= flow_agrees(c);
  return all ? 0 : 1;
}
