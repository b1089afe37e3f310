#!/usr/bin/env bash
# Trains a recipe on this machine, one process a GPU; without a GPU one process on the CPU. The same command continues a
# run that was stopped; Ctrl-C and SIGTERM write a checkpoint first.
# Needs: stllm installed (README), and what the recipe's header names.
# Launch:   NPROC=8 bash scripts/train.sh configs/train/instructblip_qa.yaml
# Override: NPROC=2 bash scripts/train.sh configs/train/instructblip_qa.yaml --options run.learning_rate=1e-5
set -euo pipefail
source "$(dirname "$0")/lib/gpus.sh"

usage() {
    cat <<'END'
usage: bash scripts/train.sh CONFIG [options of stllm train, e.g. --options key=value ...]
environment:
  NPROC    processes on this machine (default: one a GPU, or 1)
  PYTHON   the interpreter (default: python)
END
}

case ${1:-} in
-h | --help) usage && exit ;;
'' | -*) usage >&2 && exit 2 ;;
esac
command=(-m stllm train --cfg-path "$@")

NPROC=$(num_processes)
launch=("${PYTHON:-python}")
if [[ -n ${RDZV_ENDPOINT:-} ]]; then # train_multinode.sh has checked the three of them
    launch+=(-m torch.distributed.run --nproc_per_node="$NPROC" --nnodes="$NNODES" --node_rank="$NODE_RANK"
        --rdzv_backend=c10d --rdzv_endpoint="$RDZV_ENDPOINT" --rdzv_id="${RDZV_ID:-stllm}"
        --rdzv_conf="is_host=$((NODE_RANK == 0 ? 1 : 0))")
elif ((NPROC > 1)); then
    launch+=(-m torch.distributed.run --nproc_per_node="$NPROC" --standalone)
fi
# torchrun passes a signal on and kills what has not ended by then: a checkpoint takes longer than its 30 seconds
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-900}
exec "${launch[@]}" "${command[@]}"
