"""Names of shards as users and YAMLs write them (braces, globs, URLs) to the list of shards.

Names are counted before braces are expanded: a few characters can stand for more of them than memory holds.
"""

import glob
import os
import re
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from math import inf, prod
from urllib.parse import urlparse
from urllib.request import url2pathname

from braceexpand import braceexpand

from stllm.common.errors import UserError
from stllm.common.files import user_path
from stllm.datasets.fetching import check_scheme, scheme_of

MAX_SHARDS = 100_000  # the largest set of the published recipes has 10,489
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?")


def expand_shards(shards: str | Sequence[str]) -> list[str]:
    """The shards that names, URLs, braces (`{00000..01255}.tar`) and globs stand for, in order.

    Raises UserError for a glob that finds nothing, broken braces, more than `MAX_SHARDS` names, a shard that is named
    twice, and what `fetching.check_scheme` refuses.
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
    """The names that `::`, `${NAME}` (of WDS_NAME) and braces stand for, as webdataset has them."""
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
    """How many names the braces of a pattern stand for, without making them; see `braceexpand` for their grammar."""
    return prod(map(_size, _groups(pattern)), start=1.0)


def _size(group: str) -> float:
    numbers = _RANGE.fullmatch(group)
    if numbers:
        if max(map(len, filter(None, numbers.groups()))) > 18:
            return inf
        first, last, step = (int(number or 1) for number in numbers.groups())
        return abs(last - first) // (step or 1) + 1
    if re.fullmatch(r"[A-Za-z]\.\.[A-Za-z](\.\.-?\d+)?", group):
        return len(list(braceexpand(f"{{{group}}}")))
    return sum(num_names(part) for part in _split(group))


def _groups(pattern: str) -> list[str]:
    """What stands in the outermost braces."""
    groups, depth, start = [], 0, 0
    for position, character in _unescaped(pattern):
        if character == "{":
            start = position + 1 if depth == 0 else start
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                groups.append(pattern[start:position])
    return groups


def _split(group: str) -> list[str]:
    """The parts between the commas that stand in no braces of their own."""
    parts, depth, start = [], 0, 0
    for position, character in _unescaped(group):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append(group[start:position])
            start = position + 1
    return [*parts, group[start:]]


def _unescaped(text: str) -> list[tuple[int, str]]:
    return [(found.start(), found[0]) for found in re.finditer(r"\\.|[{},]", text, re.DOTALL) if len(found[0]) == 1]


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
