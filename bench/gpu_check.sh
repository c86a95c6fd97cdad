#!/usr/bin/env bash
# Runs all checks that need a GPU within ten minutes: the build, the open items of results/gpu_pending.md,
# compute-sanitizer on the test without torch, the tests (a skip counts as a failure), a short training with and without
# the fused operators, the benchmarks, and the predicted times beside the measured ones.
#
#   bench/gpu_check.sh        logs and JSON go to $OUT (default bench/results); exit status 1 if any step failed.
#   gpu_compared.txt: the times of results/gpu_predicted.json beside the measured ones, printed as well
#   gpu_check.json: per step its command, status and seconds; 124: cut off by its limit or by the ten minutes; mps: whether
#   the Multi-Process Service ran, under which a cooperative launch shares the multiprocessors with other processes
#
# Needs nvcc and a python3 with torch (CUDA), pytest, pytest-benchmark, cmake, ninja and pybind11; no network.
# Tests that need DALI skip with a reason where it is absent.
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT=${OUT:-$PWD/bench/results}
export PATH=${CUDA_HOME:-/usr/local/cuda}/bin:$PATH PYTHONUNBUFFERED=1
export CPR_FAST_CUDA=ON FAIL_WITHOUT_CUDA=1
export MPS=no
[[ -e ${CUDA_MPS_PIPE_DIRECTORY:-/tmp/nvidia-mps}/control ]] && MPS=yes
readonly budget_s=570 rows=$OUT/gpu_check.tsv log=$OUT/gpu_check.log
mkdir -p "$OUT"
printf '' >"$rows" && printf '' >"$log"

# step NAME LIMIT_S COMMAND: runs it within what is left of the budget; one row and the log whatever happens.
step() {
  local left=$((budget_s - SECONDS)) begin=$SECONDS status
  local limit=$(($2 < left ? $2 : left))
  printf '\n== %s: %s\n' "$1" "$3" >>"$log"
  if ((limit > 0)); then
    timeout "$limit" bash -c "$3" >>"$log" 2>&1
    status=$?
  else
    status=124
  fi
  printf '%s\t%s\t%s\t%s\n' "$1" "$status" "$((SECONDS - begin))" "${3//[[:space:]]/ }" | tee -a "$rows"
}

commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
step device 60 "nvidia-smi -L && nvcc --version && python3 -c 'import torch; assert torch.cuda.is_available()'"
step build 240 "python3 setup.py build_ext && cmake -S . -B build/gpu -G Ninja -DCPR_FAST_CUDA=ON -DCPR_FAST_TESTS=ON \
  -DCPR_FAST_PYTHON=OFF && cmake --build build/gpu"

item=''
while IFS= read -r line; do
  [[ $line =~ ^([0-9]+)\.\  ]] && item=${BASH_REMATCH[1]}
  [[ $line =~ ^\ {7}([^ ].*)$ ]] && step "pending $item" 120 "${BASH_REMATCH[1]}"
done <bench/results/gpu_pending.md

# Ten to a hundred times slower than the kernels alone: the four take four minutes at most, so that the tests are reached.
for tool in memcheck racecheck initcheck synccheck; do
  step "$tool" 60 "compute-sanitizer --tool $tool --error-exitcode 9 build/gpu/test_kernels"
done
tests=$(ls -d tests/{ops,models,pretrain/state,pretrain/step} 2>/dev/null | tr '\n' ' ')
step tests 180 "python3 -m pytest -q -p no:cacheprovider $tests"
step training 90 "python3 bench/step/training_step.py --device cuda"
step bench 150 "python3 bench/kernels/compare.py --device cuda --seconds .5 --without torch.compile 'masked top-k' \
  --shapes 32x2048 256x16384 256x65536 1024x65536 1024x1000000 --largest 1048576 --out '$OUT'"
step suites 60 "python3 -m pytest bench --benchmark-only -k 'cuda and B32-K2048 and not compile' \
  --benchmark-max-time=.1 --benchmark-json='$OUT/gpu_benchmarks.json'"

# The times of the pending items beside those that were predicted from the compiled kernels, with the median error.
step predicted 20 "set -o pipefail; python3 bench/predict_gpu.py compare --out '$OUT' | tee '$OUT/gpu_compared.txt'"
[[ -s $OUT/gpu_compared.txt ]] && cat "$OUT/gpu_compared.txt"

python3 - "$rows" "$OUT/gpu_check.json" "$commit" <<'PYTHON'
import json, os, sys
steps = [dict(zip(("step", "status", "time_s", "command"), line.rstrip("\n").split("\t"))) for line in open(sys.argv[1])]
for row in steps:
    row["status"], row["time_s"] = int(row["status"]), int(row["time_s"])
json.dump({"commit": sys.argv[3], "mps": os.environ["MPS"] == "yes", "steps": steps}, open(sys.argv[2], "w"), indent=1)
failed = [row["step"] for row in steps if row["status"] not in (0, 5)]  # 5: pytest found no benchmark
print(f"failed: {', '.join(failed)} (see gpu_check.log)" if failed else "all steps passed")
sys.exit(bool(failed))
PYTHON
status=$?
rm -f "$rows"
exit $status
