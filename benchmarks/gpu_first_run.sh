#!/usr/bin/env bash
# Ten minutes on a GPU: tests first, then the figures in order of value. See gpu_first_run.md.
#
#     OUT=results bash benchmarks/gpu_first_run.sh
#
# Each step has its own time limit and writes its figures to $OUT before the next one begins. The limits add up to
# less than nine minutes. DRY_RUN=1 runs the same steps on a CPU with a small network; STEPS selects steps.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu-first-run}
PYTHON=${PYTHON:-python3}
STEPS=${STEPS:-kernels executor engine swap executors distinct_bf16 identical distinct mixed_bf16 cascades loading dispatch \
    deferral mixed scale}
BENCH=benchmarks.gpu BACKBONE=resnet50 ROUNDS=5 WORKERS=8 SLOWER=1
if [ "${DRY_RUN:-}" ]; then
    BENCH=tests.helpers.gpu_on_cpu BACKBONE=test_resnet ROUNDS=1 WORKERS=0 SLOWER=6
fi
mkdir -p "$OUT"
OUT=$(realpath "$OUT")
: > "$OUT/steps.jsonl"
# Caches must be writable and executable.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$OUT/cache/triton} NUMBA_CACHE_DIR=${NUMBA_CACHE_DIR:-$OUT/cache/numba}
export XDG_CACHE_HOME=${XDG_CACHE_HOME:-$OUT/cache} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

# Packages that the machine lacks, if their wheels are here.
if compgen -G ".whl/*.whl" > /dev/null; then
    $PYTHON -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$OUT/cache/site" .whl/*.whl
    export PYTHONPATH="$OUT/cache/site${PYTHONPATH:+:$PYTHONPATH}"
fi

# step NAME SECONDS COMMAND...: run the command with a time limit, log it, and write one line of JSON about it.
step() {
    local name=$1 limit=$(($2 * SLOWER)) begin=$SECONDS status=0
    shift 2
    [[ " $STEPS " == *" $name "* ]] || return 0
    echo "== $name, at most $limit s: $*"
    timeout --kill-after=5 "$limit" "$@" > "$OUT/$name.log" 2>&1 || status=$?
    tail -n 15 "$OUT/$name.log" | cut -c1-220
    printf '{"step": "%s", "seconds": %d, "limit": %d, "status": %d}\n' \
        "$name" $((SECONDS - begin)) "$limit" "$status" | tee -a "$OUT/steps.jsonl"
}

pytests() {
    local name=$1 limit=$2
    shift 2
    step "$name" "$limit" $PYTHON -m pytest -q -n "$WORKERS" --maxfail 12 -p no:cacheprovider "$@"
}

measure() {
    local name=$1 limit=$2
    shift 2
    step "$name" "$limit" $PYTHON -m $BENCH --backbone "$BACKBONE" --rounds "$ROUNDS" --out "$OUT/$name.json" "$@"
}

step machine 10 $PYTHON -c 'import torch, triton, numpy, timm
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")
print(*(f"{m.__name__} {m.__version__}" for m in (torch, triton, numpy, timm)))'

pytests kernels 40 tests/gpu/test_kernels.py tests/cascade/kernels/test_triton.py tests/cascade/kernels/test_per_image.py
pytests executor 70 tests/gpu/test_executor.py
pytests engine 55 tests/gpu/test_engine.py
measure swap 30 --only swap
measure executors 40 --only executors
measure distinct_bf16 40 --only mixed_distinct --precision bf16
measure identical 35 --only identical
measure distinct 30 --only mixed_distinct
measure mixed_bf16 40 --only mixed_uniform --precision bf16
measure cascades 30 --only cascades
measure loading 20 --only loading
measure dispatch 20 --only dispatch
measure deferral 20 --only deferral
measure mixed 30 --only mixed_uniform
measure scale 25 --only scale --masks 200
echo "== $SECONDS s; figures in $OUT"
