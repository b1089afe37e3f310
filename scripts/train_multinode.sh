#!/usr/bin/env bash
# Trains a recipe on several machines: run it on each of them, with the same CONFIG and options. They meet at
# RDZV_ENDPOINT (torchrun's c10d rendezvous); output_dir and the data must be on storage that all of them see.
# Needs: what scripts/train.sh needs, on every machine, and a port that is open between them.
# Launch:   NNODES=2 NODE_RANK=0 RDZV_ENDPOINT=first-machine:29500 bash scripts/train_multinode.sh CONFIG
#           NNODES=2 NODE_RANK=1 RDZV_ENDPOINT=first-machine:29500 bash scripts/train_multinode.sh CONFIG
# Override: RDZV_ID=second-run ... bash scripts/train_multinode.sh CONFIG --options run.output_dir=/shared/second
set -euo pipefail

usage() {
    cat <<'END'
usage: NNODES=N NODE_RANK=K RDZV_ENDPOINT=HOST:PORT bash scripts/train_multinode.sh CONFIG [options of stllm train]
environment:
  NNODES         how many machines
  NODE_RANK      which one this is: 0 to NNODES-1; 0 runs at HOST
  RDZV_ENDPOINT  where they meet: a name or address of machine 0, and a free port there
  RDZV_ID        a name for the run, the same everywhere (default: stllm)
  NPROC, PYTHON  as in scripts/train.sh
END
}

case ${1:-} in
-h | --help) usage && exit ;;
'' | -*) usage >&2 && exit 2 ;;
esac
for name in NNODES NODE_RANK RDZV_ENDPOINT; do
    if [[ -z ${!name:-} ]]; then
        echo "error: $name is not set" >&2
        usage >&2
        exit 2
    fi
done
if [[ ! $NNODES =~ ^[1-9][0-9]*$ || ! $NODE_RANK =~ ^[0-9]+$ ]] || ((NODE_RANK >= NNODES)); then
    echo "error: NODE_RANK=$NODE_RANK of NNODES=$NNODES, expected 0 to NNODES-1" >&2
    exit 2
fi
if [[ ! $RDZV_ENDPOINT =~ ^.+:[0-9]+$ ]]; then
    echo "error: RDZV_ENDPOINT=$RDZV_ENDPOINT, expected HOST:PORT" >&2
    exit 2
fi
export NNODES NODE_RANK RDZV_ENDPOINT
exec bash "$(dirname "${BASH_SOURCE[0]}")/train.sh" "$@"
