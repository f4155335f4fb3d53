#!/bin/sh
# Builds the extension with the address and undefined-behaviour sanitizers beside a copy of the
# Python package, and runs the tests on it; arguments go to pytest. Nothing is installed.
set -eu
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python}
BUILD=build/sanitize

# Light optimisation: the kernels are unrolled by pragma, and -O0 would take minutes to run.
"$PYTHON" -m cmake -S . -B "$BUILD" -DSPS_SANITIZE=ON -DCMAKE_BUILD_TYPE=None \
  -DCMAKE_CXX_FLAGS="-O1 -g1" \
  -DPython_EXECUTABLE="$("$PYTHON" -c 'import sys; print(sys.executable)')" \
  -Dnanobind_DIR="$("$PYTHON" -m nanobind --cmake_dir)" >/dev/null
"$PYTHON" -m cmake --build "$BUILD" --parallel 2

rm -rf "$BUILD/package"
mkdir -p "$BUILD/package"
cp -r python/sps_kernel "$BUILD/package/"
rm -f "$BUILD"/package/sps_kernel/_core*.so
cp "$BUILD"/_core*.so "$BUILD/package/sps_kernel/"

# Leaks are not looked for: the interpreter and torch never free what they hold at exit.
LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libstdc++.so.6)" \
  ASAN_OPTIONS=detect_leaks=0:abort_on_error=0 UBSAN_OPTIONS=print_stacktrace=1 \
  PYTHONPATH="$BUILD/package" OMP_NUM_THREADS=1 \
  "$PYTHON" -m pytest -q -p no:cacheprovider test "$@"
