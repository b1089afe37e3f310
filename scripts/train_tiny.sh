#!/usr/bin/env bash
# The published pipeline in small, from nothing to a model that answers: the toy world; alignment of the vision encoder and
# the Q-Former; open questions about images; about videos; multiple choice, with long videos; and MVBench's twin at the
# end, on a world that was never seen. The same command continues where it was stopped. With --experiment, the experiment
# on temporal order follows stage 2 instead. The results are in docs/training.md. The numbers of steps of the quick variant
# are estimates.
# Needs: stllm installed (README); no GPU; 3 GB of disk for the full variant.
# Launch:   bash scripts/train_tiny.sh --quick
# Override: TOY_ROOT=world TINY_OUTPUT=output/mine bash scripts/train_tiny.sh
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
    cat <<'END'
usage: bash scripts/train_tiny.sh [--quick | --experiment]
environment:
  TOY_ROOT     the toy world, written there if it is not (default: toy_world/quick or toy_world/full)
  TINY_OUTPUT  where the stages and their results go (default: output/tiny/quick or output/tiny/full)
  PROCESSES    processes that train together (default: 2, which the recipes' batches are meant for)
  PYTHON       the interpreter (default: python)
END
}

size=full stages=(2_images 3_videos 4_choices)
case ${1:-} in
-h | --help) usage && exit ;;
--quick) size=quick && shift ;;
--experiment) stages=(2_images temporal_base) && shift ;;
esac
[[ $# == 0 ]] || { usage >&2 && exit 2; }

export TOY_ROOT=${TOY_ROOT:-toy_world/$size} TINY_OUTPUT=${TINY_OUTPUT:-output/tiny/$size}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # as many processes as cores are faster than as many threads
unseen=$TOY_ROOT-unseen
features=$TINY_OUTPUT/features # of frozen parts: each picture and clip is encoded once
clips=22000 tests=350
[[ $size == full ]] || { clips=4000 && tests=140; }

stllm() { "${PYTHON:-python}" -m stllm "$@"; }

distributed() { "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc_per_node="${PROCESSES:-2}" -m stllm "$@"; }

train() { # stage, further options
    local options=("run.output_dir=$TINY_OUTPUT/$1" "${@:2}")
    if [[ $size == quick ]]; then
        case $1 in
        1_alignment) options+=(run.max_steps=1800) ;;
        2_images) options+=(run.max_steps=800) ;;
        3_videos) options+=(run.max_steps=2200) ;;
        4_choices) options+=(run.max_steps=1300) ;;
        esac
    fi
    distributed train --cfg-path "configs/tiny/stages/$1.yaml" --options "${options[@]}"
}

if [[ ! -d $TOY_ROOT ]]; then
    echo "== toy world"
    stllm toy --output "$TOY_ROOT" --num-train "$clips" --num-test "$tests" --seed 1 --long
fi
[[ -d $unseen ]] || stllm toy --output "$unseen" --num-train 1 --num-test "$tests" --seed 2 --long
echo "== 1_alignment"
train 1_alignment
for stage in "${stages[@]}"; do
    echo "== $stage"
    distributed extract --cfg-path "configs/tiny/stages/$stage.yaml" --stage qformer --output "$features"
    train "$stage" "datasets.features_root=$features"
done
if [[ $stage == temporal_base ]]; then
    echo "== experiment"
    exec "${PYTHON:-python}" -m experiments.temporal --world "$TOY_ROOT" --test-world "$unseen" \
        --ckpt "$TINY_OUTPUT/$stage" --work "$TINY_OUTPUT/temporal"
fi
echo "== evaluation, on a world that was never seen"
evaluate() { # name, tasks, frames
    stllm evaluate mvbench --ckpt-path "$TINY_OUTPUT/$stage" --anno-path "$unseen/mvbench" --tasks "$2" --num-frames "$3" \
        --output-dir "$TINY_OUTPUT/evaluation/$1"
}
evaluate usual moving_direction,action_sequence,action_count,state_change,scene_transition,object_existence 8
[[ $size == quick ]] || evaluate long unexpected_action 64
cat "$TINY_OUTPUT"/evaluation/*/mvbench.md
