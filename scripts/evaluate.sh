#!/usr/bin/env bash
# Evaluates a checkpoint on the benchmark that a configuration is named after, or on those of its section suite, one
# process a GPU; without a GPU one on the CPU. The same command goes on where it stopped.
# Needs: stllm installed (README), and what the configuration's header names.
# Launch:   CKPT=DIR bash scripts/evaluate.sh configs/eval/mvbench.yaml
# Override: NPROC=2 bash scripts/evaluate.sh configs/eval/mvbench.yaml --num-frames 16 --options model.video_input=mean
set -euo pipefail
source "$(dirname "$0")/lib/gpus.sh"

usage() {
    cat <<'END'
usage: bash scripts/evaluate.sh CONFIG [options of stllm evaluate, e.g. --limit N --options key=value ...]
  CONFIG is BENCH.yaml, BENCH being a benchmark of stllm evaluate (such as mvbench), or a YAML with a section suite
environment:
  NPROC    processes on this machine (default: one a GPU, or 1)
  PYTHON   the interpreter (default: python)
END
}

case ${1:-} in
-h | --help) usage && exit ;;
'' | -*) usage >&2 && exit 2 ;;
esac
benchmark=$(basename "$1" .yaml)
if grep -q '^suite:' "$1"; then
    benchmark=suite
fi
command=(-m stllm evaluate "$benchmark" --cfg-path "$@")

NPROC=$(num_processes)
launch=("${PYTHON:-python}")
if ((NPROC > 1)); then
    launch+=(-m torch.distributed.run --nproc_per_node="$NPROC" --standalone)
fi
exec "${launch[@]}" "${command[@]}"
