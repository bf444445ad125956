// Helpers of the CUDA kernels. Only c10's CUDA headers: ATen's need math libraries that a slim toolkit
// lacks.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>

#include "../checks.h"

namespace d2ext {

constexpr int kThreads = 256;

// Type of arithmetic and accumulation.
template <class T>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <class T>
using Accumulate = typename AccumulateOf<T>::type;

// Call `run` with a value of the type the tensor holds.
template <class F>
void dispatch(at::ScalarType type, const F& run) {
  switch (type) {
    case at::kFloat: return run(float());
    case at::kDouble: return run(double());
    case at::kHalf: return run(c10::Half());
    case at::kBFloat16: return run(c10::BFloat16());
    default: TORCH_CHECK(false, "d2ext: unsupported dtype");
  }
}

inline int64_t blocks_for(int64_t items, int64_t per_block = kThreads) {
  return std::min<int64_t>((items + per_block - 1) / per_block, int64_t(1) << 30);
}

// Memory of the current stream for values of T. Not a tensor: under deterministic algorithms torch
// fills those.
template <class T>
struct Scratch {
  c10::DataPtr memory;

  Scratch() = default;
  Scratch(const at::Tensor& beside, int64_t count)
      : memory(c10::GetAllocator(beside.device().type())->allocate(count * sizeof(T))) {}
  T* get() const {
    return static_cast<T*>(memory.get());
  }
};

// Sum over the block in a fixed order; the result is valid in thread 0. `scratch` holds 32 values.
template <class T>
__device__ __forceinline__ T block_sum(T value, T* scratch) {
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, offset);
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  T total = T(0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < static_cast<int>(blockDim.x) / 32; ++i) total += scratch[i];
  }
  return total;
}

#define D2EXT_GRID_STRIDE(i, n)                                                \
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < (n);    \
       i += int64_t(gridDim.x) * blockDim.x)

}  // namespace d2ext
