#!/usr/bin/env bash
# From a clone to answers about a video: an environment, the package, and the tiny model that comes with it, asked about
# a clip that comes with it. Linux and macOS; no GPU, no other weights.
# Needs: Python 3.10 or newer (3.11 for the newest transformers), and a package index to install from.
# Launch:   bash scripts/quickstart.sh           installs into the environment that is active, else into .venv
# Override: bash scripts/quickstart.sh --train   writes the toy world, trains the tiny model afresh, and asks that one
#           PYTHON=python3.12 TORCH_INDEX=URL bash scripts/quickstart.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib/environment.sh

usage() {
    cat <<'END'
usage: bash scripts/quickstart.sh [--train]
  --train      write the toy world, train a tiny model on it for a quarter of an hour (two cores), and ask that one:
               a first look at how the tiny pipeline learns
environment:
  PYTHON       the interpreter (default: the active environment's python, or python3)
  TORCH_INDEX  where torch is installed from; without a GPU, the index of CPU builds that pytorch.org names for your
               machine saves gigabytes on Linux (default: pip's own)
END
}

# asks the model of the first folder each question of the second's examples.json, about the clip that it belongs to
ask_examples='import json, pathlib, sys
import stllm
model, folder = sys.argv[1], pathlib.Path(sys.argv[2])
chat = stllm.load_chat(model)
for entry in json.loads((folder / "examples.json").read_text(encoding="utf-8")):
    clip, question = folder / entry["file"], entry["question"]
    print(clip, f"  {question}", f"  > {chat.ask(clip, question).text}", sep="\n", flush=True)'

train=
case ${1:-} in
-h | --help) usage && exit ;;
--train) train=yes && shift ;;
esac
[[ $# == 0 ]] || { usage >&2 && exit 2; }

activate=
if [[ -n ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} ]]; then
    python=${PYTHON:-python}
    check_python
    echo "== into the active environment, ${VIRTUAL_ENV:-$CONDA_PREFIX}"
else
    check_python
    enter_venv .venv
    activate="source .venv/bin/activate"
fi
step "install" install_stllm

model=stllm/assets/stllm-tiny
examples=stllm/assets/examples
if [[ -n $train ]]; then
    PYTHON=$python step "training" bash scripts/train_tiny.sh --quick
    model=${TINY_OUTPUT:-output/tiny/quick}/4_choices
elif [[ ! -f $model/config.json ]]; then
    echo "error: stllm is installed, but this copy has no $model: train it with bash scripts/quickstart.sh --train" >&2
    exit 1
fi
if [[ -f $examples/examples.json ]]; then
    echo "== ${model##*/} is asked about the clips in $examples"
    "$python" -c "$ask_examples" "$model" "$examples"
fi
chosen=
[[ -z $train ]] || chosen=" --ckpt-path $model"
echo
echo "It knows only the toy world: coloured shapes in short clips like these. Go on with"
[[ -z $activate ]] || echo "  $activate"
cat <<END
  stllm chat$chosen --video $examples/action_sequence.mp4     # a prompt; ask: What does the yellow circle do last?
  stllm demo$chosen     # a page to talk with videos: http://127.0.0.1:7860
README.md goes on from there: what an answer rests on, the released weights, videos of your own, training.
END
