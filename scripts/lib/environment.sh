# Functions of quickstart.sh and test.sh, which source this file: Python, its environment, what is installed there.
# For bash 3.2 (macOS) and newer.

python=${PYTHON:-python3}

step() { # name, command...: runs it and prints the seconds it took
    local name=$1 start=$SECONDS
    shift
    echo "== $name"
    "$@"
    echo "== $name: $((SECONDS - start)) s"
}

check_python() { # ends the script where Python is too old, or not there
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "error: $("$python" --version 2>&1 || echo "no $python") found, Python 3.10 or newer expected: set PYTHON=" >&2
        exit 1
    fi
}

enter_venv() { # folder: the virtual environment there, made where it is not; python is its own from here on
    if [[ ! -f $1/bin/activate ]]; then # not the folder alone: without Debian's python3-venv half of it is made
        step "new virtual environment in $1" "$python" -m venv "$1"
    fi
    # shellcheck disable=SC1091
    source "$1/bin/activate"
    python=python
}

announce_download() { # says what is about to take minutes, as pip is quiet
    "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' && return
    echo "torch and the rest are downloaded: some minutes, without a word unless something fails"
    if [[ -z ${TORCH_INDEX:-} && "$(uname -sm)" == "Linux x86_64" ]] && ! command -v nvidia-smi >/dev/null; then
        echo "no GPU is seen, and pip's own torch brings 6 GB for one: TORCH_INDEX=URL takes a CPU build (README: Install)"
    fi
}

install_stllm() { # the package from this folder, editable, and all of requirement.txt. $1: extras, such as [dev]
    announce_download
    # torch first and alone: the largest download fails early; numpy and the rest follow its choice
    "$python" -m pip install --quiet --disable-pip-version-check \
        ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch torchvision
    "$python" -m pip install --quiet --disable-pip-version-check -r requirement.txt -e ".${1:-}"
}
