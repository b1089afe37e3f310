#!/usr/bin/env bash
# MSVD-QA with the published settings, one process a GPU. The same command goes on where it stopped.
# Needs: what the header of configs/eval/msvd.yaml names.
# Launch:   CKPT=DIR bash scripts/eval_msvd.sh
# Override: NPROC=2 bash scripts/eval_msvd.sh --limit 20
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
exec bash "$root/scripts/evaluate.sh" "$root/configs/eval/msvd.yaml" "$@"
