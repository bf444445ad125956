// What the files of the machine share.
#pragma once

#include <cstddef>
#include <cstdint>

#define UNSEEN __attribute__((no_sanitize("thread")))

namespace emulation {

enum class Access { kRead, kWrite, kAtomic };

// An access of the running thread, nothing outside of kernels; `instruction` is where it stands.
void seen(uintptr_t address, size_t size, Access access, uintptr_t instruction);

}  // namespace emulation
