// CUDA's execution model on one CPU thread, enough of it for the kernels of d2ext: they are compiled as
// C++ after this header, which `-include` puts in front, with their launches rewritten (build.py).
//
// The threads of a block are fibers that run until a barrier or a shuffle. Blocks run one after the
// other. The memory accesses of the kernels are seen through the calls that `-fsanitize=thread` puts
// before them: every one has to lie within a tensor, shared memory or the stack of its thread, and no
// two threads may touch one byte, one of them writing, without a barrier between them. Whatever breaks a
// rule is an exception of the launch. On request the traffic to memory is counted (traffic.cpp).
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
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// CUDA's vector types, loaded and stored whole, as one access.
#define EMULATION_PACKED(Name, T, kCount, ...)                                                  \
  struct alignas(sizeof(T) * kCount) Name {                                                     \
    typedef char Whole __attribute__((vector_size(sizeof(T) * kCount), may_alias));             \
    T __VA_ARGS__;                                                                              \
    Name() = default;                                                                           \
    Name(const Name& other) { *this = other; }                                                  \
    template <class... Values>                                                                  \
      requires(sizeof...(Values) == kCount)                                                     \
    Name(Values... values) {                                                                    \
      const T all[] = {static_cast<T>(values)...};                                              \
      std::memcpy(this, all, sizeof all);                                                       \
    }                                                                                           \
    Name& operator=(const Name& other) {                                                        \
      *reinterpret_cast<Whole*>(this) = *reinterpret_cast<const Whole*>(&other);                \
      return *this;                                                                             \
    }                                                                                           \
  };                                                                                            \
  template <class... Values>                                                                    \
  Name make_##Name(Values... values) {                                                          \
    return Name(values...);                                                                     \
  }
EMULATION_PACKED(uint2, unsigned, 2, x, y)
EMULATION_PACKED(uint4, unsigned, 4, x, y, z, w)
EMULATION_PACKED(int2, int, 2, x, y)
EMULATION_PACKED(int4, int, 4, x, y, z, w)
EMULATION_PACKED(float2, float, 2, x, y)
EMULATION_PACKED(float4, float, 4, x, y, z, w)
EMULATION_PACKED(double2, double, 2, x, y)

// Of the thread that runs.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

struct Stream {
  bool current;
};

int& guards();      // of a device, alive
void note_check();  // of the last launch
void barrier(int line);
// What all lanes of the warp give; it stays until the warp's next exchange. `orders`: accesses before
// are seen by the warp after.
struct Lanes {
  const uint64_t* bits;
  int self, count;
};
Lanes exchange(uint64_t bits, bool orders);
void* dynamic_shared();
// Announce an access that the compiler does not see as one of the kernel's.
void note_atomic(const void* address, size_t size);

struct Launch {
  const void* function;
  dim3 grid, block;
  size_t shared_bytes;
  Stream stream;

  // `thread(state)` is what every thread does.
  void run(void (*thread)(void*), void* state) const;
};

template <class... Parameters>
auto launch(
    void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t bytes,
    Stream stream) {
  return [=](Parameters... arguments) {
    auto call = [&]() __attribute__((no_sanitize("thread"))) { kernel(arguments...); };
    using Call = decltype(call);
    Launch{reinterpret_cast<const void*>(kernel), grid, block, bytes, stream}.run(
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

#define __syncwarp() (void)::emulation::exchange(0, true)

namespace emulation {
// The value of lane `from(own lane)`, the own one where there is none.
template <class T, class From>
__attribute__((no_sanitize("thread"))) T shuffle(T value, const From& from) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const Lanes lanes = exchange(bits, false);
  const int lane = from(lanes.self);
  bits = lanes.bits[lane >= 0 && lane < lanes.count ? lane : lanes.self];
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
}  // namespace emulation

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return ::emulation::shuffle(value, [=](int) { return lane & 31; });
}
template <class T>
T __shfl_down_sync(unsigned, T value, int offset) {
  return ::emulation::shuffle(value, [=](int self) { return self + offset; });
}
template <class T>
T __shfl_up_sync(unsigned, T value, int offset) {
  return ::emulation::shuffle(value, [=](int self) { return self - offset; });
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return ::emulation::shuffle(value, [=](int self) { return self ^ mask; });
}
__attribute__((no_sanitize("thread"))) inline unsigned __ballot_sync(unsigned, bool value) {
  const ::emulation::Lanes lanes = ::emulation::exchange(value, false);
  unsigned bits = 0;
  for (int i = 0; i < lanes.count; ++i) bits |= static_cast<unsigned>(lanes.bits[i]) << i;
  return bits;
}
inline bool __any_sync(unsigned mask, bool value) {
  return __ballot_sync(mask, value) != 0;
}
inline int __ffs(unsigned bits) {
  return __builtin_ffs(static_cast<int>(bits));
}
inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}
template <class T>
T __ldg(const T* address) {
  return *address;
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
