#!/usr/bin/env bash
# Run the tests with a checkout of detectron2, e.g. its main branch, in place of v0.6.
#
#   dev/check_upstream.sh DIR [pytest arguments]
#
# Makes an environment of its own in build/upstream (or $VENV) as `make install` does, but with detectron2
# compiled from a copy of DIR: needs a C++ compiler and some minutes. $PYTHON and $JOBS as in the Makefile.
set -euo pipefail
fail() { echo "check_upstream: $1" >&2; exit 2; }
[ $# -ge 1 ] || fail "name a checkout of detectron2: dev/check_upstream.sh DIR [pytest arguments]"
[ -f "$1/setup.py" ] && [ -f "$1/detectron2/__init__.py" ] ||
  fail "$1 is no checkout of detectron2: it has no setup.py and detectron2/__init__.py"
checkout=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
venv=${VENV:-build/upstream}
"${PYTHON:-python3}" tools/setup_environment.py --venv "$venv" --detectron2 "$checkout"
commit=$(git -C "$checkout" rev-parse --short HEAD 2>/dev/null || echo "unknown commit")
echo "check_upstream: detectron2 of $checkout, $commit"
OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -n "${JOBS:-2}" --dist loadfile --max-worker-restart 0 "$@"
echo "check_upstream: passed"
