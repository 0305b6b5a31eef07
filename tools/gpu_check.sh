#!/usr/bin/env bash
# Everything that needs a CUDA device, in one call: the marked tests, then the benchmarks.
#
#     tools/gpu_check.sh [OUTPUT_FOLDER]
#
# Installs nothing: it uses the python3 on the PATH, which must have torch with CUDA, transformers,
# bitsandbytes, accelerate, peft, safetensors, typer and rich. The step benchmark runs with the allocator
# capped at 24 GiB, to stand for a consumer card. Exit status: that of the first part that failed, after all have run.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-$(mktemp -d)}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
status=0

part() { # name, command ...: run it, keep its output, remember the first failure
  local name=$1; shift
  echo "== $name: $*"
  "$@" 2>&1 | tee "$out/$name.log"
  local code=${PIPESTATUS[0]}
  [ "$code" -eq 0 ] || { echo "== $name: exit $code"; [ "$status" -ne 0 ] || status=$code; }
}

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv || { echo "no CUDA device here" >&2; exit 1; }
part tests python3 -m pytest -q -o addopts= -m gpu -o filterwarnings=default tests
part numerics python3 tools/bench_numerics.py --quick --device cuda --json "$out/numerics.json"
part step python3 tools/bench_step.py --device cuda --cap-gib 24 --json "$out/step.json"
part stream python3 tools/bench_stream.py --device cuda --cap-gib 24 --shape llama-2-13b --rows 16 --length 256 \
  --rounds 3 --json "$out/stream.json"
part stream_long python3 tools/bench_stream.py --device cuda --cap-gib 24 --shape llama-2-70b --layers 24 --rows 1 \
  --length 2048 --rounds 3 --json "$out/stream_long.json"
part quality python3 tools/bench_quality.py --quick --device cuda --json "$out/quality.json"
echo "== written to $out, status $status"
exit "$status"
