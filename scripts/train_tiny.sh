#!/usr/bin/env bash
# The published pipeline in small, from nothing to a model that answers: the toy world, the language model's own stage,
# images, videos, videos with masking and MVM, and MVBench's twin at the end. The same command goes on where it stopped.
# Needs: stllm installed (README); no GPU. Meant for 15 minutes on two cores (--quick), or two hours:
# not measured yet, and no run has been seen to its end.
# Launch:   bash scripts/train_tiny.sh --quick
# Override: TOY_ROOT=world TINY_OUTPUT=output/mine bash scripts/train_tiny.sh
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
    cat <<'END'
usage: bash scripts/train_tiny.sh [--quick]
environment:
  TOY_ROOT     the toy world, written there if it is not (default: toy_world/quick or toy_world/full)
  TINY_OUTPUT  where the stages and their results go (default: output/tiny/quick or output/tiny/full)
  PYTHON       the interpreter (default: python)
END
}

size=full
case ${1:-} in
-h | --help) usage && exit ;;
--quick) size=quick && shift ;;
esac
[[ $# == 0 ]] || { usage >&2 && exit 2; }

export TOY_ROOT=${TOY_ROOT:-toy_world/$size} TINY_OUTPUT=${TINY_OUTPUT:-output/tiny/$size}
declare -A clips=([quick]=6000 [full]=12000) tests=([quick]=560 [full]=1400)
declare -A quick_steps=([0_language]=1500 [1_images]=700 [2_videos]=900 [3_masking]=100)

stllm() { "${PYTHON:-python}" -m stllm "$@"; }

train() { # stage: from what the one before has left
    local options=("run.output_dir=$TINY_OUTPUT/$1")
    [[ $size == quick ]] && options+=("run.max_steps=${quick_steps[$1]}")
    echo "== $1"
    stllm train --cfg-path "configs/tiny/stages/$1.yaml" --options "${options[@]}"
}

if [[ ! -d $TOY_ROOT ]]; then
    echo "== toy world"
    stllm toy --output "$TOY_ROOT" --num-train "${clips[$size]}" --num-test "${tests[$size]}" --seed 1
fi
for stage in 0_language 1_images 2_videos 3_masking; do train "$stage"; done
echo "== evaluation"
stllm evaluate mvbench --ckpt-path "$TINY_OUTPUT/3_masking" --anno-path "$TOY_ROOT/mvbench" --num-frames 8 \
    --output-dir "$TINY_OUTPUT/evaluation"
cat "$TINY_OUTPUT/evaluation/mvbench.md"
