// TV-L1 flow on CUDA in a single launch, without synchronisation with the host. csrc/cpu/tvl1_flow/tvl1_flow.cpp
// describes the algorithm.
//
// A team of blocks takes frame pairs from a queue and solves each from the pyramid to the flow, with a barrier of the
// team between steps. All blocks of a team evaluate the stop test on the same error sums, so the host is not needed and
// the next pair starts as soon as one has converged. Teams are as large as the device can keep resident for the number
// of pairs. Sums run over the tiles in order, so results depend neither on the size of a team nor on scheduling.
//
// Operations and rounding are those of the CPU kernel. Only the error sum is added in another order, which changes the
// result if the sum is within rounding of the threshold of the stop test.
#include <algorithm>

#include "cpr_fast.h"
#include "cuda/tvl1_flow/plan.cuh"
#include "cuda/tvl1_flow/solver.cuh"
#include "cuda/tvl1_flow/team.cuh"

namespace cpr::tvl1 {
namespace {

__global__ void __launch_bounds__(kThreads)
    tvl1_kernel(const cpr_tvl1_args a, const Plan plan, unsigned* queue, TeamSync* syncs, char* memory) {
  const Solver solver(a, plan, syncs, memory);
  while (solver.next_pair(queue)) {
    if (solver.build_pyramids()) {
      solver.solve();
    } else {
      solver.store_flow([](unsigned) { return float2{nanf(""), nanf("")}; });
    }
  }
}

// ---- host --------------------------------------------------------------------------------------------------------

// Returns the number of blocks for each pair: the smallest number with the shortest total time, if all pairs take
// equally long. At most one block per tile of the finest level, because more would be idle.
int team_size(int64_t pairs, int resident, int tiles) {
  int best = 1;
  double least = 0;
  for (int size = 1; size <= std::min(resident, tiles); ++size) {
    const double visits = static_cast<double>(ceil_div(pairs, resident / size) * ceil_div(tiles, size));
    if (size == 1 || visits < least) best = size, least = visits;
  }
  return best;
}

int64_t sync_bytes(int teams) { return aligned(sizeof(unsigned)) + aligned(teams * int64_t{sizeof(TeamSync)}); }

Plan make_plan(const cpr_tvl1_args& a) {
  Plan plan = {};
  const int64_t pairs = a.N * (a.T - 1);
  const int resident = resident_blocks(tvl1_kernel, kThreads, sizeof(Shared), &plan.error);
  if (resident == 0) return plan;
  const Size finest = {static_cast<int>(a.H), static_cast<int>(a.W)};
  plan.size = team_size(std::max<int64_t>(pairs, 1), resident, count_tiles(finest));
  plan.teams = static_cast<int>(std::min<int64_t>(std::max<int64_t>(pairs, 1), resident / plan.size));
  plan.levels = count_levels(a);
  plan.layout = lay_out(a, plan.levels);
  return plan;
}

const char* check_cuda(const cpr_tvl1_args& a) {
  if (const char* error = check(a)) return error;
  if ((a.H + 2 * kBorder) * (a.W + 2 * kBorder) > INT32_MAX) return "frames: 2^31 pixels at most on CUDA";
  if (a.N * (a.T - 1) > INT32_MAX) return "frames: 2^31 pairs at most on CUDA";
  return nullptr;
}

}  // namespace
}  // namespace cpr::tvl1

size_t cpr_tvl1_flow_cuda_workspace(const cpr_tvl1_args* args) {
  using namespace cpr::tvl1;
  if (check_cuda(*args)) return 0;
  const Plan plan = make_plan(*args);
  return static_cast<size_t>(sync_bytes(plan.teams) + plan.teams * plan.layout.bytes);
}

const char* cpr_tvl1_flow_cuda(const cpr_tvl1_args* args, void* workspace, void* stream_) {
  using namespace cpr::tvl1;
  if (const char* error = check_cuda(*args)) return error;
  if (args->N == 0) return nullptr;
  if (const char* error = cpr::check_workspace(workspace)) return error;
  const Plan plan = make_plan(*args);
  if (plan.error != nullptr) return plan.error;
  if (plan.levels == 0) return "tvl1_flow: the device cannot hold a block of the kernel";
  const auto stream = static_cast<cudaStream_t>(stream_);
  char* const memory = static_cast<char*>(workspace);
  const int64_t head = sync_bytes(plan.teams);
  const cudaError_t cleared = cudaMemsetAsync(workspace, 0, static_cast<size_t>(head), stream);
  if (cleared != cudaSuccess) return cpr::error_text(cleared);
  auto* const queue = reinterpret_cast<unsigned*>(memory);
  auto* const syncs = reinterpret_cast<TeamSync*>(memory + aligned(sizeof(unsigned)));
  return cpr::launch_teams(tvl1_kernel, plan.teams, plan.size, kThreads, sizeof(Shared), stream, *args, plan, queue,
                           syncs, memory + head);
}
