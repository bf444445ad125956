// CUDA's execution model on one CPU thread, enough of it for the kernels of d2ext: they are compiled as
// C++ after this header, which `-include` puts in front, with their launches rewritten (build.py).
//
// The threads of a block are fibers that run until a barrier or a shuffle. Blocks run one after the
// other. The memory accesses of the kernels are seen through the calls that `-fsanitize=thread` puts
// before them: every one has to lie within a tensor, shared memory or the stack of its thread, and no
// two threads may touch one byte, one of them writing, without a barrier between them. Whatever breaks a
// rule is an exception of the launch.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}

// Of the thread that runs.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

struct Stream {
  bool current;
};

int& guards();      // of a device, alive
void note_check();  // of the last launch
void barrier(int line);
// Bits of the value that the lane `offset` further has; the own ones past the end of the warp.
uint64_t shuffle_down(uint64_t bits, int offset);
void* dynamic_shared();
// Announce an access that the compiler does not see as one of the kernel's.
void note_atomic(const void* address, size_t size);

struct Launch {
  const char* kernel;
  dim3 grid, block;
  size_t shared_bytes;
  Stream stream;

  // `thread(state)` is what every thread does.
  void run(void (*thread)(void*), void* state) const;
};

template <class... Parameters>
auto launch(
    const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t bytes,
    Stream stream) {
  return [=](Parameters... arguments) {
    auto call = [&]() __attribute__((no_sanitize("thread"))) { kernel(arguments...); };
    using Call = decltype(call);
    Launch{name, grid, block, bytes, stream}.run(
        [](void* state) __attribute__((no_sanitize("thread"))) {
          (*static_cast<Call*>(state))();
        },
        &call);
  };
}

template <class T, class Change>
__attribute__((no_sanitize("thread"))) T atomically(T* address, const Change& change) {
  note_atomic(address, sizeof(T));
  const T before = *address;
  *address = change(before);
  return before;
}

}  // namespace emulation

#define __syncthreads() ::emulation::barrier(__LINE__)

template <class T>
T __shfl_down_sync(unsigned, T value, int offset) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = ::emulation::shuffle_down(bits, offset);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
T atomicAdd(T* address, T value) {
  return ::emulation::atomically(address, [=](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicMin(T* address, T value) {
  return ::emulation::atomically(address, [=](T old) { return std::min(old, value); });
}
template <class T>
T atomicMax(T* address, T value) {
  return ::emulation::atomically(address, [=](T old) { return std::max(old, value); });
}

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

#include "intrinsics.h"
