#!/usr/bin/env bash
# Our kernels under compute-sanitizer's memory check, in every launch bucket: bash benchmarks/memcheck.sh [OPERATION ...]
# One line a check (an operation at a shape), as many at once as there are cores; exit code 1 where one found something.
# PYTHON names the interpreter.
set -u
export PYTHON=${PYTHON:-python3} RUN=$(dirname "$0")/run.py

check() { # OPERATION SHAPE
  local said
  said=$(PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 "$PYTHON" "$RUN" "$1" \
    --check-only --shape "$2" --only triton --only mixed --only grouped_mm --only ours 2>&1) &&
    echo "$1 $2: ok, $(grep -c ' ok, error ' <<<"$said") implementations" && return
  local why='Invalid|Error| (wrong|failed|skipped|out of memory): |ERROR SUMMARY'
  echo "$1 $2: BAD $({ grep -E "$why" <<<"$said" || tail -n 1 <<<"$said"; } | head -n 4 | tr -s ' \n' ' ')"
  return 1
}
export -f check

"$PYTHON" "$RUN" "$@" --list | awk '!/^ / {op = $1} $1 == "shape" && $2 ~ /^(tiny|check)/ {print op, $2}' |
  xargs -P "$(nproc)" -L 1 bash -c 'check "$@"' check || exit 1
