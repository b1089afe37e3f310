"""Where shards are: from names to shards, and from a remote shard to a local file.

Names may contain braces, globs and URLs. Names are counted before braces are expanded: a few characters can stand for
more names than fit in memory. Each URL scheme has a program that copies a remote shard to a file, within a time limit.
Only `pipe:` starts a shell, which runs the rest of the name as a command. Lists of shards may come from strangers,
so `pipe:` is refused unless the command line allows it; no key of a YAML can.

Training asks for samples in any order, and a sample must be the same in every process that reads it. A stream from the
network allows neither. So a remote shard is fetched once and is then a local file like any other.
"""

import glob
import hashlib
import os
import re
import select
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice
from math import inf
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

from braceexpand import braceexpand

from stllm.common.errors import UserError
from stllm.common.files import replacing, user_path
from stllm.media.info import MediaError

MAX_SHARDS = 100_000  # the largest set of the published recipes has 10,489
FIRST_SECONDS = 15.0  # until the first byte arrives; without a network some programs try again for minutes
STALL_SECONDS = 60.0  # limit for the time from one byte to the next
GIB = 2**30

PIPE = "pipe"
_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]*):")
_HUB = re.compile(r"hf://(?:(datasets|spaces)/)?([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)", re.IGNORECASE)
_FETCHED = re.compile(r"-[0-9a-f]{16}\.tar$")  # the name of a fetched shard; the folder may hold the user's own tars

_allowed = False  # True: `pipe:` may run commands in this process


def allow_pipes(allowed: bool) -> None:
    """Let this process read `pipe:` shards from now on (`--allow-pipe`), or refuse them again, which is the default."""
    global _allowed
    _allowed = allowed


# ---- names -----------------------------------------------------------------------------------------------------------


def expand_shards(shards: str | Sequence[str]) -> list[str]:
    """Expand names, URLs, braces (`{00000..01255}.tar`) and globs to a list of shards, in order.

    Raises UserError for a glob that finds nothing, broken braces, more than `MAX_SHARDS` names, a shard that is named
    twice, a URL scheme that is not in `PROGRAMS`, and `pipe:` without `--allow-pipe`.
    """
    found: list[str] = []
    for pattern in [shards] if isinstance(shards, str) else shards:
        for name in _expanded(pattern):
            scheme = scheme_of(name)
            if name.startswith("file:"):
                name, scheme = url2pathname(urlparse(name).path), ""
            if scheme == PIPE and not _allowed:
                raise UserError(
                    f"shards: {name!r} would run a command of this list's author: found no --allow-pipe on the command "
                    "line; give it if you trust the list, or name the shard's file or URL"
                )
            if scheme not in ("", PIPE, *PROGRAMS):
                raise UserError(
                    f"shards: {name!r} has the scheme {scheme!r}, expected one of {', '.join((*PROGRAMS, PIPE))}; a "
                    "file whose name has a colon needs its folder, as ./a:b.tar"
                )
            if scheme:
                found.append(name)
                continue
            path = str(user_path(name))
            matching = sorted(glob.glob(path, recursive=True)) if glob.has_magic(name) else [path]
            if not matching:
                raise UserError(f"shards: nothing matches {name!r:.200}; check the folder and the pattern")
            # A file called pipe:CMD is a file.
            found += [os.path.join(os.curdir, one) if scheme_of(one) else one for one in matching]
    if len(found) > MAX_SHARDS:
        raise _too_many("the list", len(found))
    twice = next((name for name, count in Counter(found).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"shards: {twice!r} is named twice; name every shard once, and raise sample_ratio instead")
    if not found:
        raise UserError("shards: found none; name tar files, such as {00000..01255}.tar, a glob, or URLs")
    return found


def scheme_of(shard: str) -> str:
    """Return the scheme of a URL in lower case; "pipe" for `pipe:CMD`; "" for a path."""
    found = _SCHEME.match(shard)
    return found[1].lower() if found else ""


def _expanded(pattern: str) -> list[str]:
    """Expand `::`, `${NAME}` (the environment variable WDS_NAME) and braces to names, as webdataset does."""
    from webdataset.shardlists import envsubst

    names: list[str] = []
    try:
        for part in map(envsubst, pattern.split("::")):
            if (count := _num_names(part)) > MAX_SHARDS:
                raise _too_many(f"{pattern!r:.200}", count)
            names += islice(braceexpand(part), MAX_SHARDS + 1)
    except UserError:
        raise
    except (AssertionError, RecursionError, ValueError) as error:  # an unset ${NAME}, braces without an end
        found = f"shards: {pattern!r:.200} cannot be expanded ({error!s:.200})"
        raise UserError(f"{found}; write {{000..123}}.tar") from error
    return names


def _num_names(pattern: str) -> float:
    """Count the names that braces in a pattern expand to, without making the names; see `braceexpand`."""
    # What is known where each brace opened: names of its group's earlier alternatives, names of the alternative so far,
    # the group's beginning.
    outer: list[tuple[float, float, int]] = []
    earlier, names, start = 0.0, 1.0, 0
    for found in re.finditer(r"\\.|[{},]", pattern, re.DOTALL):
        if found[0] == "{":
            outer.append((earlier, names, start))
            earlier, names, start = 0.0, 1.0, found.end()
        elif found[0] == "," and outer:
            earlier, names = earlier + names, 1.0
        elif found[0] == "}" and outer:
            count = _range_size(pattern[start : found.start()]) or earlier + names
            earlier, names, start = outer.pop()
            names *= count
    return outer[0][1] if outer else names  # braces without an end are refused by `braceexpand`


def _range_size(group: str) -> float:
    """Return the number of names in `1..20`, `1..20..2` or `a..z`; 0 for anything else."""
    if numbers := re.fullmatch(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?", group):
        if max(map(len, filter(None, numbers.groups()))) > 18:
            return inf
        first, last, step = (int(number or 1) for number in numbers.groups())
        return abs(last - first) // (step or 1) + 1
    letters = re.fullmatch(r"[A-Za-z]\.\.[A-Za-z](\.\.-?\d+)?", group)
    return len(list(braceexpand(f"{{{group}}}"))) if letters else 0


def _too_many(what: str, count: float) -> UserError:
    number = f"{count:,.0f}" if count < 1e15 else "more than 10^15"
    return UserError(
        f"shards: {what} stands for {number} shards, expected at most {MAX_SHARDS:,}: correct the braces, or divide "
        "the shards among several data sets"
    )


# ---- remote shards ---------------------------------------------------------------------------------------------------


def _fetch(shard: str, path: Path) -> None:
    """Download a remote shard to `path`, completely or not at all. Raises MediaError if the download fails."""
    scheme, url = scheme_of(shard), shard.strip()
    command = ["sh", "-c", url.partition(":")[2]] if scheme == PIPE else PROGRAMS[scheme](url)
    advice = "check the URL and the network"
    with replacing(path) as partial, partial.open("wb") as file, tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, start_new_session=True
            )
        except FileNotFoundError as error:
            raise MediaError(f"{shard}: fetching it needs the program {error.filename!r}: install it") from error
        except (OSError, ValueError) as error:  # a URL of megabytes, or with a NUL
            raise MediaError(f"{shard[:200]}: the shard cannot be fetched ({error}); check the URL") from error
        assert process.stdin is not None and process.stdout is not None
        try:
            with suppress(BrokenPipeError), process.stdin as entry:
                entry.write(_hub_header() if scheme == "hf" else b"")
            seconds = FIRST_SECONDS
            while scheme == PIPE or select.select([process.stdout], [], [], seconds)[0]:
                if not (data := os.read(process.stdout.fileno(), 1 << 20)):
                    break
                file.write(data)
                seconds = STALL_SECONDS
            else:
                what = f"nothing arrived for {seconds:g} s"
                raise MediaError(
                    f"{shard}: the shard cannot be fetched ({what}); {advice}, or copy the shard to a file here"
                )
            code = process.wait()
        finally:
            with suppress(ProcessLookupError):  # also its children, and processes that it left behind
                os.killpg(process.pid, signal.SIGKILL)
            process.stdout.close()
            process.wait()
        if code:
            said.seek(max(0, said.tell() - 4096))
            last = said.read().decode(errors="replace").strip().splitlines()[-1:]
            reason = ", ".join([f"{scheme}: exit {code}", *(line[:200] for line in last)])
            raise MediaError(f"{shard}: the shard cannot be fetched ({reason}); {advice}")


def _curl(url: str) -> list[str]:
    return ["curl", "--connect-timeout", "10", "--retry", "3", "--globoff", "-f", "-s", "-S", "-L", "--url", url]


def _hub(url: str) -> list[str]:
    """Return curl's command for hf://datasets/OWNER/NAME[@REVISION]/FILE. Its stdin must hold the token's header."""
    from huggingface_hub import hf_hub_url

    found = _HUB.fullmatch(url)
    if found is None:
        raise MediaError(f"{url}: the shard cannot be fetched; expected hf://datasets/OWNER/NAME/FILE: correct the URL")
    kind, name, revision, file = found.groups()
    try:
        address = hf_hub_url(name, file, repo_type=kind and kind[:-1], revision=revision)
    except ValueError as error:  # characters that no owner's or set's name has
        raise MediaError(f"{url}: the shard cannot be fetched ({error}); correct the URL") from error
    return [*_curl(address), "-H", "@-"]


def _hub_header() -> bytes:
    from huggingface_hub import get_token

    token = get_token()
    return f"Authorization: Bearer {token}".encode() if token else b""


# The command that each scheme runs, without a shell. The programs hold the credentials.
PROGRAMS: dict[str, Callable[[str], list[str]]] = {
    **dict.fromkeys(("http", "https", "ftps", "sftp", "scp"), _curl),
    "hf": _hub,
    "gs": lambda url: ["gsutil", "cat", url],
    "s3": lambda url: ["aws", "s3", "cp", url, "-"],
    "ais": lambda url: ["ais", "get", url, "-"],
}


# ---- the folder of fetched shards and of indexes ---------------------------------------------------------------------


class ShardCache:
    """A folder with fetched shards, and with the indexes of local shards, too.

    folder: default: stllm/shards in the user's cache. max_gb: the most GiB that fetched shards may take; beyond
    that, the least recently used ones are removed. None: no limit.
    """

    def __init__(self, folder: str | Path | None = None, max_gb: float | None = None) -> None:
        users = user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
        self.folder = user_path(folder) if folder else users / "stllm" / "shards"
        self.max_gb = max_gb

    def tar(self, shard: str) -> Path:
        """Return the shard as a local file.

        Raises UserError if it does not exist, MediaError if it cannot be downloaded.
        """
        from filelock import FileLock

        if not scheme_of(shard):
            path = Path(shard)
            if not path.is_file():
                raise UserError(f"{shard}: there is no such shard; expected a tar file: correct or shorten `shards`")
            return path
        path = self.path(shard, ".tar")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):  # other processes wait for this one's copy
                if not path.exists():
                    _fetch(shard, path)
                    self._make_room(path)
        return path

    def path(self, shard: str, suffix: str) -> Path:
        """Return the path of a shard's file in the cache. A digest in it distinguishes shards of equal names."""
        place = shard if scheme_of(shard) else os.path.abspath(shard)
        digest = hashlib.blake2b(os.fsencode(place), digest_size=8).hexdigest()
        readable = re.sub(r"[^\w.-]+", "_", Path(place).name.removesuffix(".tar"))[-40:]
        return self.folder / f"{readable}-{digest}{suffix}"

    def _make_room(self, newest: Path) -> None:
        """Remove the least recently used shards, but not the newest, until the cache is within its size limit."""
        if self.max_gb is None:
            return
        fetched = [(path.stat(), path) for path in self.folder.glob("*.tar") if _FETCHED.search(path.name)]
        excess = sum(status.st_size for status, _ in fetched) - self.max_gb * GIB
        for status, path in sorted(fetched, key=lambda pair: pair[0].st_mtime_ns):
            if excess > 0 and path != newest:
                path.unlink(missing_ok=True)
                excess -= status.st_size
