// Calls the kernels from C++, without torch: mines positives in two stages over two views, then computes the loss.
#include <cpr_fast.h>

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

// Any thread pool can be used: results do not depend on how it divides the work.
static void serially(int64_t count, int64_t, cpr_range_body body, void* context) { body(0, count, context); }

static std::vector<float> unit_rows(int64_t rows, int64_t width, std::mt19937& generator) {
  std::normal_distribution<float> normal;
  std::vector<float> values(rows * width);
  for (int64_t row = 0; row < rows; ++row) {
    float squares = 0;
    for (int64_t d = 0; d < width; ++d) squares += std::pow(values[row * width + d] = normal(generator), 2.0f);
    for (int64_t d = 0; d < width; ++d) values[row * width + d] /= std::sqrt(squares);
  }
  return values;
}

int main() {
  const int64_t V = 2, B = 4, K = 2000, D = 128, views[] = {1, 0}, keep[] = {1000, 5};
  std::mt19937 generator(0);
  const std::vector<float> queries = unit_rows(V * B, D, generator), memory = unit_rows(V * K, D, generator);
  std::vector<int64_t> indices(B * keep[1]);
  std::vector<float> scores(indices.size());
  cpr_cascade_args cascade = {};
  cascade.queries = queries.data(), cascade.memory = memory.data();
  cascade.indices = indices.data(), cascade.scores = scores.data();
  cascade.views = views, cascade.keep = keep;
  cascade.V = V, cascade.B = B, cascade.K = K, cascade.D = D, cascade.n = 2;
  if (const char* error = cpr_cascade_select_cpu(&cascade, serially)) return std::fprintf(stderr, "%s\n", error), 1;

  std::vector<float> loss(B), grad_query(B * D), own_coefficient(B), lse_all(B), lse_positive(B);
  const cpr_mil_nce_outputs outputs = {loss.data(), grad_query.data(), own_coefficient.data(), lse_all.data(),
                                       lse_positive.data()};
  cpr_mil_nce_args args = {};
  args.query = args.own_key = queries.data();  // view 0
  args.memory = memory.data();
  args.positives = indices.data();
  args.B = B, args.K = K, args.D = D, args.P = keep[1], args.temperature = 0.07;
  if (const char* error = cpr_mil_nce_forward_cpu(&args, &outputs, serially))
    return std::fprintf(stderr, "%s\n", error), 1;

  for (int64_t b = 0; b < B; ++b) {
    std::printf("query %ld: loss %.4f, positives", static_cast<long>(b), loss[b]);
    for (int64_t i = 0; i < keep[1]; ++i) std::printf(" %ld", static_cast<long>(indices[b * keep[1] + i]));
    std::printf("\n");
  }
}
