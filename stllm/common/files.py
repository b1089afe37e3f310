"""Files and folders: atomic writing, locks, and checks against pipes and devices, whose reading may never end."""

import errno
import glob
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from filelock import FileLock, Timeout

from stllm.common.errors import DISK_FULL, UserError

log = logging.getLogger(__name__)

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP)  # errors of a network file system without a lock service
OLD = ".old.partial"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # the first bytes of a Git LFS pointer
LFS_SENTENCE = "found a Git LFS pointer, expected the file itself: fetch it with `git lfs pull`"
SPECIAL = {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}
LITTLE_SPACE = 1 << 20  # bytes; if less is free, a failed write is reported as a full disk


def user_path(path: str | Path) -> Path:
    """Return a user's path: unchanged if it exists, else with ~ and ~user replaced by the home folder."""
    return Path(path) if os.path.lexists(path) else Path(os.path.expanduser(path))


def server_address(url: str, option: str) -> str:
    """Return a server's URL without user name and password, so that it may be logged.

    Raises UserError, naming the option, if `url` is not the http or https URL of a server.
    """
    import httpx

    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and httpx.URL(url).host and parts.port != 0 and " " not in url
    except (ValueError, httpx.InvalidURL):
        valid = False
    if not valid:
        shown = url.rpartition("@")[2]  # the part before @ may contain a password
        raise UserError(f"{option}: found {shown!r}, expected a URL such as http://localhost:8000/v1")
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def check_regular(place: str | Path, expected: str, error: type[UserError] = UserError) -> None:
    """Raise `error` if `place`, or an entry of the folder `place`, is a pipe, a device or a socket.

    Reading one of these may never end, so every reader of a file that the user names calls this first. A path that does
    not exist passes this check: the reader reports it.
    expected: the kind of file that the reader needs, for the message.
    """
    path = user_path(place)
    try:
        entries = [path, *path.iterdir()] if path.is_dir() else [path]
    except OSError:  # a folder that may not be listed; the reader says so
        entries = [path]
    for entry in entries:
        try:
            kind = SPECIAL.get(stat.S_IFMT(entry.stat().st_mode))
        except (OSError, ValueError):  # missing, forbidden, or no path at all; the reader says so
            continue
        if kind is not None:
            raise error(f"{entry}: found {kind}, expected {expected}: write it to a file first")


@contextmanager
def locked(path: Path, busy: str, *, seconds: float = 0) -> Iterator[None]:
    """Hold a lock on the file `path` during the block. The file stays; a killed process loses its lock.

    The lock is flock's. It works between machines if the file system supports that (NFS 4, Lustre with -o flock).
    busy: the message of the UserError that is raised if another process holds the lock. seconds: how long to wait.
    Raises UserError also if the folder of the lock file cannot be created.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {path.parent} cannot be created ({error.strerror}): name another one") from error
    lock = FileLock(path)
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        raise UserError(busy) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.warning("%s: this file system has no locks (%s): start only one process on this folder", path, error)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path. It is renamed to `path` when the block succeeds, and removed when the block fails.

    So a reader never sees half a file, and a full disk leaves the old file in place.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically. An unpaired surrogate is written as its JSON escape."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def check_new(target: Path, option: str) -> None:
    """Raise UserError unless `target` is absent or an empty folder. option: the option that named it."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        what = "holds files" if target.is_dir() else "is a file"
        raise UserError(
            f"{target} {what} already, expected a new or an empty folder: name another with {option}, or empty it"
        )


@contextmanager
def new_folder(target: Path, needed: int) -> Iterator[Path]:
    """Yield a temporary folder. It replaces `target` when the block succeeds, and is removed when the block fails.

    Temporary folders that killed processes left beside the target are removed first.
    needed: bytes that will be written. Raises UserError if the disk has not enough room for them.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise UserError(_no_space(target, needed, free))
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        yield partial
        old = partial.with_suffix(OLD)
        if target.exists():
            target.rename(old)
        try:
            partial.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        if old.exists():
            shutil.rmtree(old)
    except Exception as error:
        free = shutil.disk_usage(target.parent).free
        full = getattr(error, "errno", None) in DISK_FULL or "No space left" in str(error)
        if full or (free < LITTLE_SPACE and not isinstance(error, UserError)):
            raise UserError(_no_space(target, needed, free)) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_leftovers(target: Path) -> None:
    """Remove temporary folders of processes that have ended. Restore a target that such a process had moved away."""
    from psutil import pid_exists

    for path in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        process = path.name.removeprefix(f".{target.name}.").split(".")[0]
        if not (process.isdigit() and len(process) < 10) or not path.is_dir() or pid_exists(int(process)):
            continue
        if path.name.endswith(OLD) and not target.exists():
            path.rename(target)  # killed between the two moves
        else:
            shutil.rmtree(path, ignore_errors=True)


def _no_space(target: Path, needed: int, free: int) -> str:
    return (
        f"no space left on the disk for {target}: {needed / 2**30:.2f} GiB are needed, {free / 2**30:.2f} GiB are "
        "free; nothing was written, free some space or name another folder"
    )
