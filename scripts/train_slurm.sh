#!/usr/bin/env bash
# Trains a recipe as a Slurm job, on one node or several: one task a GPU, started by srun itself. Five minutes before
# the time limit Slurm sends SIGTERM to the tasks: the step is finished and a checkpoint written, and the same
# submission continues the run. (No torchrun in between: it would pass the signal on a second time.)
# Needs: stllm in an environment that the nodes see (active at submission), data and output_dir on shared storage.
# Launch:   sbatch scripts/train_slurm.sh configs/train/instructblip_qa.yaml
# Override: sbatch --nodes=2 --time=8:00:00 scripts/train_slurm.sh CONFIG --options run.save_steps=500
#           REQUEUE=1 sbatch scripts/train_slurm.sh CONFIG      goes back into the queue until the run is finished
#SBATCH --job-name=stllm
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=stllm-%j.log
set -euo pipefail

usage() {
    cat <<'END'
usage: sbatch [sbatch options] scripts/train_slurm.sh CONFIG [options of stllm train, e.g. --options key=value ...]
environment at submission:
  REQUEUE  1: put the job back into the queue when the time limit stopped it
  PYTHON   the interpreter (default: python)
END
}

case ${1:-} in
-h | --help) usage && exit ;;
'' | -*) usage >&2 && exit 2 ;;
esac
if [[ -z ${SLURM_JOB_ID:-} ]]; then
    echo "error: this is no Slurm job: submit it with sbatch" >&2
    usage >&2
    exit 2
fi

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # two jobs on one node must not meet
export MASTER_ADDR MASTER_PORT
code=0
# shellcheck disable=SC2016 # each task's own shell fills in its numbers
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec "$@"
' task "${PYTHON:-python}" -m stllm train --cfg-path "$@" || code=$?
if ((code == 143)) && [[ ${REQUEUE:-0} == 1 ]]; then # SIGTERM, and the checkpoint is written
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
