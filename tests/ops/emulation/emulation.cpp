// The machine behind emulation.h: fibers, barriers, exchanges within a warp, and launches.
#include "machine.h"

#include <ATen/ATen.h>
#include <setjmp.h>
#include <torch/library.h>
#include <ucontext.h>

#include <array>
#include <cstdlib>
#include <memory>
#include <random>
#include <sstream>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

constexpr size_t kStack = 128 * 1024, kHostStack = 8 * 1024 * 1024;
constexpr size_t kSharedLimit = 48 * 1024;  // what a kernel gets without asking
constexpr unsigned kMaxGridYZ = 65535, kMaxThreads = 1024;

enum class State { kReady, kBarrier, kExchange, kDone };

struct Fiber {
  ucontext_t context;
  jmp_buf jump;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool started = false;
};

struct Thread {
  State state = State::kReady;
  Fiber* fiber = nullptr;
  int line = 0;  // of the barrier
  uint64_t bits = 0;
  bool orders = false;
};

std::vector<std::array<uint64_t, kWarp>> gathered;  // what the lanes of each warp gave last
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Fiber*> idle;
jmp_buf scheduler;
std::vector<Thread> threads;
std::string kernel_name, fault;
bool unchecked = false;
int guard_count = 0;
int64_t order = 0;  // of the threads: 0 ascending, 1 descending, more: at random
void (*body)(void*) = nullptr;
void* body_state = nullptr;
uintptr_t host_stack = 0;  // from here on, with the arguments of the kernel

UNSEEN void yield(State state) {
  Thread& self = threads[running.thread];
  running.thread = -1;
  self.state = state;
  if (_setjmp(self.fiber->jump) == 0) _longjmp(scheduler, 1);
}

UNSEEN void run_fiber() {
  while (true) {
    body(body_state);
    Thread& self = threads[running.thread];
    running.thread = -1;
    self.state = State::kDone;
    if (_setjmp(self.fiber->jump) == 0) _longjmp(scheduler, 1);
  }
}

UNSEEN Fiber* take_fiber() {
  if (idle.empty()) {
    fibers.emplace_back(new Fiber);
    idle.push_back(fibers.back().get());
  }
  Fiber* fiber = idle.back();
  idle.pop_back();
  return fiber;
}

UNSEEN void resume(int number) {
  Thread& thread = threads[number];
  threadIdx.x = number % blockDim.x;
  threadIdx.y = number / blockDim.x % blockDim.y;
  threadIdx.z = number / (blockDim.x * blockDim.y);
  if (thread.fiber == nullptr) thread.fiber = take_fiber();
  thread.state = State::kReady;
  if (_setjmp(scheduler) == 0) {
    Fiber* fiber = thread.fiber;
    if (fiber->started) {
      running.thread = number;
      _longjmp(fiber->jump, 1);
    }
    fiber->started = true;
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.get();
    fiber->context.uc_stack.ss_size = kStack;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, run_fiber, 0);
    running.thread = number;
    setcontext(&fiber->context);
  }
  Thread& back = threads[number];  // after the jump
  if (back.state == State::kDone) {
    idle.push_back(back.fiber);
    back.fiber = nullptr;
  }
  running.thread = -1;
}

void release_barrier() {
  int waiting = 0, ended = 0, line = 0;
  for (const Thread& thread : threads) {
    ended += thread.state == State::kDone;
    waiting += thread.state == State::kBarrier;
    if (thread.state == State::kBarrier && line == 0) line = thread.line;
  }
  for (const Thread& thread : threads) {
    if (thread.state == State::kBarrier && thread.line != line) fault = "barriers of two lines meet";
  }
  if (waiting + ended < static_cast<int>(threads.size())) fault = "threads wait for each other";
  if (waiting > 0 && ended > 0) fault = "a barrier is not reached by threads that have ended";
  if (!fault.empty()) {
    fault = kernel_name + ", line " + std::to_string(line) + ": " + fault;
    return;
  }
  ++running.epoch;
  for (Thread& thread : threads) thread.state = State::kReady;
}

// Whether a warp was released.
bool release_exchanges() {
  bool any = false;
  const int count = static_cast<int>(threads.size());
  for (int first = 0; first < count; first += kWarp) {
    const int last = std::min(first + kWarp, count);
    bool all = true;
    for (int i = first; i < last; ++i) {
      all = all && threads[i].state == State::kExchange && threads[i].orders == threads[first].orders;
    }
    if (!all) continue;
    for (int i = first; i < last; ++i) {
      gathered[i / kWarp][i - first] = threads[i].bits;
      threads[i].state = State::kReady;
    }
    running.syncs[first / kWarp] += threads[first].orders;
    any = true;
  }
  return any;
}

std::vector<int> numbers_in_order(int count) {
  std::vector<int> numbers(count);
  for (int i = 0; i < count; ++i) numbers[i] = order == 1 ? count - 1 - i : i;
  if (order > 1) {
    std::mt19937 random(static_cast<unsigned>(order + running.block));
    std::shuffle(numbers.begin(), numbers.end(), random);
  }
  return numbers;
}

void run_block(int count) {
  const int warps = (count + kWarp - 1) / kWarp;
  threads.clear();
  threads.resize(count);
  gathered.resize(warps);
  running.epoch = 0;
  running.syncs.assign(warps, 0);
  std::fill(running.shared.begin(), running.shared.end(), char(0xff));
  if (tracing) begin_block(count);
  const std::vector<int> numbers = numbers_in_order(count);
  while (fault.empty()) {
    bool ended = true;
    for (const int number : numbers) {
      if (threads[number].state == State::kReady) resume(number);
      ended = ended && threads[number].state == State::kDone;
      if (!fault.empty()) return;
      if (tracing && (number % kWarp == kWarp - 1 || number == count - 1)) merge_warp();
    }
    if (ended) break;
    if (!release_exchanges()) release_barrier();
  }
}

}  // namespace

Running running;

void stop(int thread, const char* what) {
  std::ostringstream text;
  text << kernel_name << ", block " << running.block << ", thread " << thread << ": " << what;
  if (fault.empty()) fault = text.str();
  _longjmp(scheduler, 1);
}

bool of_the_thread(int thread, uintptr_t address) {
  const auto stack = reinterpret_cast<uintptr_t>(threads[thread].fiber->stack.get());
  for (const dim3* one : {&threadIdx, &blockIdx, &blockDim, &gridDim}) {
    const auto first = reinterpret_cast<uintptr_t>(one);
    if (address >= first && address < first + sizeof(dim3)) return true;
  }
  return (address >= stack && address < stack + kStack) ||
      (address >= host_stack && address < host_stack + kHostStack);
}

int thread_order() {
  return static_cast<int>(order);
}

int& guards() {
  return guard_count;
}

void note_check() {
  unchecked = false;
}

UNSEEN void barrier(int line) {
  threads[running.thread].line = line;
  yield(State::kBarrier);
}

UNSEEN Lanes exchange(uint64_t bits, bool orders) {
  const int self = running.thread, count = static_cast<int>(threads.size());
  threads[self].bits = bits;
  threads[self].orders = orders;
  yield(State::kExchange);
  return {gathered[self / kWarp].data(), self % kWarp,
          std::min(kWarp, count - self / kWarp * kWarp)};
}

UNSEEN void* dynamic_shared() {
  return running.shared.data();
}

UNSEEN void note_atomic(const void* address, size_t size) {
  seen(
      reinterpret_cast<uintptr_t>(address), size, Access::kAtomic,
      reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
}

void Launch::run(void (*thread)(void*), void* state) const {
  const Kernel& found = kernel_at(function);
  const std::string& kernel = found.name;
  const auto limits = [&](const dim3& size) { return int64_t(size.x) * size.y * size.z; };
  TORCH_CHECK(running.thread < 0, kernel, ": a launch inside of a kernel");
  TORCH_CHECK(guard_count > 0, kernel, ": no device guard");
  TORCH_CHECK(stream.current, kernel, ": not on the current stream");
  TORCH_CHECK(!unchecked, kernel, ": the launch before was not checked");
  TORCH_CHECK(
      limits(grid) > 0 && grid.x <= 0x7fffffffu && grid.y <= kMaxGridYZ && grid.z <= kMaxGridYZ,
      kernel, ": a grid of ", grid.x, " x ", grid.y, " x ", grid.z);
  TORCH_CHECK(limits(block) > 0 && limits(block) <= kMaxThreads, kernel, ": a block of that size");
  TORCH_CHECK(
      found.shared_bytes + shared_bytes <= kSharedLimit, kernel, ": ", found.shared_bytes, " + ",
      shared_bytes, " bytes of shared memory");
  unchecked = true;
  kernel_name = kernel;
  gridDim = grid;
  blockDim = block;
  body = thread;
  body_state = state;
  host_stack = reinterpret_cast<uintptr_t>(&limits);
  running.shared.assign(shared_bytes, 0);
  fault.clear();
  ++running.launch;
  running.block = 0;
  if (tracing) {
    begin_launch(
        kernel, limits(grid), static_cast<int>(limits(block)), found.shared_bytes + shared_bytes);
  }
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x && fault.empty(); ++blockIdx.x) {
        run_block(static_cast<int>(limits(block)));
        ++running.block;
      }
    }
  }
  threads.clear();
  running.thread = -1;
  if (!fault.empty()) {  // the stacks of its threads are lost
    unchecked = false;
    idle.clear();
    fibers.clear();
    TORCH_CHECK(false, fault);
  }
}

const bool prepared = [] {
  if (const char* given = std::getenv("EMULATION_ORDER")) order = std::atoi(given);
  return true;
}();

TORCH_LIBRARY_FRAGMENT(d2ext_emulation, library) {
  library.def("launches() -> int", [] { return static_cast<int64_t>(running.launch); });
}

}  // namespace emulation
