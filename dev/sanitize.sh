#!/usr/bin/env bash
# Build the CPU kernels with AddressSanitizer and UBSan in build/sanitize and run the operator tests on
# them. Usage: dev/sanitize.sh [python] [pytest arguments]. Any finding ends the run with an error.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${1:-python}") || { echo "sanitize: no such python: ${1:-python}" >&2; exit 1; }
shift || true
work=build/sanitize
mkdir -p "$work"
rm -rf "$work/d2ext" "$work/tests"
cp -r d2ext setup.py pyproject.toml "$work/"
rm -f "$work"/d2ext/_C*.so
mkdir -p "$work/tests"
cp -r tests/ops tests/vectors "$work/tests/"
cd "$work"

flags="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -O1 -g"
# one instruction set: the loader picks among several before the sanitizer is ready
FORCE_CUDA=0 CXX="${CXX:-g++}" D2EXT_CXXFLAGS="$flags -DD2EXT_NO_CLONES" \
  D2EXT_LDFLAGS="-fsanitize=address,undefined" "$python" setup.py -q build_ext --inplace

preload="$(${CXX:-g++} -print-file-name=libasan.so):$(${CXX:-g++} -print-file-name=libubsan.so)"
# PyTorch and Python keep memory for good, so leaks are not looked for; containers are annotated only in
# our own code, so the check of their overflow would blame PyTorch
export ASAN_OPTIONS="detect_leaks=0:detect_container_overflow=0:verify_asan_link_order=0"
export UBSAN_OPTIONS="print_stacktrace=1" PYTHONPATH="$PWD" OMP_NUM_THREADS=2 D2EXT_TEST_THREADS=2
unset D2EXT_DISABLE_EXT
LD_PRELOAD="$preload" "$python" -c 'from d2ext import ops; assert ops.has_native()'
# tracing and compiling exercise PyTorch, not the kernels; subprocesses have their own tests
LD_PRELOAD="$preload" "$python" -m pytest tests/ops -p no:cacheprovider \
  -k "not opcheck and not compiles and not symbolic and not command and not survive and not never_held and not build and not loading and not emulated" "$@"
echo "sanitize: clean"
