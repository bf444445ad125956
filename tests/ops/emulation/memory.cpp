// Memory that is known by its address, and the record of who touched which byte.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <dlfcn.h>
#include <link.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <sstream>

#include "machine.h"

namespace emulation {
namespace {

constexpr size_t kAlignment = 512;  // what CUDA's allocator keeps to

// Who touched a byte last. `launch` tells whether the rest is of this launch.
struct Touch {
  uint32_t launch = 0, block = 0;
  int epoch = 0;
  int16_t thread = 0;  // -1: of several warps, -2 - w: several of warp w
  uint16_t sync = 0;   // of the thread's warp

  int warp() const { return thread >= 0 ? thread / kWarp : -2 - thread; }
};
struct Byte {
  Touch write, atomic, read;
};

struct Memory {
  size_t size = 0;
  std::vector<Byte> bytes;  // made at the first access
};

std::mutex mutex;  // of `memories`
std::map<uintptr_t, Memory> memories;
std::vector<std::pair<uintptr_t, Memory>> own_data;  // of this library: static shared memory
std::vector<Byte> dynamic_bytes;

struct Known : c10::Allocator {
  static void remove(void* pointer) {
    if (pointer == nullptr) return;
    std::lock_guard<std::mutex> lock(mutex);
    memories.erase(reinterpret_cast<uintptr_t>(pointer));
    std::free(pointer);
  }
  c10::DataPtr allocate(size_t size) override {
    void* pointer = nullptr;
    if (size > 0) {
      if (posix_memalign(&pointer, kAlignment, size) != 0) throw std::bad_alloc();
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
    if (part.p_type == PT_LOAD) {
      own_data.emplace_back(info->dlpi_addr + part.p_vaddr, Memory{part.p_memsz, {}});
    }
  }
  return 1;
}

const bool prepared = [] {
  c10::SetCPUAllocator(&known, 200);
  dl_iterate_phdr(find_own_data, reinterpret_cast<void*>(&find_own_data));
  return true;
}();

std::string name_of(uintptr_t instruction) {
  Dl_info info;
  std::ostringstream text;
  if (dladdr(reinterpret_cast<void*>(instruction), &info) && info.dli_fbase) {
    text << "+" << std::hex << instruction - reinterpret_cast<uintptr_t>(info.dli_fbase);
  }
  return text.str();
}

bool meets(const Touch& touch, int thread, bool in_block) {
  if (touch.launch != running.launch) return false;
  if (touch.block != running.block) return !in_block;
  if (touch.thread == thread || touch.epoch != running.epoch) return false;
  return touch.warp() != thread / kWarp || touch.sync == running.syncs[thread / kWarp];
}

void watch(Byte& byte, Access access, int thread, bool in_block) {
  const bool race = meets(byte.write, thread, in_block) ||
      (access != Access::kRead && meets(byte.read, thread, in_block)) ||
      (access != Access::kAtomic && meets(byte.atomic, thread, in_block));
  if (race) stop(thread, "two threads touch one byte with no barrier between them");
  Touch& touch =
      access == Access::kRead ? byte.read : access == Access::kWrite ? byte.write : byte.atomic;
  int by = thread;
  if (meets(touch, thread, true)) by = touch.warp() == thread / kWarp ? -2 - thread / kWarp : -1;
  touch = {running.launch, running.block, running.epoch, static_cast<int16_t>(by),
           running.syncs[thread / kWarp]};
}

void watch(Memory& memory, size_t first, size_t size, Access access, int thread, bool in_block) {
  if (tracing) return;
  if (memory.bytes.empty()) memory.bytes.resize(memory.size);
  for (size_t i = first; i < first + size; ++i) watch(memory.bytes[i], access, thread, in_block);
}

Space record(uintptr_t address, size_t size, Access access, uintptr_t instruction, int self) {
  const auto dynamic = reinterpret_cast<uintptr_t>(running.shared.data());
  if (address >= dynamic && address + size <= dynamic + running.shared.size()) {
    if (dynamic_bytes.size() < running.shared.size()) dynamic_bytes.resize(running.shared.size());
    for (size_t i = 0; i < size && !tracing; ++i) {
      watch(dynamic_bytes[address - dynamic + i], access, self, true);
    }
    return Space::kShared;
  }
  for (auto& [first, memory] : own_data) {
    if (address < first || address + size > first + memory.size) continue;
    watch(memory, address - first, size, access, self, true);
    return Space::kShared;
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
  watch(found->second, address - found->first, size, access, self, false);
  return Space::kGlobal;
}

}  // namespace

UNSEEN void seen(uintptr_t address, size_t size, Access access, uintptr_t instruction) {
  if (running.thread < 0) return;
  const int self = running.thread;
  running.thread = -1;  // what the record touches itself is not the kernel's
  if (!of_the_thread(self, address)) {
    const Space space = record(address, size, access, instruction, self);
    if (tracing) trace_access(self, address, size, access, space, instruction);
  }
  running.thread = self;
}

}  // namespace emulation
