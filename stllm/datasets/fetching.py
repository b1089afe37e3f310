"""The shards that users and YAMLs name: from names to a list of shards, and from a remote shard to a file.

Names may contain braces, globs and URLs. Names are counted before braces are expanded: a few characters can stand for
more names than fit in memory. Each URL scheme has a program that copies a remote shard to a file, within a time limit.
Only `pipe:` starts a shell, which runs the rest of the name as a command. Lists of shards may come from strangers,
so `pipe:` is refused unless the command line allows it; no key of a YAML can.
"""

import glob
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
from typing import IO
from urllib.parse import urlparse
from urllib.request import url2pathname

from braceexpand import braceexpand

from stllm.common.errors import UserError
from stllm.common.files import replacing, user_path
from stllm.media.info import MediaError

PIPE = "pipe"
FIRST_SECONDS = 15.0  # until the first byte arrives; without a network some programs try again for minutes
STALL_SECONDS = 60.0  # from one byte to the next
_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]*):")
_HUB = re.compile(r"hf://(?:(datasets|spaces)/)?([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)", re.IGNORECASE)
MAX_SHARDS = 100_000  # the largest set of the published recipes has 10,489
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?")

_allowed = False  # True: `pipe:` may run commands in this process


def allow_pipes(allowed: bool) -> None:
    """Let this process read `pipe:` shards from now on (`--allow-pipe`), or refuse them again, which is the default."""
    global _allowed
    _allowed = allowed


def scheme_of(shard: str) -> str:
    """The scheme of a URL in lower case; "pipe" for `pipe:CMD`; "" for a path."""
    found = _SCHEME.match(shard)
    return found[1].lower() if found else ""


def check_scheme(shard: str) -> None:
    """Raise UserError for a scheme that has no program here, and for `pipe:` where it is not allowed."""
    scheme = scheme_of(shard)
    if scheme == PIPE and not _allowed:
        raise UserError(
            f"shards: {shard!r} would run a command of this list's author: found no --allow-pipe on the command line; "
            "give it if you trust the list, or name the shard's file or URL"
        )
    if scheme not in ("", PIPE, *PROGRAMS):
        known = ", ".join((*PROGRAMS, PIPE))
        raise UserError(
            f"shards: {shard!r} has the scheme {scheme!r}, expected one of {known}; a file whose name has a colon "
            "needs its folder, as ./a:b.tar"
        )


def fetch(shard: str, path: Path) -> None:
    """Copy a remote shard to `path`, whole or not at all. Raises MediaError when it cannot be fetched."""
    scheme, url = scheme_of(shard), shard.strip()
    command = ["sh", "-c", url.partition(":")[2]] if scheme == PIPE else PROGRAMS[scheme](url)
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
            _copy(shard, process.stdout, file, timed=scheme != PIPE)
            code = process.wait()
        finally:
            with suppress(ProcessLookupError):  # also its children, and processes that it left behind
                os.killpg(process.pid, signal.SIGKILL)
            process.stdout.close()
            process.wait()
        if code:
            said.seek(max(0, said.tell() - 4096))
            last = said.read().decode(errors="replace").strip().splitlines()[-1:]
            reason = f"{scheme}: exit {code}" + "".join(f", {line[:200]}" for line in last)
            raise MediaError(f"{shard}: the shard cannot be fetched ({reason}); check the URL and the network")


def _copy(shard: str, source: IO[bytes], target: IO[bytes], *, timed: bool) -> None:
    seconds = FIRST_SECONDS
    while True:
        if timed and not select.select([source], [], [], seconds)[0]:
            raise MediaError(
                f"{shard}: the shard cannot be fetched (nothing arrived for {seconds:g} s); check the URL and the "
                "network, or copy the shard to a file here"
            )
        data = os.read(source.fileno(), 1 << 20)
        if not data:
            return
        target.write(data)
        seconds = STALL_SECONDS


def _curl(url: str) -> list[str]:
    return ["curl", "--connect-timeout", "10", "--retry", "3", "--globoff", "-f", "-s", "-S", "-L", "--url", url]


def _hub(url: str) -> list[str]:
    """curl's command for hf://datasets/OWNER/NAME[@REVISION]/FILE; it reads the token's header from its stdin."""
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


# ---- names -----------------------------------------------------------------------------------------------------------


def expand_shards(shards: str | Sequence[str]) -> list[str]:
    """The shards that names, URLs, braces (`{00000..01255}.tar`) and globs stand for, in order.

    Raises UserError for a glob that finds nothing, broken braces, more than `MAX_SHARDS` names, a shard that is named
    twice, and what `check_scheme` refuses.
    """
    found: list[str] = []
    for pattern in [shards] if isinstance(shards, str) else shards:
        for name in _expanded(pattern):
            local = url2pathname(urlparse(name).path) if name.startswith("file:") else name
            if name is local and scheme_of(name):
                check_scheme(name)
                found.append(name)
            else:
                found += _local_shards(local)
    if len(found) > MAX_SHARDS:
        raise _too_many("the list", len(found))
    twice = next((name for name, count in Counter(found).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"shards: {twice!r} is named twice; name every shard once, and raise sample_ratio instead")
    if not found:
        raise UserError("shards: found none; name tar files, such as {00000..01255}.tar, a glob, or URLs")
    return found


def _expanded(pattern: str) -> list[str]:
    """The names that `::`, `${NAME}` (of WDS_NAME) and braces stand for, as in webdataset."""
    from webdataset.shardlists import envsubst

    names: list[str] = []
    try:
        for part in pattern.split("::"):
            part = envsubst(part)
            count = num_names(part)
            if count > MAX_SHARDS:
                raise _too_many(repr(_short(pattern)), count)
            names += islice(braceexpand(part), MAX_SHARDS + 1)
    except UserError:
        raise
    except (AssertionError, RecursionError, ValueError) as error:  # an unset ${NAME}, braces without an end
        sentence = f"shards: {_short(pattern)!r} cannot be expanded ({_short(str(error))}); write {{000..123}}.tar"
        raise UserError(sentence) from error
    return names


def num_names(pattern: str) -> float:
    """The number of names that the braces of a pattern stand for, counted without making them; see `braceexpand`."""
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
    """The number of names in `1..20`, `1..20..2` or `a..z`; 0 for anything else."""
    numbers = _RANGE.fullmatch(group)
    if numbers:
        if max(map(len, filter(None, numbers.groups()))) > 18:
            return inf
        first, last, step = (int(number or 1) for number in numbers.groups())
        return abs(last - first) // (step or 1) + 1
    if re.fullmatch(r"[A-Za-z]\.\.[A-Za-z](\.\.-?\d+)?", group):
        return len(list(braceexpand(f"{{{group}}}")))
    return 0


def _too_many(what: str, count: float) -> UserError:
    number = f"{count:,.0f}" if count < 1e15 else "more than 10^15"
    return UserError(
        f"shards: {what} stands for {number} shards, expected at most {MAX_SHARDS:,}: correct the braces, or divide "
        "the shards among several data sets"
    )


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


def _local_shards(name: str) -> list[str]:
    path = str(user_path(name))
    found = sorted(glob.glob(path, recursive=True)) if glob.has_magic(name) else [path]
    if not found:
        raise UserError(f"shards: nothing matches {_short(name)!r}; check the folder and the pattern")
    # A file called pipe:CMD is a file.
    return [os.path.join(os.curdir, one) if scheme_of(one) else one for one in found]
