"""Errors as one sentence that says what was found, what was expected and what to do.

stllm's own code raises a `UserError`, whose text is that sentence. `sentence` returns one for errors of libraries and
of the operating system. The command line prints the sentence and exits with 1. This module uses the standard library
only, because it is imported before anything heavy.
"""

import difflib
import errno
import re
import textwrap
from collections.abc import Iterable


class UserError(ValueError):
    """An error that the user can correct: an invalid name, file, value or device."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name most similar to `name`, ignoring case; None when nothing is close."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return by_lower[matches[0]] if matches else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a message: `; did you mean 'x'?`, or "" when no known name is close."""
    guess = nearest(name, known)
    return f"; did you mean {guess!r}?" if guess is not None else ""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the message for a name that is not among `known`. It lists all known names and the nearest one."""
    names = sorted(known)
    listed = ", ".join(names) if names else "none so far"
    return f"unknown {kind} {name!r}: known are {listed}{did_you_mean(name, names)}"


_GPU_WORDS = ("CUDA", "CUBLAS", "HIP", "MPS")
_IN_A_WORKER = "in DataLoader worker process"
_WORKER_GONE = re.compile(r"DataLoader worker \(pid\(?s?\)? [\d, ]+\) (is killed|exited)")
_PROXY_WORDS = ("Using SOCKS proxy, but", "Unknown scheme for proxy URL")  # of httpx, when a client is built
_PEER_WORDS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "gloo/transport",
    "ncclRemoteError",
    "communicator was aborted",
)
_EXTRAS = {  # package -> the extras of pyproject.toml that bring it
    **dict.fromkeys(("openai", "httpx"), ("judge",)),
    **dict.fromkeys(("gradio", "fastapi"), ("demo",)),
    **dict.fromkeys(("h11", "starlette", "uvicorn"), ("demo", "serve")),
    "pydantic": ("judge", "serve"),
    "bitsandbytes": ("quantization",),
    "deepspeed": ("deepspeed",),
    "imagehash": ("overlap",),
    "liger_kernel": ("liger",),
    "lmms_eval": ("lmms-eval",),
}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# errno values, and phrases of libraries that give no errno (safetensors, torch) -> the sentence; {}: the file's name
_SYSTEM: dict[tuple[int | str, ...], str] = {
    (*DISK_FULL, "No space left on device", "PytorchStreamWriter failed", ". unexpected pos "): (
        "no space left on the disk{}: free some, or write to another folder, then run again"
    ),
    (errno.EFBIG, "File too large"): (
        "a file would be larger than is allowed here{}: raise the limit (ulimit -f), or write to another file system, "
        "then run again"
    ),
    (errno.EACCES, errno.EPERM, errno.EROFS): "no permission{}: give this user access, or name another path",
    (errno.EEXIST, errno.ENOTDIR): ("found a file where a folder is needed{}: name another path, or move the file"),
    (errno.EISDIR,): "found a folder where a file is needed{}: name another path, or move the folder",
    (errno.ENOENT,): "there is no such file or folder{}: make its folder, name another path, or see what removes it",
    (errno.ENAMETOOLONG,): "the name of a file or folder is too long{}: name another path",
    (errno.ELOOP,): "links that lead to each other in a circle{}: name the file itself",
}
MOST = 2000  # characters of a message; longer ones lose their middle (such as a path of 5,000 characters)
_MEMORY_WORDS = (
    "out of memory",  # CUDA, MPS
    "can't allocate memory",  # DefaultCPUAllocator on Linux and macOS
    "cannot allocate memory",  # mmap
    "not enough memory",  # DefaultCPUAllocator on Windows
    "cublas_status_alloc_failed",
)


def sentence(error: Exception) -> str:
    """Return the sentence to print for an exception. If its type is not known here, the sentence says "unexpected"."""
    text = _sentence(error)
    return text if len(text) <= MOST else f"{text[: MOST // 2]} ... {text[-MOST // 2 :]}"


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        if _IN_A_WORKER in text:  # the text is a traceback; it ends with the error's own sentence
            last = [line for line in str(error).splitlines() if re.match(r"[\w.]+(Error|Exception): ", line)][-1:]
            text = " ".join(last[0].partition(": ")[2].split()) if last else text
        return text
    if out_of_memory(error):
        where = "on the GPU" if any(word in text for word in _GPU_WORDS) else "on this machine"
        return (
            f"not enough memory {where}: use fewer frames (--num-frames) or beams (--num-beams), a smaller type "
            "(--dtype bfloat16), --options model.vit_chunk_size=1, or another --device"
        )
    if _WORKER_GONE.search(text):
        return (
            "a process that reads data was ended from outside, most likely because memory ran out: lower "
            "run.dataloader_num_workers (--num-workers) or the number of frames, then run again"
        )
    peer_is_gone = isinstance(error, RuntimeError) and any(words in text for words in _PEER_WORDS)
    if peer_is_gone or type(error).__name__ in ("DistNetworkError", "DistBackendError"):
        return (
            "another process of this run has ended, and this one cannot go on alone: its own message says why; the "
            "same command continues from what was kept"
        )
    # httpx also raises InvalidURL for addresses; those of commands were checked before, so this one is the proxy's
    if any(words in text for words in _PROXY_WORDS) or type(error).__name__ == "InvalidURL":
        return (
            f"the proxy in the environment (ALL_PROXY, HTTPS_PROXY or HTTP_PROXY) cannot be used ({text}): for a "
            "socks5:// proxy run `pip install socksio`; else correct or unset the variable"
        )
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.split(".")[0] != "stllm":
        ways = [f"`pip install 'stllm[{extra}]'`" for extra in _EXTRAS.get(error.name.split(".")[0], ())]
        return (
            f"the package {error.name!r} is not installed here: run {' or '.join(ways) or '`pip install stllm`'} (in a "
            "clone `pip install -r requirement.txt`), or activate the environment that has it"
        )
    name = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
    code = error.errno if isinstance(error, OSError) else None
    for signs, words in _SYSTEM.items():
        if code in signs or any(isinstance(sign, str) and sign in text for sign in signs):
            return words.format(name)
    if isinstance(error, RecursionError):
        return (
            "found values nested within each other too deeply in a file that this command reads (a YAML, JSON or "
            "annotation file): check the files that it names"
        )
    if isinstance(error, UnicodeError):
        return (
            f"found a text or a name with characters that cannot be written ({text}), such as half a surrogate pair: "
            "correct it, or rename the file"
        )
    if "embedded null" in text:
        return "found a zero byte in a path, expected the name of a file or folder: correct it"
    return f"unexpected {type(error).__name__}: {text}; run again with --debug for the traceback"


def out_of_memory(error: BaseException) -> bool:
    """Check whether this exception, or its cause, reports that memory ran out, on any device."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError":
            return True
        if isinstance(cause, OSError) and cause.errno == errno.ENOMEM:
            return True
        if isinstance(cause, ImportError) and "failed to map segment" in str(cause):  # a shared library does not fit
            return True
        if isinstance(cause, RuntimeError) and any(words in str(cause).lower() for words in _MEMORY_WORDS):
            return True
        cause = cause.__cause__
    return False


def reason(error: Exception) -> str:
    """Return the error's type and text in one line, to be put in brackets inside another message."""
    if "trust_remote_code" in str(error):  # transformers advises the user to allow it, which stllm never does
        return "it needs Python code from its own folder or repository, and stllm runs no code from checkpoints"
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 240)}"
