#!/usr/bin/env bash
# Build the extension with CUDA, run the operator tests on the GPU and benchmark it, in one go.
#
#   dev/check_cuda.sh [--python PYTHON] [--wheels FOLDER] [--no-benchmark] [--emulated]
#
# With --emulated the CUDA kernels that tests/ops/emulation compiles for the CPU stand in for the GPU, with
# few tests and small sizes: a rehearsal of this script, which writes build/cuda/ops_emulated.md.
# Needs nvcc, a GPU and a Python with torch for CUDA. What else is missing (pytest, torchvision, ...) is
# installed from FOLDER alone, into build/cuda/site; nothing is fetched from a network.
# Writes docs/benchmarks/ops_<gpu>.md; what of it misses a gate is said there and no error here, as the
# gates of GPUs were counted and not measured. Without detectron2 its implementations are not timed.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD python=python wheels="" benchmark=1 emulated=0
while [ $# -gt 0 ]; do
  case $1 in
    --python) python=$2; shift 2 ;;
    --wheels) wheels=$(cd "$2" && pwd); shift 2 ;;
    --no-benchmark) benchmark=0; shift ;;
    --emulated) emulated=1; shift ;;
    *) echo "check_cuda: unknown argument $1" >&2; exit 2 ;;
  esac
done
fail() { echo "check_cuda: $1" >&2; exit 1; }
python=$(command -v "$python") || fail "no such python"
case $python in /*) ;; *) python=$root/$python ;; esac
"$python" -c 'import torch' 2>/dev/null || fail "$python has no torch"
[ "$emulated" = 1 ] || "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || fail "torch sees no GPU"

work=$root/build/cuda
mkdir -p "$work/site"
export PYTHONPATH="$work:$work/site${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "$wheels" ]; then
  for wheel in "$wheels"/*.whl; do
    name=$(basename "$wheel" | cut -d- -f1)
    # never a second torch: the extension is built for the one that is here
    case $name in torch|nvidia_*|triton) continue ;; esac
    "$python" -c "import importlib.metadata as m; m.version('$name')" 2>/dev/null ||
      "$python" -m pip install -q --no-index --no-deps --target "$work/site" "$wheel"
  done
fi
for module in pytest numpy torchvision cv2 setuptools; do
  "$python" -c "import $module" 2>/dev/null || fail "$module is missing: put its wheel into the folder of --wheels"
done

# a copy, so that the checkout keeps the extension it has
rm -rf "$work/d2ext" "$work/tests" "$work/dev"
cp -r d2ext setup.py pyproject.toml "$work/"
mkdir -p "$work/tests"
cp -r tests/ops tests/vectors "$work/tests/"
cp -r dev "$work/"
rm -f "$work"/d2ext/_C*.so
cd "$work"
tests="tests/ops/test_cuda.py tests/ops/test_vectors_mnc.py tests/ops/test_vectors_fcis.py"
choice="" size=""
if [ "$emulated" = 1 ]; then
  export D2EXT_EMULATED=1 OMP_NUM_THREADS=1
  (cd "$root" && "$python" -m tests.ops.emulation.build) >build.log 2>&1 ||
    { tail -30 build.log; fail "the build failed"; }
  cp "$root"/build/emulation/plain/d2ext/_C.abi3.so d2ext/
  tests="tests/ops/test_cuda.py" choice="mask_resize or vectors" size="--quick --rounds 1"
else
  echo "check_cuda: building for the GPUs here"
  FORCE_CUDA=1 D2EXT_NVCCFLAGS="-Xptxas -v" \
    "$python" setup.py build_ext --inplace >build.log 2>&1 || { tail -30 build.log; fail "the build failed"; }
  if grep -E "[1-9][0-9]* bytes spill" build.log; then fail "kernels spill registers, see $work/build.log"; fi
fi
"$python" -m d2ext.ops
"$python" -m pytest $tests -k "$choice" -p no:cacheprovider
if [ "$benchmark" = 1 ]; then
  gpu=$("$python" -c 'import re, torch; print(re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name().lower()))' 2>/dev/null) ||
    gpu=emulated
  report=$root/docs/benchmarks/ops_$gpu.md
  if [ "$emulated" = 1 ]; then report=$work/ops_emulated.md; fi
  rm -f "$report"
  "$python" dev/benchmark_ops.py --device cuda --allocator default $size --output "$report" ||
    { [ -s "$report" ] && echo "check_cuda: some gates are missed"; } || fail "the benchmark broke off"
  echo "check_cuda: wrote ${report#"$root"/}"
fi
echo "check_cuda: passed"
