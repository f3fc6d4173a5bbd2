#!/usr/bin/env bash
# Builds, tests and benchmarks everything that needs a CUDA device, in one call of under nine minutes, on a machine with
# CUDA, CuPy and PyTorch; no network: what the machine lacks is installed from the wheels in $WHEELS, if that is set.
# Logs and JSON lines go to $OUT if that is set, else to bench/results/.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-bench/results}
mkdir -p "$out"
failed=0

step() { # step NAME SECONDS COMMAND…
  local name=$1 limit=$2
  shift 2
  echo "== $name"
  timeout "$limit" "$@" 2>&1 | tee "$out/gpu_$name.log" | tail -n 40
  local status=${PIPESTATUS[0]}
  [ "$status" = 0 ] || { echo "== $name failed with $status"; failed=1; }
}

step device 20 nvidia-smi
[ -z "${WHEELS:-}" ] || step wheels 20 python3 -m pip install --no-index --no-deps "$WHEELS"/*.whl
step build 90 python3 -m pip install --no-index --no-deps --no-build-isolation --force-reinstall .
step tests 150 python3 -m pytest -q -m gpu -p no:cacheprovider
step mutual_scoring 120 python3 -m zsad.bench.mutual_scoring_cuda --output "$out/mutual_scoring_cuda.jsonl"
# Where nothing runs the networks on the GPU, whole runs take the CPU for them.
images=$(python3 -c 'from zsad.engine.networks.runtime import choose_runtime; print(200 if choose_runtime("cuda").device else 40)')
step throughput 130 python3 -m zsad.bench.throughput --preset challenge --images "${images:-40}" --repeats 3 \
  --output "$out/throughput.jsonl"
exit $failed
