#!/usr/bin/env bash
# Build the extension with CUDA, run the operator tests on the GPU and benchmark it, in one go.
#
#   dev/check_cuda.sh [--python PYTHON] [--wheels FOLDER] [--no-benchmark]
#
# Needs nvcc, a GPU and a Python with torch for CUDA. What else is missing (pytest, torchvision, ...) is
# installed from FOLDER alone, into build/cuda/site; nothing is fetched from a network.
# Writes docs/benchmarks/ops_<gpu>.md.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD python=python wheels="" benchmark=1
while [ $# -gt 0 ]; do
  case $1 in
    --python) python=$2; shift 2 ;;
    --wheels) wheels=$(cd "$2" && pwd); shift 2 ;;
    --no-benchmark) benchmark=0; shift ;;
    *) echo "check_cuda: unknown argument $1" >&2; exit 2 ;;
  esac
done
fail() { echo "check_cuda: $1" >&2; exit 1; }
python=$(command -v "$python") || fail "no such python"
"$python" -c 'import torch' 2>/dev/null || fail "$python has no torch"
"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || fail "torch sees no GPU"

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
arch=$("$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')
cd "$work"
echo "check_cuda: building for $arch"
FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="$arch" D2EXT_NVCCFLAGS="-Xptxas -v" \
  "$python" setup.py build_ext --inplace >build.log 2>&1 || { tail -30 build.log; fail "the build failed"; }
if grep -E "[1-9][0-9]* bytes spill" build.log; then fail "kernels spill registers, see $work/build.log"; fi
"$python" -m d2ext.ops
"$python" -m pytest tests/ops/test_cuda.py tests/ops/test_vectors_mnc.py tests/ops/test_vectors_fcis.py -p no:cacheprovider
if [ "$benchmark" = 1 ]; then
  gpu=$("$python" -c 'import re, torch; print(re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name().lower()))')
  mkdir -p "$root/docs/benchmarks"
  "$python" dev/benchmark_ops.py --device cuda --allocator default --output "$root/docs/benchmarks/ops_$gpu.md"
  echo "check_cuda: wrote docs/benchmarks/ops_$gpu.md"
fi
echo "check_cuda: passed"
