// Counts what the kernels move: on request (`d2ext_emulation::trace`), and then races are not looked for.
//
// The threads of a warp run one after the other, each writing down the basic blocks it enters and its
// accesses. `merge_warp` then lets the 32 traces run side by side, as a GPU does: of the places where
// lanes stand, the first in the code goes next, with all lanes that stand there. Lanes that have left a
// branch or a loop so wait for the others where the branches meet. A place is an address in the code, and
// that of the calls leading to it.
//
// Limits: instructions are those of g++ -O1, not nvcc's, which may load once what is loaded twice here,
// or keep it in a register; where branches meet late in the code, lanes may run apart longer than on a
// GPU. Copies of a struct without a vector type's alignment count as accesses of 4 bytes each.
// The L1 is one of 128 KiB for every block alone, least recently used first to go, of 32-byte sectors;
// reads fill it, stores and atomic additions go through it. The L2 is one of 12 MiB for all launches of
// a trace, empty at first: a quarter of an H100's, as what is traced has a quarter of the channels or
// less. It keeps what is written until it has to go; what is left at the end is written back too.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <list>
#include <map>
#include <sstream>
#include <unordered_map>

#include "machine.h"

namespace emulation {

bool tracing = false;

namespace {

constexpr uintptr_t kSector = 32, kLine = 128, kBank = 4, kBanks = 32;
constexpr size_t kL1Sectors = 128 * 1024 / kSector, kL2Sectors = 12 * 1024 * 1024 / kSector;
constexpr size_t kWidest = 16;  // of one access

// ------------------------------------------------------------------ traces
struct Event {
  uintptr_t place, address;  // address 0: a basic block begins
  int path;                  // calls that led here
  uint8_t size;
  Access access;
  Space space;
};

struct Path {
  int parent;
  std::vector<uintptr_t> calls;
};

std::vector<Path> paths{{-1, {}}};
std::map<std::pair<int, uintptr_t>, int> path_numbers;
std::vector<int> path_of;  // of the threads of the block
std::array<std::vector<Event>, kWarp> traces;

// Whether `a` stands before `b` in the code with all calls written out.
bool before(const Event& a, const Event& b) {
  if (a.path == b.path) return a.place < b.place;
  const auto &left = paths[a.path].calls, &right = paths[b.path].calls;
  const size_t both = std::min(left.size(), right.size());
  for (size_t i = 0; i < both; ++i) {
    if (left[i] != right[i]) return left[i] < right[i];
  }
  const uintptr_t x = left.size() > both ? left[both] : a.place;
  const uintptr_t y = right.size() > both ? right[both] : b.place;
  return x < y;
}

// ------------------------------------------------------------------ counters
struct Requests {
  int64_t requests = 0, lanes = 0, bytes = 0, sectors = 0, lines = 0, missed = 0, fetched = 0;
};

struct Counts {
  std::string kernel;
  int64_t blocks = 0, shared_bytes = 0;
  int threads = 0;
  Requests of[3];                                  // global memory, by Access
  int64_t shared_requests = 0, waves = 0, least_waves = 0;
  int64_t steps = 0, step_lanes = 0;               // basic blocks a warp entered, lanes in them
  int64_t written_back = 0;                        // sectors, from the L2 to memory
};

std::vector<Counts> launches;

// ------------------------------------------------------------------ caches
struct Cached {
  uintptr_t sector;
  int writer;  // the launch that wrote it and has to write it back, -1 for none
};

// Sectors, least recently used first to go.
class Cache {
 public:
  explicit Cache(size_t limit) : limit_(limit) {}

  // Take a sector in. Returns whether it was not there; `writer` of one that is written, else -1.
  bool misses(uintptr_t sector, int writer = -1) {
    const auto found = places_.find(sector);
    if (found != places_.end()) {
      recent_.splice(recent_.begin(), recent_, found->second);
      if (writer >= 0) recent_.front().writer = writer;
      return false;
    }
    recent_.push_front({sector, writer});
    places_[sector] = recent_.begin();
    if (places_.size() > limit_) {
      write_back(recent_.back());
      places_.erase(recent_.back().sector);
      recent_.pop_back();
    }
    return true;
  }

  void empty() {
    for (const Cached& cached : recent_) write_back(cached);
    recent_.clear();
    places_.clear();
  }

 private:
  static void write_back(const Cached& cached) {
    if (cached.writer >= 0) ++launches[cached.writer].written_back;
  }

  size_t limit_;
  std::list<Cached> recent_;
  std::unordered_map<uintptr_t, std::list<Cached>::iterator> places_;
};

Cache l1(kL1Sectors), l2(kL2Sectors);

// ------------------------------------------------------------------ one access of a warp
using Group = std::array<const Event*, kWarp>;  // null: the lane stands elsewhere

void count_global(const Group& group, const Event& first, Counts& counts) {
  Requests& to = counts.of[static_cast<int>(first.access)];
  std::vector<uintptr_t> sectors;
  for (const Event* event : group) {
    if (event == nullptr) continue;
    ++to.lanes;
    to.bytes += event->size;
    const uintptr_t last = (event->address + event->size - 1) / kSector;
    for (uintptr_t sector = event->address / kSector; sector <= last; ++sector) {
      sectors.push_back(sector);
    }
  }
  std::sort(sectors.begin(), sectors.end());
  sectors.erase(std::unique(sectors.begin(), sectors.end()), sectors.end());
  ++to.requests;
  to.sectors += static_cast<int64_t>(sectors.size());
  uintptr_t line = 0;
  for (const uintptr_t sector : sectors) {
    if (sector / (kLine / kSector) != line) ++to.lines;
    line = sector / (kLine / kSector);
    if (first.access == Access::kRead && !l1.misses(sector)) continue;
    ++to.missed;
    const int writer = first.access == Access::kRead ? -1 : static_cast<int>(launches.size()) - 1;
    // A store needs nothing of what was there, an addition does.
    if (l2.misses(sector, writer) && first.access != Access::kWrite) ++to.fetched;
  }
}

// Ways of the worst bank. Wide accesses are served for half or a quarter of the warp at a time.
void count_shared(const Group& group, const Event& first, Counts& counts) {
  ++counts.shared_requests;
  const int phases = std::max<int>(1, first.size / kBank), lanes = kWarp / phases;
  for (int phase = 0; phase < phases; ++phase) {
    std::array<std::vector<uintptr_t>, kBanks> words;
    size_t ways = 0;
    for (int lane = phase * lanes; lane < (phase + 1) * lanes; ++lane) {
      if (group[lane] == nullptr) continue;
      const uintptr_t last = (group[lane]->address + group[lane]->size - 1) / kBank;
      for (uintptr_t word = group[lane]->address / kBank; word <= last; ++word) {
        auto& bank = words[word % kBanks];
        const bool known = std::find(bank.begin(), bank.end(), word) != bank.end();
        if (!known || first.access == Access::kAtomic) bank.push_back(word);
        ways = std::max(ways, bank.size());
      }
    }
    counts.waves += static_cast<int64_t>(ways);
    counts.least_waves += ways > 0;
  }
}

}  // namespace

void begin_launch(const std::string& kernel, int64_t blocks, int threads, size_t shared_bytes) {
  launches.emplace_back();
  launches.back().kernel = kernel;
  launches.back().blocks = blocks;
  launches.back().threads = threads;
  launches.back().shared_bytes = static_cast<int64_t>(shared_bytes);
}

void begin_block(int threads) {
  path_of.assign(threads, 0);
  l1.empty();
  for (auto& trace : traces) trace.clear();
}

UNSEEN void trace_block(uintptr_t instruction) {
  if (running.thread < 0) return;
  const int self = running.thread;
  running.thread = -1;
  traces[self % kWarp].push_back(
      {instruction, 0, path_of[self], 0, Access::kRead, Space::kGlobal});
  running.thread = self;
}

UNSEEN void trace_call(uintptr_t from) {
  if (running.thread < 0) return;
  const int self = running.thread;
  running.thread = -1;
  const auto [found, fresh] =
      path_numbers.try_emplace({path_of[self], from}, static_cast<int>(paths.size()));
  if (fresh) {
    Path path{path_of[self], paths[path_of[self]].calls};
    path.calls.push_back(from);
    paths.push_back(path);
  }
  path_of[self] = found->second;
  running.thread = self;
}

UNSEEN void trace_return() {
  if (running.thread < 0) return;
  path_of[running.thread] = paths[path_of[running.thread]].parent;
}

void trace_access(
    int thread, uintptr_t address, size_t size, Access access, Space space,
    uintptr_t instruction) {
  const size_t part = size > kWidest ? kBank : size;
  for (size_t at = 0; at < size; at += part) {
    traces[thread % kWarp].push_back(
        {instruction, address + at, path_of[thread],
         static_cast<uint8_t>(std::min(part, size - at)), access, space});
  }
}

void merge_warp() {
  std::array<size_t, kWarp> at{};
  Counts& counts = launches.back();
  while (true) {
    const Event* least = nullptr;
    for (int lane = 0; lane < kWarp; ++lane) {
      if (at[lane] == traces[lane].size()) continue;
      const Event& event = traces[lane][at[lane]];
      if (least == nullptr || before(event, *least)) least = &event;
    }
    if (least == nullptr) break;
    Group group{};
    int lanes = 0;
    for (int lane = 0; lane < kWarp; ++lane) {
      if (at[lane] == traces[lane].size()) continue;
      const Event& event = traces[lane][at[lane]];
      if (event.place != least->place || event.path != least->path) continue;
      group[lane] = &event;
      ++lanes;
      ++at[lane];
    }
    if (least->address == 0) {
      ++counts.steps;
      counts.step_lanes += lanes;
    } else if (least->space == Space::kShared) {
      count_shared(group, *least, counts);
    } else {
      count_global(group, *least, counts);
    }
  }
  for (auto& trace : traces) trace.clear();
}

namespace {

void trace(bool on) {
  TORCH_CHECK(!on || thread_order() == 0, "traces need the threads in ascending order");
  if (on) {
    l2.empty();
    launches.clear();
  }
  tracing = on;
}

std::string traffic() {
  std::ostringstream text;
  l2.empty();
  for (const Counts& counts : launches) {
    text << (&counts == launches.data() ? "[" : ",\n ") << "{\"kernel\": \"" << counts.kernel
         << "\", \"blocks\": " << counts.blocks << ", \"threads\": " << counts.threads
         << ", \"shared_bytes\": " << counts.shared_bytes << ", \"steps\": " << counts.steps
         << ", \"step_lanes\": " << counts.step_lanes
         << ", \"shared_requests\": " << counts.shared_requests << ", \"waves\": " << counts.waves
         << ", \"least_waves\": " << counts.least_waves
         << ", \"written_back\": " << counts.written_back;
    const char* names[] = {"read", "write", "atomic"};
    for (int i = 0; i < 3; ++i) {
      const Requests& of = counts.of[i];
      text << ", \"" << names[i] << "\": {\"requests\": " << of.requests << ", \"lanes\": "
           << of.lanes << ", \"bytes\": " << of.bytes << ", \"sectors\": " << of.sectors
           << ", \"lines\": " << of.lines << ", \"missed\": " << of.missed
           << ", \"fetched\": " << of.fetched << "}";
    }
    text << "}";
  }
  return launches.empty() ? "[]" : text.str() + "]";
}

TORCH_LIBRARY_FRAGMENT(d2ext_emulation, library) {
  library.def("trace(bool on) -> ()", &trace);
  library.def("traffic() -> str", &traffic);
}

}  // namespace
}  // namespace emulation
