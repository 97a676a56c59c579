#!/usr/bin/env bash
# What a machine with an NVIDIA GPU, CuPy and PyTorch says, in less than eight minutes and without a
# network: the tests on the device, then the benchmark table. Needs pytest, ml_dtypes, rich, matplotlib and
# array-api-compat beside NumPy.
#
#     tools/gpu_check.sh [folder]     # the log and the full table go there (default: gpu-check)
set -uo pipefail

cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
folder=${1:-gpu-check}
mkdir -p "$folder"
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
started=$SECONDS
failed=0

# A step with a limit in seconds: its output goes to a log, its last lines to the terminal.
step() {
    local limit=$1 name=$2 lines=$3
    shift 3
    timeout --kill-after=20 "$limit" "$@" >"$folder/$name.txt" 2>&1
    local status=$?
    [ $status -eq 0 ] || failed=1
    echo "== $name: exit status $status after $((SECONDS - started)) s in all"
    tail -n "$lines" "$folder/$name.txt"
}

pytest=("$python" -m pytest -q -p no:cacheprovider)
plugin=()
"$python" -c 'from importlib.metadata import entry_points as e; exit(not any(p.value == "batchnorm.testing.plugin" for p in e(group="pytest11")))' ||
    plugin=(-p batchnorm.testing.plugin)
parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(-n 4)

"$python" -c 'from batchnorm.bench.gpu import missing; exit(missing())' || exit 2
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
step 30 versions 6 "$python" -m batchnorm info
step 90 device-tests 15 "${pytest[@]}" tests/test_gpu.py -rs
step 130 conformance 15 "${pytest[@]}" "${plugin[@]}" "${parallel[@]}" --pyargs batchnorm.testing \
    --array-library cupy --array-library torch -k "cuda or cupy"
step 215 benchmark 30 "$python" -m batchnorm bench --gpu --all --output "$folder/benchmark.csv"
exit $failed
