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
#include "cuda/tvl1_flow/solver.cuh"
#include "cuda/tvl1_flow/team.cuh"

namespace cpr::tvl1 {
namespace {

// Zeroed before the launch.
struct TeamSync {
  TeamBarrier barrier;
  unsigned not_finite;  // a frame of the current pair has a NaN or infinite pixel
  unsigned unused;
  long long pair;  // the pair that the team works on
};

struct Plan {
  int levels, teams, size;  // levels = 0: the device cannot run the kernel
  const char* error;        // or null: why it cannot
  int64_t pyramid_pixels;   // of all levels
  int64_t team_bytes;
};

// Returns the next pair of the team, -1 if none is left.
__device__ int64_t next_pair(const Team& team, TeamSync* sync, unsigned* queue, int64_t pairs) {
  team.wait();  // the team has finished the previous pair and no longer reads `sync`
  if (team.rank == 0 && threadIdx.x == 0) {
    const int64_t pair = atomicAdd(queue, 1u);
    sync->not_finite = 0;
    sync->pair = pair < pairs ? pair : -1;
  }
  team.wait();
  return *static_cast<volatile long long*>(&sync->pair);
}

__global__ void __launch_bounds__(kThreads)
    tvl1_kernel(const cpr_tvl1_args a, const Plan plan, unsigned* queue, TeamSync* syncs, char* memory) {
  const int own_team = static_cast<int>(blockIdx.x) / plan.size;
  TeamSync* const sync = &syncs[own_team];
  const Team team = {static_cast<int>(blockIdx.x) % plan.size, plan.size, &sync->barrier};
  Buffers buffers;
  lay_out(a, plan.pyramid_pixels, memory + own_team * plan.team_bytes, &buffers);
  for (;;) {
    const int64_t pair = next_pair(team, sync, queue, a.N * (a.T - 1));
    if (pair < 0) return;
    const int64_t clip = pair / (a.T - 1), frame = clip * a.T + pair % (a.T - 1);
    float* flow = a.flow + pair * 2 * a.H * a.W;
    Solver solver(a, team, buffers);
    int64_t pixel_iterations = 0;
    if (solver.build_pyramids(plan.levels, frame, &sync->not_finite)) {
      pixel_iterations = solver.solve(plan.levels, flow);
    } else {
      solver.each_pixel(2 * a.H * a.W, [&](int64_t i) { flow[i] = nanf(""); });
    }
    if (a.pixel_iterations && team.rank == 0 && threadIdx.x == 0) a.pixel_iterations[pair] = pixel_iterations;
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
  Size level = finest;
  for (int scale = 0; scale < plan.levels; ++scale, level = coarser(level, a.scale_step)) {
    plan.pyramid_pixels += int64_t{level.height} * level.width;
  }
  Buffers unused;
  plan.team_bytes = lay_out(a, plan.pyramid_pixels, nullptr, &unused);
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
  return static_cast<size_t>(sync_bytes(plan.teams) + plan.teams * plan.team_bytes);
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
