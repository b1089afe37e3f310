"""A shard from elsewhere, copied to a file by the program that its URL's scheme stands for, within bounds of time.

`pipe:` alone starts a shell: it runs what follows it as a command. Lists of shards come from strangers, so `pipe:` is
refused unless the command line allows it; no key of a YAML can.
"""

import os
import re
import select
import signal
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from stllm.common.errors import UserError
from stllm.common.files import replacing
from stllm.media.info import MediaError

PIPE = "pipe"
FIRST_SECONDS = 15.0  # until the first byte arrives; without a network some programs try again for minutes
STALL_SECONDS = 60.0  # from one byte to the next
_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]*):")
_HUB = re.compile(r"hf://(?:(datasets|spaces)/)?([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)", re.IGNORECASE)

_allowed = False  # whether `pipe:` may run commands in this process


def allow_pipes(allowed: bool) -> None:
    """Let this process take `pipe:` shards from now on, or refuse them as at first: what `--allow-pipe` says."""
    global _allowed
    _allowed = allowed


def scheme_of(shard: str) -> str:
    """The scheme of a URL in lower case, of `pipe:CMD` "pipe"; "" for a path."""
    found = _SCHEME.match(shard)
    return found[1].lower() if found else ""


def check_scheme(shard: str) -> None:
    """Raises UserError for a scheme that no program here stands for, and for `pipe:` where it is not allowed."""
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
    """Copies a remote shard to `path`, whole or not at all. Raises MediaError when it cannot be had."""
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
            with suppress(ProcessLookupError):  # its children, too, and whatever it left behind
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


# What each scheme runs, without a shell. The programs hold the credentials.
PROGRAMS: dict[str, Callable[[str], list[str]]] = {
    **dict.fromkeys(("http", "https", "ftps", "sftp", "scp"), _curl),
    "hf": _hub,
    "gs": lambda url: ["gsutil", "cat", url],
    "s3": lambda url: ["aws", "s3", "cp", url, "-"],
    "ais": lambda url: ["ais", "get", url, "-"],
}
