// The machine behind emulation.h: fibers, memory that is known by its address, and the record of who
// touched which byte.
#include "machine.h"

#include <ATen/ATen.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <dlfcn.h>
#include <link.h>
#include <setjmp.h>
#include <torch/library.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <sstream>
#include <unordered_map>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 * 1024, kHostStack = 8 * 1024 * 1024;
constexpr size_t kSharedLimit = 48 * 1024;  // what a kernel gets without asking
constexpr unsigned kMaxGridYZ = 65535, kMaxThreads = 1024;

enum class State { kReady, kBarrier, kShuffle, kDone };

// Who touched a byte last. `launch` tells whether the rest is of this launch.
struct Touch {
  int64_t block = 0;
  int thread = 0;  // -1: several
  int epoch = 0;
  uint64_t launch = 0;
};
struct Byte {
  Touch write, atomic, read;
};

struct Memory {
  size_t size = 0;
  std::vector<Byte> bytes;  // made at the first access
};

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
  int offset = 0;
};

std::mutex mutex;  // of `memories`
std::map<uintptr_t, Memory> memories;
std::vector<std::pair<uintptr_t, uintptr_t>> own_data;  // of this library: static shared memory

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Fiber*> idle;
jmp_buf scheduler;
std::vector<Thread> threads;
int running = -1;  // number in the block, -1 outside of kernels
int epoch = 0;
int64_t block_number = 0;
uint64_t launch_number = 0;
const char* kernel_name = "";
std::string fault;
std::vector<char> shared;
bool unchecked = false;
int guard_count = 0;
int64_t order = 0;  // of the threads: 0 ascending, 1 descending, more: at random
void (*body)(void*) = nullptr;
void* body_state = nullptr;
uintptr_t host_stack = 0;  // from here on, with the arguments of the kernel

UNSEEN void stop(int thread, const char* what) {
  std::ostringstream text;
  text << kernel_name << ", block " << block_number << ", thread " << thread << ": " << what;
  if (fault.empty()) fault = text.str();
  _longjmp(scheduler, 1);
}

UNSEEN void yield(State state) {
  Thread& self = threads[running];
  running = -1;
  self.state = state;
  if (_setjmp(self.fiber->jump) == 0) _longjmp(scheduler, 1);
}

UNSEEN void run_fiber() {
  while (true) {
    body(body_state);
    Thread& self = threads[running];
    running = -1;
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
      running = number;
      _longjmp(fiber->jump, 1);
    }
    fiber->started = true;
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.get();
    fiber->context.uc_stack.ss_size = kStack;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, run_fiber, 0);
    running = number;
    setcontext(&fiber->context);
  }
  Thread& back = threads[number];  // after the jump
  if (back.state == State::kDone) {
    idle.push_back(back.fiber);
    back.fiber = nullptr;
  }
  running = -1;
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
    fault = std::string(kernel_name) + ", line " + std::to_string(line) + ": " + fault;
    return;
  }
  ++epoch;
  for (Thread& thread : threads) thread.state = State::kReady;
}

// Whether a warp was released.
bool release_shuffles() {
  bool any = false;
  const int count = static_cast<int>(threads.size());
  for (int first = 0; first < count; first += kWarp) {
    const int last = std::min(first + kWarp, count);
    bool all = true;
    for (int i = first; i < last; ++i) all = all && threads[i].state == State::kShuffle;
    if (!all) continue;
    std::vector<uint64_t> values;
    for (int i = first; i < last; ++i) values.push_back(threads[i].bits);
    for (int i = first; i < last; ++i) {
      const int from = i - first + threads[i].offset;
      if (from < last - first) threads[i].bits = values[from];
      threads[i].state = State::kReady;
    }
    any = true;
  }
  return any;
}

std::vector<int> thread_order(int count) {
  std::vector<int> numbers(count);
  for (int i = 0; i < count; ++i) numbers[i] = order == 1 ? count - 1 - i : i;
  if (order > 1) {
    std::mt19937 random(static_cast<unsigned>(order + block_number));
    std::shuffle(numbers.begin(), numbers.end(), random);
  }
  return numbers;
}

std::string name_of(uintptr_t instruction) {
  Dl_info info;
  std::ostringstream text;
  text << kernel_name;
  if (dladdr(reinterpret_cast<void*>(instruction), &info) && info.dli_fbase) {
    text << " +" << std::hex << instruction - reinterpret_cast<uintptr_t>(info.dli_fbase);
  }
  return text.str();
}

void run_block(int count) {
  threads.clear();
  threads.resize(count);
  epoch = 0;
  std::fill(shared.begin(), shared.end(), char(0xff));
  const std::vector<int> numbers = thread_order(count);
  while (fault.empty()) {
    bool ended = true;
    for (const int number : numbers) {
      if (threads[number].state == State::kReady) resume(number);
      ended = ended && threads[number].state == State::kDone;
      if (!fault.empty()) return;
    }
    if (ended) break;
    if (!release_shuffles()) release_barrier();
  }
}

// -------------------------------------------------------------------------------------------- memory

struct Known : c10::Allocator {
  c10::Allocator* base = nullptr;

  static void remove(void* pointer) {
    if (pointer == nullptr) return;
    std::lock_guard<std::mutex> lock(mutex);
    memories.erase(reinterpret_cast<uintptr_t>(pointer));
    c10::free_cpu(pointer);
  }
  c10::DataPtr allocate(size_t size) override {
    void* pointer = c10::alloc_cpu(size);
    if (pointer != nullptr) {
      std::memset(pointer, 0xff, size);  // NaN, -1: nothing may depend on it
      std::lock_guard<std::mutex> lock(mutex);
      memories[reinterpret_cast<uintptr_t>(pointer)] = Memory{size, {}};
    }
    return {pointer, pointer, &remove, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &remove; }
  void copy_data(void* to, const void* from, size_t count) const override {
    std::memcpy(to, from, count);
  }
};

Known known;

int find_own_data(dl_phdr_info* info, size_t, void* anchor) {
  Dl_info self;
  dladdr(anchor, &self);
  if (info->dlpi_addr != reinterpret_cast<uintptr_t>(self.dli_fbase)) return 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& part = info->dlpi_phdr[i];
    if (part.p_type != PT_LOAD) continue;
    const uintptr_t first = info->dlpi_addr + part.p_vaddr;
    own_data.emplace_back(first, first + part.p_memsz);
  }
  return 1;
}

const bool prepared = [] {
  known.base = c10::GetCPUAllocator();
  c10::SetCPUAllocator(&known, 200);
  if (const char* given = std::getenv("EMULATION_ORDER")) order = std::atoi(given);
  dl_iterate_phdr(find_own_data, reinterpret_cast<void*>(&find_own_data));
  return true;
}();

// Static shared memory: of this block alone.
std::unordered_map<uintptr_t, Byte> shared_bytes;

UNSEEN bool meets(const Touch& touch, int thread, bool in_block) {
  if (touch.launch != launch_number) return false;
  if (touch.block != block_number) return !in_block;
  return touch.thread != thread && touch.epoch == epoch;
}

UNSEEN void watch(Byte& byte, Access access, int thread, bool in_block) {
  const bool race = meets(byte.write, thread, in_block) ||
      (access != Access::kRead && meets(byte.read, thread, in_block)) ||
      (access != Access::kAtomic && meets(byte.atomic, thread, in_block));
  if (race) stop(thread, "two threads touch one byte with no barrier between them");
  Touch& touch =
      access == Access::kRead ? byte.read : access == Access::kWrite ? byte.write : byte.atomic;
  const bool several = touch.launch == launch_number && touch.block == block_number &&
      touch.epoch == epoch && touch.thread != thread;
  touch = {block_number, several ? -1 : thread, epoch, launch_number};
}

UNSEEN void record(
    uintptr_t address, size_t size, Access access, uintptr_t instruction, int self) {
  const auto dynamic = reinterpret_cast<uintptr_t>(shared.data());
  bool inside = address >= dynamic && address + size <= dynamic + shared.size();
  for (const auto& [first, last] : own_data) inside = inside || (address >= first && address < last);
  if (inside) {
    for (size_t i = 0; i < size; ++i) {
      watch(shared_bytes[address + i], access, self, true);
    }
    return;
  }
  auto found = memories.upper_bound(address);
  if (found == memories.begin() ||
      address + size > std::prev(found)->first + std::prev(found)->second.size) {
    static char text[160];
    std::snprintf(
        text, sizeof text, "%s of %zu bytes at %p, outside of all tensors, at %s",
        access == Access::kRead ? "a read" : "a write", size, reinterpret_cast<void*>(address),
        name_of(instruction).c_str());
    stop(self, text);
  }
  --found;
  Memory& memory = found->second;
  if (memory.bytes.empty()) memory.bytes.resize(memory.size);
  for (size_t i = 0; i < size; ++i) {
    watch(memory.bytes[address - found->first + i], access, self, false);
  }
}

}  // namespace

UNSEEN void seen(uintptr_t address, size_t size, Access access, uintptr_t instruction) {
  if (running < 0) return;
  const int self = running;
  running = -1;  // what the record touches itself is not the kernel's
  const auto stack = reinterpret_cast<uintptr_t>(threads[self].fiber->stack.get());
  const bool own = (address >= stack && address < stack + kStack) ||
      (address >= host_stack && address < host_stack + kHostStack);
  if (!own) record(address, size, access, instruction, self);
  running = self;
}

int& guards() {
  return guard_count;
}

void note_check() {
  unchecked = false;
}

UNSEEN void barrier(int line) {
  threads[running].line = line;
  yield(State::kBarrier);
}

UNSEEN uint64_t shuffle_down(uint64_t bits, int offset) {
  const int self = running;
  threads[self].bits = bits;
  threads[self].offset = offset;
  yield(State::kShuffle);
  return threads[self].bits;
}

UNSEEN void* dynamic_shared() {
  return shared.data();
}

UNSEEN void note_atomic(const void* address, size_t size) {
  seen(
      reinterpret_cast<uintptr_t>(address), size, Access::kAtomic,
      reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
}

void Launch::run(void (*thread)(void*), void* state) const {
  const auto limits = [&](const dim3& size) { return int64_t(size.x) * size.y * size.z; };
  TORCH_CHECK(running < 0, kernel, ": a launch inside of a kernel");
  TORCH_CHECK(guard_count > 0, kernel, ": no device guard");
  TORCH_CHECK(stream.current, kernel, ": not on the current stream");
  TORCH_CHECK(!unchecked, kernel, ": the launch before was not checked");
  TORCH_CHECK(
      limits(grid) > 0 && grid.x <= 0x7fffffffu && grid.y <= kMaxGridYZ && grid.z <= kMaxGridYZ,
      kernel, ": a grid of ", grid.x, " x ", grid.y, " x ", grid.z);
  TORCH_CHECK(limits(block) > 0 && limits(block) <= kMaxThreads, kernel, ": a block of that size");
  TORCH_CHECK(shared_bytes <= kSharedLimit, kernel, ": ", shared_bytes, " bytes of shared memory");
  unchecked = true;
  kernel_name = kernel;
  gridDim = grid;
  blockDim = block;
  body = thread;
  body_state = state;
  host_stack = reinterpret_cast<uintptr_t>(&limits);
  shared.assign(shared_bytes, 0);
  fault.clear();
  ++launch_number;
  block_number = 0;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x && fault.empty(); ++blockIdx.x) {
        emulation::shared_bytes.clear();
        run_block(static_cast<int>(limits(block)));
        ++block_number;
      }
    }
  }
  threads.clear();
  running = -1;
  if (!fault.empty()) {  // the stacks of its threads are lost
    unchecked = false;
    idle.clear();
    fibers.clear();
    TORCH_CHECK(false, fault);
  }
}

TORCH_LIBRARY(d2ext_emulation, library) {
  library.def("launches() -> int", [] { return static_cast<int64_t>(launch_number); });
}

}  // namespace emulation
