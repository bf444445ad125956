// The calls that `-fsanitize=thread` puts before the accesses of kernels and those in the place of the
// host's atomic operations, and the call of `-fsanitize-coverage=trace-pc` in every basic block.
#include "machine.h"

namespace emulation {

#define SEEN(size)                                                                          \
  extern "C" UNSEEN void __tsan_read##size(void* address) {                                 \
    seen(reinterpret_cast<uintptr_t>(address), size, Access::kRead,                         \
         reinterpret_cast<uintptr_t>(__builtin_return_address(0)));                         \
  }                                                                                         \
  extern "C" UNSEEN void __tsan_write##size(void* address) {                                \
    seen(reinterpret_cast<uintptr_t>(address), size, Access::kWrite,                        \
         reinterpret_cast<uintptr_t>(__builtin_return_address(0)));                         \
  }                                                                                         \
  extern "C" UNSEEN void __tsan_unaligned_read##size(void* address) {                       \
    seen(reinterpret_cast<uintptr_t>(address), size, Access::kRead,                         \
         reinterpret_cast<uintptr_t>(__builtin_return_address(0)));                         \
  }                                                                                         \
  extern "C" UNSEEN void __tsan_unaligned_write##size(void* address) {                      \
    seen(reinterpret_cast<uintptr_t>(address), size, Access::kWrite,                        \
         reinterpret_cast<uintptr_t>(__builtin_return_address(0)));                         \
  }
SEEN(1)
SEEN(2)
SEEN(4)
SEEN(8)
SEEN(16)
extern "C" UNSEEN void __tsan_read_range(void* address, size_t size) {
  seen(reinterpret_cast<uintptr_t>(address), size, Access::kRead,
       reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
}
extern "C" UNSEEN void __tsan_write_range(void* address, size_t size) {
  seen(reinterpret_cast<uintptr_t>(address), size, Access::kWrite,
       reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
}
// Of the host's reference counts.
#define ATOMIC(bits)                                                                              \
  using Int##bits = int##bits##_t;                                                                \
  extern "C" UNSEEN Int##bits __tsan_atomic##bits##_load(const volatile Int##bits* at, int) {     \
    return __atomic_load_n(at, __ATOMIC_SEQ_CST);                                                 \
  }                                                                                               \
  extern "C" UNSEEN void __tsan_atomic##bits##_store(volatile Int##bits* at, Int##bits x, int) {  \
    __atomic_store_n(at, x, __ATOMIC_SEQ_CST);                                                    \
  }                                                                                               \
  extern "C" UNSEEN Int##bits __tsan_atomic##bits##_exchange(                                     \
      volatile Int##bits* at, Int##bits x, int) {                                                 \
    return __atomic_exchange_n(at, x, __ATOMIC_SEQ_CST);                                          \
  }                                                                                               \
  extern "C" UNSEEN Int##bits __tsan_atomic##bits##_fetch_add(                                    \
      volatile Int##bits* at, Int##bits x, int) {                                                 \
    return __atomic_fetch_add(at, x, __ATOMIC_SEQ_CST);                                           \
  }                                                                                               \
  extern "C" UNSEEN Int##bits __tsan_atomic##bits##_fetch_sub(                                    \
      volatile Int##bits* at, Int##bits x, int) {                                                 \
    return __atomic_fetch_sub(at, x, __ATOMIC_SEQ_CST);                                           \
  }                                                                                               \
  extern "C" UNSEEN bool __tsan_atomic##bits##_compare_exchange_strong(                           \
      volatile Int##bits* at, Int##bits* expected, Int##bits x, int, int) {                       \
    return __atomic_compare_exchange_n(                                                           \
        at, expected, x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                              \
  }                                                                                               \
  extern "C" UNSEEN bool __tsan_atomic##bits##_compare_exchange_weak(                             \
      volatile Int##bits* at, Int##bits* expected, Int##bits x, int, int) {                       \
    return __atomic_compare_exchange_n(                                                           \
        at, expected, x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                              \
  }
ATOMIC(8)
ATOMIC(32)
ATOMIC(64)
extern "C" UNSEEN void __tsan_atomic_thread_fence(int) {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
extern "C" UNSEEN void __tsan_init() {}
extern "C" UNSEEN void __tsan_func_entry(void* from) {
  if (tracing) trace_call(reinterpret_cast<uintptr_t>(from));
}
extern "C" UNSEEN void __tsan_func_exit() {
  if (tracing) trace_return();
}
extern "C" UNSEEN void __sanitizer_cov_trace_pc() {
  if (tracing) trace_block(reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
}
extern "C" UNSEEN void __tsan_vptr_update(void**, void*) {}
extern "C" UNSEEN void __tsan_vptr_read(void**) {}

}  // namespace emulation
