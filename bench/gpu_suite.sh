#!/usr/bin/env bash
# Builds, tests and benchmarks everything that needs a CUDA device, in one call of under nine minutes, on a machine with
# CUDA and CuPy (PyTorch and TensorRT are compared where they are installed); no network: what the machine lacks is
# installed from the wheels in $WHEELS, if that is set. The most valuable comes first; a step that fails or runs out of
# its time is named at the end and the others run all the same. Logs, JSON lines and a page of their tables (gpu.md) go
# to $OUT if that is set, else to bench/results/. Ends with 1 where a step failed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-bench/results}
mkdir -p "$out"
: > "$out/gpu_steps.txt"
failed=0

step() { # step NAME SECONDS COMMAND…
  local name=$1 limit=$2 start=$SECONDS status said
  shift 2
  echo "== $name (at most $limit s)"
  timeout -k 2 "$limit" "$@" 2>&1 | tee "$out/gpu_$name.log" | tail -n 40
  status=${PIPESTATUS[0]}
  case $status in
    0) said=done ;;
    124 | 137) said="FAILED: not done within $limit s" failed=1 ;;
    *) said="FAILED with status $status" failed=1 ;;
  esac
  echo "$name: $said ($((SECONDS - start)) s)" | tee -a "$out/gpu_steps.txt"
}

bench() { # bench NAME SECONDS MODULE FILE ARGUMENTS…
  local name=$1 limit=$2 module=$3 file=$4
  shift 4
  step "$name" "$limit" python3 -m "zsad.bench.$module" "$@" --output "$out/$file.jsonl"
}

# All limits, and two seconds each for those that do not end when they are told to, add up to less than nine minutes.
step device 5 nvidia-smi
[ -z "${WHEELS:-}" ] || step wheels 15 python3 -m pip install --no-index --no-deps "$WHEELS"/*.whl
step build 60 python3 -m pip install --no-index --no-deps --no-build-isolation --force-reinstall .
step tests 95 python3 -m pytest -q -m gpu -p no:cacheprovider
# All ways to multiply, for the degrees of both large presets; then pairs per launch, and what CUDA graphs gain.
bench products_challenge 25 mutual_scoring_cuda mutual_scoring_cuda --images 100 --degrees 1,3 --repeats 2
bench products_musc 30 mutual_scoring_cuda mutual_scoring_cuda --images 100 --degrees 1,3,5 --repeats 2
bench pairs_musc 20 mutual_scoring_cuda pairs_cuda --images 100 --repeats 2 --products gram --pairs 1,2,4,6 --unrecorded
# Networks in every runtime, then whole runs and how well their stages overlap.
bench challenge 80 throughput throughput --device cuda --preset challenge --images 100 --repeats 3
bench musc 45 throughput throughput --device cuda --preset musc --images 100 --repeats 3
bench winclip 25 throughput throughput --device cuda --preset winclip --images 60 --repeats 3
bench april_gan 25 throughput throughput --device cuda --preset april-gan --images 60 --repeats 3
bench vvv 30 throughput throughput --device cuda --preset vvv --images 2 --repeats 3
bench banks 15 nearest nearest --device cuda
bench decoders 20 throughput throughput --device cuda --preset small --only runs --images 100 --decoder nvimgcodec
step page 5 python3 -m zsad.bench.tables --gpu "$out"

echo "== steps"
cat "$out/gpu_steps.txt"
exit $failed
