#!/usr/bin/env bash
# What a machine with an NVIDIA GPU, CuPy and PyTorch says, in less than nine minutes and without a network:
# the tests on the device, the address and race checkers of CUDA, then the benchmark. Needs pytest, ml_dtypes, rich,
# matplotlib and array-api-compat beside NumPy; what of them is missing there may lie as wheels in a folder.
#
#     tools/gpu_check.sh [folder] [wheels]     # logs and tables go to the folder (default: gpu-check)
#
# gpu.csv in the folder is docs/gpu.csv, from which the tables and the chart of the documentation are made.
set -uo pipefail

cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
folder=${1:-gpu-check}
wheels=${2:-}
mkdir -p "$folder"
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
started=$SECONDS
failed=0

if [ -n "$wheels" ]; then
    site=$(mktemp -d)
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl || exit 2
    export PYTHONPATH=$PYTHONPATH:$site
fi

# A step with a limit in seconds: its output goes to a log, its last lines to the terminal.
step() {
    local limit=$1 name=$2 lines=$3
    shift 3
    timeout --kill-after=20 "$limit" "$@" >"$folder/$name.txt" 2>&1
    local status=$?
    [ $status -eq 0 ] || failed=1
    echo "== $name: exit status $status after $((SECONDS - started)) s in all" | tee -a "$folder/summary.txt"
    tail -n "$lines" "$folder/$name.txt" | tee -a "$folder/summary.txt"
}

pytest=("$python" -m pytest -q -p no:cacheprovider)
plugin=()
"$python" -c 'from importlib.metadata import entry_points as e; exit(not any(p.value == "batchnorm.testing.plugin" for p in e(group="pytest11")))' ||
    plugin=(-p batchnorm.testing.plugin)
parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(-n 4)

"$python" -c 'from batchnorm.bench.gpu import missing; exit(missing())' || exit 2
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$folder/summary.txt"
step 30 versions 6 "$python" -m batchnorm info
step 100 device-tests 15 "${pytest[@]}" tests/test_gpu.py -rs
step 130 conformance 15 "${pytest[@]}" "${plugin[@]}" "${parallel[@]}" --pyargs batchnorm.testing \
    --array-library cupy --array-library torch -k "cuda or cupy"
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck synccheck; do
        step 20 "$tool" 3 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" tests/gpu_passes.py
    done
fi
step 200 benchmark 40 "$python" -m batchnorm bench --gpu --all --output "$folder/gpu.csv"
exit $failed
