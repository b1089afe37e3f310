#!/usr/bin/env bash
# Everything that must pass: ruff, mypy and the tests, in a virtual environment of the project's own.
# Needs: Python 3.10 or newer (3.11 for the newest transformers), and a package index to install from; no GPU.
# Launch:   bash scripts/test.sh                  installs into .venv, made anew with --fresh or in CI
# Override: bash scripts/test.sh --active -k cli  the environment at hand, nothing installed; the rest goes to pytest
#           bash scripts/test.sh --lowest         the tests alone, with the oldest versions that requirement.txt allows
#           PYTHON=python3.12 bash scripts/test.sh --fresh -m slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib/environment.sh

usage() {
    cat <<'END'
usage: bash scripts/test.sh [--fresh] [--lowest | --active] [options of pytest, e.g. -k NAME, -m slow]
  --fresh      make the environment anew
  --lowest     the tests alone, in .venv-lowest, with the oldest versions that requirement.txt allows (Python 3.10 to 3.12)
  --active     in the environment at hand, with nothing installed
environment:
  PYTHON       the interpreter (default: python3)
  TORCH_INDEX  where torch is installed from (default: pip's own)
END
}

[[ ${1:-} == -h || ${1:-} == --help ]] && usage && exit
fresh=${CI:+yes}
active=
lowest=
while [[ ${1:-} == --fresh || ${1:-} == --active || ${1:-} == --lowest ]]; do
    declare "${1#--}=yes"
    shift
done

check_python
if [[ -z $active ]]; then
    venv=.venv${lowest:+-lowest}
    [[ -n $fresh ]] && rm -rf "$venv"
    enter_venv "$venv"
    if [[ -n $lowest ]]; then # NAME>=VERSION,... becomes NAME==VERSION
        sed -nE 's/^([A-Za-z_]+)>=([0-9.]+).*/\1==\2/p' requirement.txt >"$venv/constraints.txt"
        export PIP_CONSTRAINT=$venv/constraints.txt
    fi
    step "install" install_stllm '[dev]'
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the tests' tensors are small: more threads only wait for each other
export HF_HUB_OFFLINE=1                      # the tests must pass alone
if [[ -z $lowest ]]; then # mypy reads the libraries' types, which the code follows in their newest versions
    step "ruff check" "$python" -m ruff check
    step "ruff format" "$python" -m ruff format --check
    step "mypy" "$python" -m mypy
fi
# a later -m or -n, given by the caller, replaces these
step "pytest" "$python" -m pytest -q -n auto --maxprocesses 4 -m "not slow" "$@"
