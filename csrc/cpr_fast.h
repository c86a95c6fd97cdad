// The C interface of all cpr_fast kernels: raw pointers and sizes, independent of torch.
//
// Letters in shapes: B queries, V views, K memory entries, D feature width, n stages, P positives, T frames,
// H x W pixels. Tensors are dense and row-major, with the shape given in the comment. `out` marks outputs.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define CPR_API __attribute__((visibility("default")))

enum cpr_dtype { CPR_F32 = 0, CPR_BF16 = 1, CPR_F16 = 2, CPR_F64 = 3 };
enum cpr_precision { CPR_EXACT = 0, CPR_APPROX_BF16 = 1 };
enum cpr_same_id { CPR_SAME_POSITIVE = 0, CPR_SAME_IGNORE = 1, CPR_SAME_NEGATIVE = 2 };
enum cpr_self_positive { CPR_SELF_KEEP = 0, CPR_SELF_DENOMINATOR = 1, CPR_SELF_DROP_BOTH = 2 };

// Runs body(begin, end, context) over disjoint ranges that cover [0, count), on threads of the caller's choice. The
// operators of torch pass csrc/ops/thread_pool.h's, which uses as many as torch.set_num_threads allows. Results do not
// depend on how the work is divided into ranges.
typedef void (*cpr_range_body)(int64_t begin, int64_t end, void* context);
typedef void (*cpr_parallel_for)(int64_t count, int64_t grain, cpr_range_body body, void* context);

// ---- cascade_select: multi-stage, multi-view similarity selection ---------------------------------
typedef struct {
  const void* queries;        // [V, B, D] dtype
  const void* memory;         // [V, K, D] dtype
  const int64_t* query_ids;   // [B] or null
  const int64_t* memory_ids;  // [K] or null; -1 = empty slot
  int64_t* indices;           // out [B, keep[n-1]], -1 where fewer remain
  float* scores;              // out [B, keep[n-1]], -inf where fewer remain
  const int64_t* views;       // [n] host memory
  const int64_t* keep;        // [n] host memory, non-increasing
  int64_t V, B, K, D, n;
  int dtype;      // CPR_F32 | CPR_BF16 | CPR_F16
  int precision;  // cpr_precision
} cpr_cascade_args;

// The functions return null on success, otherwise a static error message (for a CUDA error, the text of CUDA).
// `*_workspace` returns the bytes of device memory to pass as `workspace`, whose address must be a multiple of
// CPR_WORKSPACE_ALIGNMENT.
#define CPR_WORKSPACE_ALIGNMENT 16
CPR_API const char* cpr_cascade_select_cpu(const cpr_cascade_args* args, cpr_parallel_for parallel);
CPR_API size_t cpr_cascade_select_cuda_workspace(const cpr_cascade_args* args);
CPR_API const char* cpr_cascade_select_cuda(const cpr_cascade_args* args, void* workspace, void* stream);

// ---- mil_nce: fused MIL-NCE loss over a memory, and its gradients --------------------------------
typedef struct {
  const void* query;          // [B, D] dtype
  const void* own_key;        // [B, D] dtype
  const void* memory;         // [K, D] dtype
  const int64_t* positives;   // [B, P] memory slots, -1 = none; or null
  const int64_t* query_ids;   // [B] or null
  const int64_t* memory_ids;  // [K] or null
  const int64_t* self_mode;   // [B] cpr_self_positive of each row, or null: self_positive for all
  int64_t B, K, D, P;
  int dtype;          // CPR_F32 | CPR_BF16 | CPR_F16, on the CPU also CPR_F64
  int same_id;        // cpr_same_id
  int self_positive;  // cpr_self_positive
  double temperature;
} cpr_mil_nce_args;

// `acc` is float, or double for CPR_F64.
typedef struct {
  void* loss;             // out [B] acc
  void* grad_query;       // out [B, D] acc: d loss[b] / d query[b]
  void* own_coefficient;  // out [B] acc: d loss[b] / d own_key[b] = own_coefficient[b] * query[b]
  void* lse_all;          // out [B] acc: logsumexp of the scores in the denominator
  void* lse_positive;     // out [B] acc: logsumexp of the scores in the numerator
} cpr_mil_nce_outputs;

// Reads the memory once. The extra memory that it needs does not depend on K.
CPR_API const char* cpr_mil_nce_forward_cpu(const cpr_mil_nce_args* args, const cpr_mil_nce_outputs* outputs,
                                            cpr_parallel_for parallel);
CPR_API size_t cpr_mil_nce_forward_cuda_workspace(const cpr_mil_nce_args* args);
CPR_API const char* cpr_mil_nce_forward_cuda(const cpr_mil_nce_args* args, const cpr_mil_nce_outputs* outputs,
                                             void* workspace, void* stream);

// Computes the gradient to the memory, for methods whose keys are the batch itself: out grad_memory [K, D] acc, from
// grad_loss [B] acc and the outputs lse_all and lse_positive. This is the only gradient that reads the memory again.
CPR_API const char* cpr_mil_nce_grad_memory_cpu(const cpr_mil_nce_args* args, const void* grad_loss,
                                                const void* lse_all, const void* lse_positive, void* grad_memory,
                                                cpr_parallel_for parallel);
CPR_API const char* cpr_mil_nce_grad_memory_cuda(const cpr_mil_nce_args* args, const void* grad_loss,
                                                 const void* lse_all, const void* lse_positive, void* grad_memory,
                                                 void* stream);

// ---- cascade_mil_nce: both of the above, where the cascade compares the queries of the loss ----------
// The loss is that of the queries in one `view` against the memory in this view: loss->query and loss->memory are these
// parts of cascade->queries and cascade->memory, both have the same ids, and loss->positives is cascade->indices
// (P = keep[n-1]). Gives the bits of cpr_cascade_select_cpu, then cpr_mil_nce_forward_cpu. If a stage compares in
// `view`, the scores are computed once. The dtype is not CPR_F64.
CPR_API const char* cpr_cascade_mil_nce_cpu(const cpr_cascade_args* cascade, const cpr_mil_nce_args* loss, int64_t view,
                                            const cpr_mil_nce_outputs* outputs, cpr_parallel_for parallel);

// ---- both in parts: for a memory that is divided among processes ------------------------------------
// The memory in `args` is the part of one process. cpr_mil_nce_partial_cpu divides it into S = ceil(K / entries) parts,
// `entries` a multiple of CPR_PART_MULTIPLE, and writes for each query and part the greatest score, the sum of
// exp(score - greatest) and the sum of exp(score - greatest) * key, over all keys and over the positives: out partials
// [S, B, 2, 2 + D] acc. own_key and self_mode are not read. cpr_mil_nce_merge_cpu merges parts in their order and adds
// own_key; memory, ids and positives are not read. If `entries` is cpr_mil_nce_part_entries(K) of the whole memory, the
// outputs have the bits of cpr_mil_nce_forward_cpu.
#define CPR_PART_MULTIPLE 64
CPR_API int64_t cpr_mil_nce_part_entries(int64_t K);
CPR_API const char* cpr_mil_nce_partial_cpu(const cpr_mil_nce_args* args, int64_t entries, void* partials,
                                            cpr_parallel_for parallel);
CPR_API const char* cpr_mil_nce_merge_cpu(const cpr_mil_nce_args* args, const void* partials, int64_t S,
                                          const cpr_mil_nce_outputs* outputs, cpr_parallel_for parallel);

// Writes the keys of all entries in n different views, out keys [n, B, K]; `keep` and the outputs of `args` are not
// used. A key orders like the score: the bits of a positive score, those of a negative one with all but the sign
// inverted. INT32_MIN marks an entry that no stage may select.
CPR_API const char* cpr_cascade_keys_cpu(const cpr_cascade_args* args, int32_t* keys, cpr_parallel_for parallel);
// Counts, for each query, the entries by digit `digit` (0..3, the highest first) of keys + 2^31 in base 256, among
// those whose higher digits are `prefix`: keys [B, K], prefix [B], out counts [B, 256]. INT32_MIN is not counted.
CPR_API const char* cpr_cascade_counts_cpu(const int32_t* keys, const int32_t* prefix, int64_t B, int64_t K, int digit,
                                           int32_t* counts, cpr_parallel_for parallel);
// Keeps the entries whose key in view `row` is greater than threshold [B], and the first ties [B] of those equal to it:
// the others become INT32_MIN in all views of keys [U, B, K].
CPR_API const char* cpr_cascade_keep_cpu(int32_t* keys, const int32_t* threshold, const int32_t* ties, int64_t U,
                                         int64_t B, int64_t K, int64_t row, cpr_parallel_for parallel);

// ---- knn_graph: the k nearest entries of every entry --------------------------------------------------
// Compares the rows [begin, end) of the features with all rows after them, each pair once, and updates the lists of
// both. Calls for ranges that cover [0, N), one after another in any order, complete the lists. A list holds k words in
// descending order: the key of the score, see above, in the upper 32 bits, and 2^32 - 1 - slot in the lower ones;
// INT64_MIN where it has no entry. A score has the bits of cascade_select; NaN is no score. N < 2^31.
typedef struct {
  const void* features;  // [N, D] dtype
  int64_t* best;         // in and out [N, k]
  int64_t N, D, k, begin, end;
  int dtype;  // CPR_F32 | CPR_BF16 | CPR_F16
} cpr_knn_graph_args;

CPR_API const char* cpr_knn_graph_cpu(const cpr_knn_graph_args* args, cpr_parallel_for parallel);

// ---- tvl1_flow: TV-L1 optical flow ----------------------------------------------------------------
typedef struct {
  const void* frames;         // [N, T, H, W] uint8 0..255, or float 0..1
  float* flow;                // out [N, T-1, 2, H, W]: (u, v) in pixels; NaN where a frame has a NaN or infinite pixel
  int64_t* pixel_iterations;  // out [N, T-1] or null: inner iterations times pixels, summed over scales and warps
  int64_t N, T, H, W;
  int frames_are_uint8;
  double tau, lambda, theta, scale_step, epsilon;
  int scales, warps, inner_iterations, outer_iterations, median;
} cpr_tvl1_args;

// The frame pairs are solved by `threads` threads, the caller among them. The result does not depend on their number.
CPR_API const char* cpr_tvl1_flow_cpu(const cpr_tvl1_args* args, int threads);
CPR_API size_t cpr_tvl1_flow_cuda_workspace(const cpr_tvl1_args* args);
CPR_API const char* cpr_tvl1_flow_cuda(const cpr_tvl1_args* args, void* workspace, void* stream);

// ---- batch_norm: BatchNorm in training, of rows whose channels are last, and its gradient ----------
// Letters: R rows (clips times frames times pixels), C channels; R, C >= 1. The statistics of a channel are summed in
// float over short runs of rows and in double beyond them.
typedef struct {
  const float* x;       // [R, C]
  const float* weight;  // [C] or null: 1
  const float* bias;    // [C] or null: 0
  int64_t R, C;
  double eps;
  int relu;  // non-zero: ReLU follows the normalisation
} cpr_batch_norm_args;

// The running statistics, updated in place: (1 - momentum) * old + momentum * (mean, or unbiased variance).
typedef struct {
  float* mean;      // [C] or null
  float* variance;  // [C] or null
  double momentum;
} cpr_batch_norm_running;

// out y [R, C], mean [C] and variance [C] of each channel; this variance is biased.
CPR_API const char* cpr_batch_norm_forward_cpu(const cpr_batch_norm_args* args, const cpr_batch_norm_running* running,
                                               float* y, double* mean, double* variance, cpr_parallel_for parallel);
// From the outputs mean and variance and the gradient of y, grad [R, C]: out grad_x [R, C], grad_weight [C],
// grad_bias [C].
CPR_API const char* cpr_batch_norm_backward_cpu(const cpr_batch_norm_args* args, const double* mean,
                                                const double* variance, const float* grad, float* grad_x,
                                                float* grad_weight, float* grad_bias, cpr_parallel_for parallel);

// ---- properties of this build ------------------------------------------------------------------------
// Returns the CPU variants that this machine can run, fastest first, separated by commas ("avx512,avx2,portable").
CPR_API const char* cpr_cpu_variants(void);
// Returns the variant in use: the forced one, otherwise the one that the environment variable CPR_FAST_CPU_VARIANT
// names (it is read once), otherwise the fastest.
CPR_API const char* cpr_cpu_variant(void);
// Returns null, or an error message if the value of CPR_FAST_CPU_VARIANT is invalid. Every CPU kernel then returns that
// message instead of running.
CPR_API const char* cpr_cpu_variant_error(void);
// Forces a variant by name for this process (tests, bench); null removes the choice. Returns non-zero if the variant
// cannot run on this machine.
CPR_API int cpr_force_cpu_variant(const char* name);
// Frees the scratch memory of the calling thread. The CPU kernels keep large blocks for the next call of the same
// thread, at most 256 MiB.
CPR_API void cpr_release_scratch(void);
// Returns the CUDA architectures of this build ("80-real,80-virtual,90a-real"), or "" for a build without CUDA.
CPR_API const char* cpr_cuda_architectures(void);
// Returns the version of CUDA that the kernels were built with ("13.0"), or "" for a build without CUDA.
CPR_API const char* cpr_cuda_version(void);
// Returns the oldest NVIDIA driver that this version runs on (580), or 0 for a build without CUDA.
CPR_API int cpr_cuda_oldest_driver(void);
// Returns null, or an error message that says what to install if this machine's driver is older than that. It does not
// initialise CUDA. Every CUDA kernel then returns that message instead of running.
CPR_API const char* cpr_cuda_driver_error(void);

#ifdef __cplusplus
}
#endif
