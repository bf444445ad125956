// What the files of the machine share. They are not compiled as kernels are, but the linker may give
// them an instrumented copy of a template: what they do on a thread's behalf, they do while `running`
// names no thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#define UNSEEN __attribute__((no_sanitize("thread")))

namespace emulation {

constexpr int kWarp = 32;

enum class Access : uint8_t { kRead, kWrite, kAtomic };
enum class Space : uint8_t { kGlobal, kShared };

struct Running {
  int thread = -1;  // number in the block, -1 outside of kernels
  uint32_t block = 0, launch = 0;
  int epoch = 0;                // barriers of the block so far
  std::vector<uint16_t> syncs;  // of its warps: `__syncwarp`s so far
  std::vector<char> shared;     // dynamic shared memory
};
extern Running running;

// --- emulation.cpp
[[noreturn]] void stop(int thread, const char* what);  // ends the launch
bool of_the_thread(int thread, uintptr_t address);     // its stack, arguments, indices
int thread_order();

// --- memory.cpp
// An access of the running thread, nothing outside of kernels; `instruction` is where it stands.
void seen(uintptr_t address, size_t size, Access access, uintptr_t instruction);

// --- traffic.cpp
extern bool tracing;
void begin_launch(const std::string& kernel, int64_t blocks, int threads, size_t shared_bytes);
void begin_block(int threads);
void trace_block(uintptr_t instruction);  // a basic block begins
void trace_call(uintptr_t from);
void trace_return();
void trace_access(
    int thread, uintptr_t address, size_t size, Access access, Space space, uintptr_t instruction);
void merge_warp();  // all threads of the warp whose turn it was have stopped

// --- symbols.cpp
struct Kernel {
  std::string name = "kernel";
  size_t shared_bytes = 0;  // static shared memory
};
const Kernel& kernel_at(const void* function);

}  // namespace emulation
