"""The traffic that the emulation counts, on kernels whose traffic can be told by hand."""

import json
import shutil
import sys

import pytest

from tests.ops.emulation.build import COMPILER, folder

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which(COMPILER[0]) is None,
    reason="needs g++ on Linux",
)
# A kernel per number, one block each.
_KERNELS = r"""
#include <torch/library.h>
#include "common.cuh"
namespace d2ext {
namespace {
__global__ void copy(const float* from, float* to) { to[threadIdx.x] = from[threadIdx.x]; }
__global__ void strided(const float* from, float* to) { to[threadIdx.x] = from[8 * threadIdx.x]; }
__global__ void wide(const float* from, float* to) {
  reinterpret_cast<float4*>(to)[threadIdx.x] = reinterpret_cast<const float4*>(from)[threadIdx.x];
}
__global__ void uneven(const float* from, float* to) {
  float sum = 0.0f;
  for (int k = 0; k <= static_cast<int>(threadIdx.x) % 4; ++k) sum += from[k];
  if (threadIdx.x % 2 == 0) sum += from[64 + threadIdx.x];
  to[threadIdx.x] = sum;
}
__global__ void banks(const float* from, float* to) {
  __shared__ float values[128];
  values[4 * threadIdx.x] = 1.0f;
  __syncthreads();
  to[threadIdx.x] = values[0] + values[threadIdx.x / 2 * 4];
}
__global__ void additions(const float* from, float* to) {
  atomicAdd(to + threadIdx.x % 16, 1.0f);
}
__global__ void again(const float* from, float* to) { to[threadIdx.x] = from[threadIdx.x]; }
__global__ void sweep(const float* from, float* to) {  // 16 MiB, one store a sector
  for (int i = threadIdx.x; i < 524288; i += 32) to[8 * i] = 0.0f;
}
__global__ void late(const float* from, float* to) { to[threadIdx.x] = from[threadIdx.x]; }
void run(const at::Tensor& from, const at::Tensor& to, int64_t threads, int64_t number) {
  const c10::cuda::CUDAGuard guard(from.device());
  void (*const kernels[])(const float*, float*) = {
      copy, strided, wide, uneven, banks, additions, again, sweep, late};
  const auto kernel = kernels[number];
  kernel<<<1, static_cast<unsigned>(threads), 0, c10::cuda::getCurrentCUDAStream()>>>(
      from.const_data_ptr<float>(), to.mutable_data_ptr<float>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}
TORCH_LIBRARY_FRAGMENT(d2ext_probe, library) { library.def("run", &run); }
}  // namespace
}  // namespace d2ext
"""
_RUN = """
import sys
import torch
torch.ops.load_library(sys.argv[1])
torch.ops.d2ext_emulation.trace(True)
# Sectors are aligned like caching allocators of GPUs align them.
def aligned(count):
    kept = torch.zeros(count + 16)
    return kept[-kept.data_ptr() // 4 % 16:][:count]
tensors = [(aligned(256), aligned(256)) for number in range(6)]
tensors += [tensors[0], (tensors[0][0], aligned(2**22)), tensors[0]]
for number, (read, written) in enumerate(tensors):
    torch.ops.d2ext_probe.run(read, written, 64 if number == 0 else 32, number)
print(torch.ops.d2ext_emulation.traffic())
"""


@pytest.fixture(scope="module")
def counts(run_python):
    """Counts of every kernel, by its name."""

    def change(file, source):
        return _KERNELS if file == "mask_vote.cu" else source

    library = folder(change, "traffic") / "d2ext/_C.abi3.so"
    process = run_python("-W", "ignore", "-c", _RUN, str(library))
    assert process.returncode == 0, process.stderr
    return {launch["kernel"]: launch for launch in json.loads(process.stdout)}


def of(requests):
    return tuple(requests[key] for key in ("requests", "lanes", "bytes", "sectors", "lines"))


def test_neighbours_share_sectors_and_lines(counts):
    assert of(counts["copy"]["read"]) == of(counts["copy"]["write"]) == (2, 64, 256, 8, 2)


def test_a_stride_takes_a_sector_for_every_lane(counts):
    assert of(counts["strided"]["read"]) == (1, 32, 128, 32, 8)
    assert of(counts["strided"]["write"]) == (1, 32, 128, 4, 1)


def test_a_wide_load_is_one_request(counts):
    assert of(counts["wide"]["read"]) == (1, 32, 512, 16, 4)


def test_lanes_of_uneven_loops_and_of_a_branch_meet_again(counts):
    # 32 + 24 + 16 + 8 lanes of the loop, then 16 lanes of the branch, then all of them
    assert of(counts["uneven"]["read"]) == (5, 96, 384, 8, 5)
    assert of(counts["uneven"]["write"]) == (1, 32, 128, 4, 1)


def test_what_is_read_again_is_in_the_cache(counts):
    assert counts["uneven"]["read"]["missed"] == 1 + 4
    assert counts["uneven"]["write"]["missed"] == 4


def test_words_of_one_bank_wait_for_each_other_and_a_word_is_read_once_by_all(counts):
    # a store with 4 words a bank, a broadcast, and a load of 16 words, 2 a bank
    launch = counts["banks"]
    assert (launch["shared_requests"], launch["waves"], launch["least_waves"]) == (3, 4 + 1 + 2, 3)
    assert launch["shared_bytes"] == 512


def test_atomic_additions_are_counted_by_sector(counts):
    assert of(counts["additions"]["atomic"]) == (1, 32, 128, 2, 1)
    assert counts["additions"]["read"]["requests"] == counts["additions"]["write"]["requests"] == 0


def test_memory_is_read_where_the_second_cache_has_nothing(counts):
    fetched = {name: launch["read"]["fetched"] for name, launch in counts.items()}
    assert fetched["copy"] == 8 and counts["again"]["read"]["missed"] == 4 and fetched["again"] == 0
    assert fetched["late"] == 4  # all of it had to go for what `sweep` wrote
    assert counts["additions"]["atomic"]["fetched"] == 2
    assert all(launch["write"]["fetched"] == 0 for launch in counts.values())


def test_what_is_written_is_written_back_once_by_who_wrote_it_last(counts):
    written = {name: launch["written_back"] for name, launch in counts.items()}
    assert written["copy"] + written["again"] == 8 and written["again"] == 4
    assert (written["sweep"], written["additions"], written["late"]) == (524288, 2, 4)
