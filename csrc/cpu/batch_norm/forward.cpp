// The forward pass of batch_norm on the CPU. The statistics read the rows once: each block is read twice while it is in
// the cache, first for its mean, then for the squares of the distances from it, so that no digits cancel. Blocks are
// merged in double [Chan, Golub and LeVeque 1983].
#include "cpu/batch_norm/rows.h"
#include "cpu/common/dispatch.h"

namespace cpr::CPR_VARIANT {
namespace {

struct Job {
  const cpr_batch_norm_args& args;
  const Rows rows;
  double* moments;  // [parts, 2, C] mean, and sum of squared distances from it
  Affine affine;
  float* y;
  const char* failure;  // every thread sets the same text
};

// Merges `count` rows with these moments [2, C] into `total`, the moments of `before` rows.
void merge(double* total, int64_t before, const double* moments, int64_t count, int64_t C) {
  const double n = static_cast<double>(before + count), old_share = before / n, new_share = count / n;
  for (int64_t c = 0; c < C; ++c) {
    const double distance = moments[c] - total[c];
    total[c] = total[c] * old_share + moments[c] * new_share;
    total[C + c] += moments[C + c] + distance * distance * (before * new_share);
  }
}

// Computes the moments [2, C] of one block. Scratch: shift [L], sums [2, L].
void block_moments(const Rows& rows, const float* x, int64_t floats, float* shift, float* sums, double* moments) {
  const int64_t C = rows.C;
  const double count = static_cast<double>(floats / C);
  sum_segments(floats, rows.segment, sums, [x](int64_t i, int64_t) { return Terms{x[i], 0}; });
  fold_segment(sums, rows, moments);
  for (int64_t c = 0; c < C; ++c) {
    shift[c] = static_cast<float>(moments[c] / count);
    if (!(shift[c] - shift[c] == 0)) shift[c] = 0;  // an infinite mean stays infinite: inf - inf would make it NaN
  }
  repeat_channels(rows, shift);
  sum_segments(floats, rows.segment, sums, [x, shift](int64_t i, int64_t l) {
    const float distance = x[i] - shift[l];
    return Terms{distance, distance * distance};
  });
  fold_segment(sums, rows, moments);
  fold_segment(sums + rows.segment, rows, moments + C);
  for (int64_t c = 0; c < C; ++c) {
    const double distance = moments[c] / count;
    const double squares = moments[C + c] - moments[c] * distance;
    moments[c] = shift[c] + distance;
    moments[C + c] = squares < 0 ? 0 : squares;  // of equal values, rounding can leave less than 0
  }
}

void part_moments(int64_t begin, int64_t end, void* context) {
  Job& job = *static_cast<Job*>(context);
  const Rows& rows = job.rows;
  const ExactArithmetic exact;
  const Scratch<float> floats(3 * rows.segment);
  const Scratch<double> moments(2 * rows.C);
  if (!floats.data || !moments.data) {
    job.failure = kNoMemory;
    return;
  }
  for (int64_t part = begin; part < end; ++part) {
    double* total = job.moments + part * 2 * rows.C;
    for (int64_t c = 0; c < 2 * rows.C; ++c) total[c] = 0;
    const int64_t first = part * rows.blocks_per_part;
    for (int64_t block = first; block < first + rows.blocks_per_part && block < rows.blocks; ++block) {
      const int64_t count = rows.floats(block);
      block_moments(rows, job.args.x + rows.begin(block), count, floats.data, floats.data + rows.segment, moments.data);
      merge(total, (rows.begin(block) - rows.begin(first)) / rows.C, moments.data, count / rows.C, rows.C);
    }
  }
}

void update(float* running, double momentum, const double* values, double factor, int64_t C) {
  for (int64_t c = 0; running && c < C; ++c) {
    running[c] = static_cast<float>((1 - momentum) * running[c] + momentum * (values[c] * factor));
  }
}

template <bool relu>
void normalise(int64_t begin, int64_t end, void* context) {
  const Job& job = *static_cast<Job*>(context);
  const ExactArithmetic exact;
  const float *shift = job.affine.shift, *scale = job.affine.scale, *offset = job.affine.offset;
  for (int64_t block = begin; block < end; ++block) {
    const float* x = job.args.x + job.rows.begin(block);
    float* __restrict y = job.y + job.rows.begin(block);
    each_element(job.rows.floats(block), job.rows.segment, [=](int64_t i, int64_t l) {
      const float value = (x[i] - shift[l]) * scale[l] + offset[l];
      y[i] = relu && value < 0 ? 0 : value;  // NaN stays NaN
    });
  }
}

}  // namespace

const char* batch_norm_forward(const cpr_batch_norm_args* args, const cpr_batch_norm_running* running, float* y,
                               double* mean, double* variance, cpr_parallel_for parallel) {
  const Rows rows(args->R, args->C);
  const int64_t C = rows.C;
  const Scratch<double> moments(rows.parts * 2 * C);
  const Scratch<float> affine(3 * rows.segment);
  if (!moments.data || !affine.data) return kNoMemory;
  Job job{*args, rows, moments.data, Affine(rows, affine.data), y, nullptr};
  parallel(rows.parts, 1, part_moments, &job);
  if (job.failure) return job.failure;

  const int64_t part_rows = rows.blocks_per_part * rows.block / C;
  for (int64_t part = 1; part < rows.parts; ++part) {
    const int64_t before = part * part_rows;
    merge(moments.data, before, moments.data + part * 2 * C, rows.R - before < part_rows ? rows.R - before : part_rows,
          C);
  }
  for (int64_t c = 0; c < C; ++c) {
    mean[c] = moments.data[c];
    variance[c] = moments.data[C + c] / static_cast<double>(rows.R);
  }
  update(running->mean, running->momentum, mean, 1, C);
  update(running->variance, running->momentum, variance, rows.R / (rows.R - 1.0), C);
  job.affine.set(*args, rows, mean, variance);
  parallel(rows.blocks, 4, args->relu ? normalise<true> : normalise<false>, &job);
  return nullptr;
}

}  // namespace cpr::CPR_VARIANT
