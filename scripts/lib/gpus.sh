# Functions of the launchers, which source this file.

# How many processes to start on this machine: NPROC, else one a GPU, else one.
num_processes() {
    local gpus
    gpus=$(num_gpus)
    echo "${NPROC:-$((gpus > 0 ? gpus : 1))}"
}

# How many GPUs this process may use: 0 without any.
num_gpus() {
    if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
        awk -F, '{ print NF }' <<<"$CUDA_VISIBLE_DEVICES"
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi --list-gpus | grep -c '^GPU ' || true # grep has printed 0
    else
        echo 0
    fi
}
