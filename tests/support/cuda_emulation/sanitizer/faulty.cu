// Small kernels with one fault each, to test that the sanitizer reports it. Each works on `data`, 64 initialised words
// in a tensor of 256 bytes, and on shared memory.
#include "cuda/common/launch.cuh"
#include "cuda/common/tensor_core.cuh"
#include "cuda/common/warpgroup.cuh"

namespace {

struct Shared {
  unsigned words[64];
};

template <typename Body>
__global__ void kernel(Body body, unsigned* data) {
  Shared& shared = cpr::shared_memory<Shared>();
  body(shared, data, threadIdx.x, blockIdx.x);
}

struct Launch {
  unsigned blocks;
  cudaStream_t stream;
  unsigned* data;

  template <typename Body>
  const char* operator()(Body body) const {
    return cpr::launch<Shared>(kernel<Body>, dim3(blocks), 64, stream, body, data);
  }
};

__attribute__((noinline)) int hidden(int value) {
  asm("" : "+r"(value));  // the compiler does not know the value
  return value;
}

const char* races(int which, const Launch& launch) {
  switch (which) {
    case 0:  // no fault
      return launch([](Shared& shared, unsigned* data, unsigned t, unsigned) {
        shared.words[t] = data[t];
        __syncthreads();
        data[t] = shared.words[63 - t];
      });
    case 1:  // read before a barrier what another thread wrote
      return launch([](Shared& shared, unsigned* data, unsigned t, unsigned) {
        shared.words[t] = data[t];
        data[t] = shared.words[63 - t];
      });
    case 2:  // overwritten before a barrier what another thread read
      return launch([](Shared& shared, unsigned* data, unsigned t, unsigned) {
        shared.words[t] = t;
        __syncthreads();
        const unsigned other = shared.words[t ^ 32];
        shared.words[t] = other + data[t];
      });
    case 3:  // an update that is not atomic
      return launch([](Shared&, unsigned* data, unsigned, unsigned) { data[0] += 1; });
    case 4:  // two blocks write one word
      return launch([](Shared&, unsigned* data, unsigned t, unsigned) {
        if (t == 0) data[0] = 1;
      });
    case 5:  // a barrier that half of the threads reach elsewhere
      return launch([](Shared&, unsigned*, unsigned t, unsigned) {
        if (t < 32) {
          __syncthreads();
        } else {
          __syncthreads();
        }
      });
    default:  // warps that exchange memory after a barrier of the warp only
      return launch([](Shared& shared, unsigned* data, unsigned t, unsigned) {
        shared.words[t] = t;
        __syncwarp();
        data[t] = shared.words[t ^ 1] + shared.words[t ^ 32];
      });
  }
}

const char* memory(int which, const Launch& launch) {
  switch (which) {
    case 10:
      return launch([](Shared&, unsigned* data, unsigned t, unsigned) { data[t + hidden(1)] = 0; });
    case 11:
      return launch(
          [](Shared& shared, unsigned* data, unsigned t, unsigned) { data[t] = (&shared.words[0] + hidden(64))[t]; });
    case 12:
      return launch([](Shared& shared, unsigned* data, unsigned t, unsigned) { data[t] = shared.words[t]; });
    case 13:
      return launch([](Shared&, unsigned* data, unsigned t, unsigned) {
        if (t < 16) *reinterpret_cast<float4*>(data + hidden(1)) = make_float4(0, 0, 0, 0);
      });
    case 14:  // a copy that is not waited for
      return launch([](Shared& shared, unsigned* data, unsigned t, unsigned) {
        if (t < 16) cpr::copy_async<16>(&shared.words[4 * t], data + 4 * t, true);
        cpr::commit_copies();
        if (t < 16) data[4 * t] = shared.words[4 * t];
        cpr::wait_for_copies<0>();
      });
    case 15:  // a copy that another thread reads without a barrier
      return launch([](Shared& shared, unsigned* data, unsigned t, unsigned) {
        if (t < 16) cpr::copy_async<16>(&shared.words[4 * t], data + 4 * t, true);
        cpr::commit_copies();
        cpr::wait_for_copies<0>();
        if (shared.words[t] == 12345) data[t] = 0;  // never
      });
    default:  // a product of two int that does not fit one
      return launch([](Shared&, unsigned* data, unsigned t, unsigned) {
        data[t] = static_cast<unsigned>(hidden(65536) * hidden(32768 + static_cast<int>(t)));
      });
  }
}

// Two tiles of 16 rows of 128 bytes, and sums of the products with one of them.
struct Tiles {
  alignas(1024) uint4 vectors[2][16 * cpr::kSwizzledRows];
  __device__ uint64_t factor(int tile) const { return cpr::factor_at(cpr::shared_address(vectors[tile]), 1024); }
};

struct Sums {
  float values[16][4] = {};
  uint32_t factor[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};
  __device__ void start(const Tiles& tiles, int tile) {
    cpr::start_transposed_product<__nv_bfloat16>(values, factor, tiles.factor(tile));
  }
};

template <typename Body>
__global__ void product_kernel(Body body, unsigned* data) {
  Tiles& tiles = cpr::shared_memory<Tiles>();
  Sums sums;
  tiles.vectors[threadIdx.x / 64][threadIdx.x % 64] = tiles.vectors[threadIdx.x / 64][threadIdx.x % 64 + 64] = uint4{};
  body(tiles, sums);
  if (threadIdx.x < 64) data[threadIdx.x] = static_cast<unsigned>(sums.values[0][0]);
}

void publish() {
  cpr::publish_to_products();
  __syncthreads();
}

void finish() {
  cpr::commit_products();
  cpr::wait_for_products();
}

template <typename Body>
const char* launch_products(const Launch& launch, Body body) {
  return cpr::launch<Tiles>(product_kernel<Body>, dim3(1), cpr::kWarpgroup, launch.stream, body, launch.data);
}

const char* products(int which, const Launch& launch) {
  switch (which) {
    case 20:  // no fault of products
      return launch_products(launch, [](Tiles& tiles, Sums& sums) {
        publish();
        cpr::fence_registers();
        sums.start(tiles, 0);
        finish();
      });
    case 21:  // registers are not fenced
      return launch_products(launch, [](Tiles& tiles, Sums& sums) {
        publish();
        sums.start(tiles, 0);
        finish();
      });
    case 22:  // shared memory is not published
      return launch_products(launch, [](Tiles& tiles, Sums& sums) {
        __syncthreads();
        cpr::fence_registers();
        sums.start(tiles, 0);
        finish();
      });
    case 23:  // and here not by all threads before the product
      return launch_products(launch, [](Tiles& tiles, Sums& sums) {
        cpr::publish_to_products();
        cpr::fence_registers();
        sums.start(tiles, 0);
        finish();
        __syncthreads();
      });
    case 24:  // the tile is overwritten under way
      return launch_products(launch, [](Tiles& tiles, Sums& sums) {
        publish();
        cpr::fence_registers();
        sums.start(tiles, 0);
        cpr::commit_products();
        __syncthreads();
        tiles.vectors[0][threadIdx.x].x = 1;
        cpr::wait_for_products();
      });
    case 25:  // a sum is read under way
      return launch_products(launch, [](Tiles& tiles, Sums& sums) {
        publish();
        cpr::fence_registers();
        sums.start(tiles, 0);
        cpr::commit_products();
        tiles.vectors[1][threadIdx.x].x = static_cast<unsigned>(sums.values[1][1] > 0);
        cpr::wait_for_products();
      });
    case 26:  // a factor is overwritten under way
      return launch_products(launch, [](Tiles& tiles, Sums& sums) {
        publish();
        cpr::fence_registers();
        sums.start(tiles, 0);
        cpr::commit_products();
        sums.factor[2] = static_cast<uint32_t>(hidden(0));
        cpr::wait_for_products();
      });
    case 27:  // published after the barrier
      return launch_products(launch, [](Tiles& tiles, Sums& sums) {
        __syncthreads();
        cpr::publish_to_products();
        cpr::fence_registers();
        sums.start(tiles, 0);
        finish();
      });
    default:  // the factor ends beyond shared memory
      return launch_products(launch, [](Tiles& tiles, Sums& sums) {
        publish();
        cpr::fence_registers();
        sums.start(tiles, hidden(1) + 1);
        finish();
      });
  }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* sanitizer_run_faulty(int which, int blocks, void* data,
                                                                                   void* stream) {
  const Launch launch = {static_cast<unsigned>(blocks), static_cast<cudaStream_t>(stream),
                         static_cast<unsigned*>(data)};
  return which < 10 ? races(which, launch) : which < 20 ? memory(which, launch) : products(which, launch);
}
