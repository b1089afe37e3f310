"""Sentences for all kinds of exceptions. How they are printed is tested with the command line."""

import errno

import pytest

from stllm.common.errors import UserError, sentence


@pytest.mark.parametrize(
    ("error", "start"),
    [
        (UserError("no file x.mp4:\n  name another"), "no file x.mp4: name another"),
        (MemoryError(), "not enough memory on this machine: use fewer frames"),
        (RuntimeError("CUDA out of memory."), "not enough memory on the GPU: use fewer frames"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "not enough memory on this machine"),
        (
            ModuleNotFoundError("No module named 'av'", name="av.error"),
            "the package 'av.error' is not installed here: run",
        ),
        (ModuleNotFoundError("No module named 'stllm.x'", name="stllm.x"), "unexpected ModuleNotFoundError"),
        (OSError(errno.ENOSPC, "No space", "a.bin"), "no space left on the disk (a.bin): free some"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 568"), "no space left"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "no space left on the disk: free"),
        (PermissionError(errno.EACCES, "Permission denied", "/locked/x"), "no permission (/locked/x): give"),
        (FileExistsError(errno.EEXIST, "File exists", "a"), "found a file where a folder is needed (a): name another"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), "found a file where a folder is needed (a/b)"),
        (OSError(errno.EFBIG, "File too large", "a"), "a file would be larger than is allowed here (a): raise the"),
        (RuntimeError("I/O error: File too large (os error 27)"), "a file would be larger than is allowed here: raise"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/proc/x"), "there is no such file or folder (/proc/x): make"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a"), "found a folder where a file is needed (a): name"),
        (
            UserError(
                'Caught UserError in DataLoader worker process 0.\nTraceback:\n  File "x.py", line 1\n'
                "stllm.common.errors.UserError: a.mp4: the file is empty\n"
            ),
            "a.mp4: the file is empty",
        ),
        (RuntimeError("DataLoader worker (pid(s) 71, 72) exited unexpectedly"), "a process that reads data was ended"),
        (
            RuntimeError("DataLoader worker (pid 71) is killed by signal: Killed."),
            "a process that reads data was ended",
        ),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:1"), "another process of this"),
        (ZeroDivisionError("division by zero"), "unexpected ZeroDivisionError: division by zero; run again"),
    ],
)
def test_every_error_is_one_line(error: Exception, start: str) -> None:
    found = sentence(error)
    assert found.startswith(start)
    assert "\n" not in found
