// Further functions of CUDA's device code, for emulation.h.
#pragma once

inline int __ffs(int value) {
  return __builtin_ffs(value);
}

template <class T>
T atomicOr(T* address, T value) {
  return ::emulation::atomically(address, [=](T old) { return old | value; });
}
