"""The sampling rules in C++: products stay rounded where the compiler may fuse them with a sum."""

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

HEADER = Path(__file__).resolve().parents[2] / "d2ext/csrc/geometry.h"
# Compiled with the header in front. `plain` is what the compiler makes of the same expression.
SOURCE = """
#define LOOP for (int i = 0; i < n; ++i)
template <class T> void both(const T* a, const T* b, const T* c, T* kept, T* plain, int n) {
  LOOP kept[i] = d2ext::rounded_product(a[i], b[i]) + c[i];
  LOOP plain[i] = a[i] * b[i] + c[i];
}
extern "C" void both_float(
    const float* a, const float* b, const float* c, float* k, float* p, int n) {
  both(a, b, c, k, p, n);
}
extern "C" void both_double(
    const double* a, const double* b, const double* c, double* k, double* p, int n) {
  both(a, b, c, k, p, n);
}
"""


def target():
    """Flags with which the compiler may fuse, or None where this machine cannot."""
    if platform.machine() == "aarch64":
        return []
    info = Path("/proc/cpuinfo")
    fuses = info.exists() and {"fma", "avx2"} <= set(info.read_text().split())
    return ["-march=x86-64-v3"] if fuses else None


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.skipif(target() is None, reason="needs a processor with fused multiply-add")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_rounded_product_is_not_fused_with_the_sum_after_it(tmp_path, dtype):
    source, library = tmp_path / "both.cpp", tmp_path / "both.so"
    source.write_text(f'#include "{HEADER}"\n{SOURCE}')
    flags = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", *target()]
    command = ["g++", *flags, "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True)
    random = np.random.default_rng(0)
    a, b = random.standard_normal((2, 4096)).astype(dtype)
    c = -(a * b).astype(dtype)  # what is left is the rounding error of the product
    kept, plain = np.empty_like(a), np.empty_like(a)
    kind = ctypes.c_float if dtype == np.float32 else ctypes.c_double
    pointers = [x.ctypes.data_as(ctypes.POINTER(kind)) for x in (a, b, c, kept, plain)]
    function = getattr(ctypes.CDLL(str(library)), f"both_{kind.__name__[2:]}")
    function(*pointers, len(a))
    assert np.array_equal(kept, np.zeros_like(a))
    assert np.count_nonzero(plain) > len(a) / 2, "the compiler fuses nothing: the test says nothing"
