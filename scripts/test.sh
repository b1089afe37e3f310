#!/usr/bin/env bash
# Everything that must pass: ruff, mypy and the tests, in a virtual environment of the project's own.
# Needs: Python 3.10 or newer (3.11 for the newest torch), and a package index to install from; no GPU.
# Launch:   bash scripts/test.sh                  installs into .venv, made anew with --fresh or in CI
# Override: bash scripts/test.sh --active -k cli  the environment at hand, nothing installed; the rest goes to pytest
#           PYTHON=python3.12 bash scripts/test.sh --fresh -m slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fresh=${CI:+yes}
active=
while [[ ${1:-} == --fresh || ${1:-} == --active ]]; do
    [[ $1 == --fresh ]] && fresh=yes || active=yes
    shift
done

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "error: $("$python" --version 2>&1 || echo "no $python") found, Python 3.10 or newer expected: set PYTHON=" >&2
    exit 1
fi

step() { # name, command...: runs it and prints the seconds it took
    local name=$1 start=$SECONDS
    shift
    echo "== $name"
    "$@"
    echo "== $name: $((SECONDS - start)) s"
}

install() {
    # torch first and alone: the largest download fails early; numpy and the rest follow its choice
    python -m pip install --quiet --disable-pip-version-check torch torchvision
    python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
}

if [[ -z $active ]]; then
    [[ -n $fresh ]] && rm -rf .venv
    if [[ ! -d .venv ]]; then
        step "new virtual environment" "$python" -m venv .venv
    fi
    # shellcheck disable=SC1091
    source .venv/bin/activate
    step "install" install
    python=python
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the tests' tensors are small: more threads only wait for each other
export HF_HUB_OFFLINE=1                      # the tests must pass alone
step "ruff check" "$python" -m ruff check
step "ruff format" "$python" -m ruff format --check
step "mypy" "$python" -m mypy
# a later -m or -n, given by the caller, replaces these
step "pytest" "$python" -m pytest -q -n auto --maxprocesses 4 -m "not slow" "$@"
