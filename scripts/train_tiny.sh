#!/usr/bin/env bash
# The published pipeline in small, from nothing to a model that answers: the toy world, the language model's own stage,
# images, videos, videos with masking and MVM, and MVBench's twin at the end. The same command goes on where it stopped.
# Needs: stllm installed (README); no GPU. Two cores take 15 minutes (--quick) or two hours.
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
declare -A clips=([quick]=6000 [full]=24000) tests=([quick]=560 [full]=1400)
declare -A quick_steps=([0_language]=300 [1_images]=350 [2_videos]=400 [3_masking]=60)

stllm() { "${PYTHON:-python}" -m stllm "$@"; }

train() { # stage, options...: a stage, from the one before
    local stage=$1 options=("${@:2}" "run.output_dir=$TINY_OUTPUT/$1")
    [[ $size == quick ]] && options+=("run.max_steps=${quick_steps[$stage]}")
    echo "== $stage"
    stllm train --cfg-path "configs/tiny/stages/$stage.yaml" --options "${options[@]}"
}

if [[ ! -d $TOY_ROOT ]]; then
    echo "== toy world"
    stllm toy --output "$TOY_ROOT" --num-train "${clips[$size]}" --num-test "${tests[$size]}" --seed 1
fi
train 0_language
train 1_images
echo "== features"
stllm extract --cfg-path configs/tiny/stages/2_videos.yaml --output "$TINY_OUTPUT/features" --stage vit
train 2_videos "datasets.features_root=$TINY_OUTPUT/features"
train 3_masking "datasets.features_root=$TINY_OUTPUT/features"
echo "== evaluation"
stllm evaluate mvbench --ckpt-path "$TINY_OUTPUT/3_masking" --anno-path "$TOY_ROOT/mvbench" --num-frames 16 \
    --output-dir "$TINY_OUTPUT/evaluation"
