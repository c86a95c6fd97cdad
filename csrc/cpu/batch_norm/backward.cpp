// The backward pass of batch_norm on the CPU: per channel the sums of g and of g * (x - mean), then the gradient of x,
// which is linear in g and x. With ReLU, g is the gradient of the outputs that are not cut off; the outputs are
// computed again from x, with the arithmetic of the forward pass, rather than kept.
#include "cpu/batch_norm/rows.h"
#include "cpu/common/dispatch.h"

namespace cpr::CPR_VARIANT {
namespace {

struct Job {
  const cpr_batch_norm_args& args;
  const Rows rows;
  const float* grad;
  double* sums;  // [parts, 2, C] of g, and of g * (x - shift)
  Affine affine;
  float* factors;  // [3, L] grad_x = factors[0] * g + factors[1] * (x - shift) + factors[2]
  float* grad_x;
  const char* failure;  // every thread sets the same text
};

// The gradient g of element i of a block, after that of ReLU, and the element's distance from the shift.
struct Element {
  float g, distance;
};
template <bool relu>
struct Elements {
  const float* x;
  const float* grad;
  const float* shift;
  const float* scale;
  const float* offset;

  Elements(const Job& job, int64_t block)
      : x(job.args.x + job.rows.begin(block)),
        grad(job.grad + job.rows.begin(block)),
        shift(job.affine.shift),
        scale(job.affine.scale),
        offset(job.affine.offset) {}

  Element operator()(int64_t i, int64_t l) const {
    const float distance = x[i] - shift[l], g = grad[i];
    const bool cut = relu && distance * scale[l] + offset[l] <= 0;  // as torch, NaN passes the gradient on
    return {cut ? 0 : g, distance};
  }
};

template <bool relu>
void part_sums(int64_t begin, int64_t end, void* context) {
  Job& job = *static_cast<Job*>(context);
  const Rows& rows = job.rows;
  const int64_t C = rows.C, L = rows.segment;
  const ExactArithmetic exact;
  const Scratch<float> sums(2 * L);
  const Scratch<double> folded(2 * C);
  if (!sums.data || !folded.data) {
    job.failure = kNoMemory;
    return;
  }
  for (int64_t part = begin; part < end; ++part) {
    double* total = job.sums + part * 2 * C;
    for (int64_t c = 0; c < 2 * C; ++c) total[c] = 0;
    const int64_t first = part * rows.blocks_per_part;
    for (int64_t block = first; block < first + rows.blocks_per_part && block < rows.blocks; ++block) {
      const Elements<relu> element(job, block);
      sum_segments(rows.floats(block), L, sums.data, [=](int64_t i, int64_t l) {
        const Element e = element(i, l);
        return Terms{e.g, e.g * e.distance};
      });
      fold_segment(sums.data, rows, folded.data);
      fold_segment(sums.data + L, rows, folded.data + C);
      for (int64_t c = 0; c < 2 * C; ++c) total[c] += folded.data[c];
    }
  }
}

template <bool relu>
void input_gradient(int64_t begin, int64_t end, void* context) {
  const Job& job = *static_cast<Job*>(context);
  const int64_t L = job.rows.segment;
  const ExactArithmetic exact;
  const float *of_g = job.factors, *of_x = job.factors + L, *constant = job.factors + 2 * L;
  for (int64_t block = begin; block < end; ++block) {
    const Elements<relu> element(job, block);
    float* __restrict out = job.grad_x + job.rows.begin(block);
    each_element(job.rows.floats(block), L, [=](int64_t i, int64_t l) {
      const Element e = element(i, l);
      out[i] = of_g[l] * e.g + (of_x[l] * e.distance + constant[l]);
    });
  }
}

// Computes the gradients of weight and bias from the sums [2, C] over all rows, and the factors of grad_x.
void finish_sums(const Job& job, const double* mean, const double* variance, const double* sums, float* grad_weight,
                 float* grad_bias) {
  const cpr_batch_norm_args& a = job.args;
  const int64_t C = job.rows.C, L = job.rows.segment;
  for (int64_t c = 0; c < C; ++c) {
    const double inverse_std = 1 / __builtin_sqrt(variance[c] + a.eps), rest = mean[c] - job.affine.shift[c];
    const double of_g = (a.weight ? a.weight[c] : 1) * inverse_std;
    const double dot = sums[C + c] - rest * sums[c];  // sum of g * (x - mean)
    const double of_x = -of_g * inverse_std * inverse_std * dot / static_cast<double>(a.R);
    grad_weight[c] = static_cast<float>(dot * inverse_std);
    grad_bias[c] = static_cast<float>(sums[c]);
    job.factors[c] = static_cast<float>(of_g);
    job.factors[L + c] = static_cast<float>(of_x);
    job.factors[2 * L + c] = static_cast<float>(-of_g * sums[c] / static_cast<double>(a.R) - of_x * rest);
  }
  for (int row = 0; row < 3; ++row) repeat_channels(job.rows, job.factors + row * L);
}

}  // namespace

const char* batch_norm_backward(const cpr_batch_norm_args* args, const double* mean, const double* variance,
                                const float* grad, float* grad_x, float* grad_weight, float* grad_bias,
                                cpr_parallel_for parallel) {
  const Rows rows(args->R, args->C);
  const int64_t C = rows.C;
  const Scratch<double> sums(rows.parts * 2 * C);
  const Scratch<float> affine(3 * rows.segment), factors(3 * rows.segment);
  if (!sums.data || !affine.data || !factors.data) return kNoMemory;
  Job job{*args, rows, grad, sums.data, Affine(rows, affine.data), factors.data, grad_x, nullptr};
  job.affine.set(*args, rows, mean, variance);
  parallel(rows.parts, 1, args->relu ? part_sums<true> : part_sums<false>, &job);
  if (job.failure) return job.failure;

  for (int64_t part = 1; part < rows.parts; ++part) {
    for (int64_t c = 0; c < 2 * C; ++c) sums.data[c] += sums.data[part * 2 * C + c];
  }
  finish_sums(job, mean, variance, sums.data, grad_weight, grad_bias);
  parallel(rows.blocks, 4, args->relu ? input_gradient<true> : input_gradient<false>, &job);
  return nullptr;
}

}  // namespace cpr::CPR_VARIANT
