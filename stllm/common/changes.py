"""What differs between two configurations, said in words: a run is gone on with only under the same settings."""

from collections.abc import Mapping
from typing import Any

SHOWN = 6  # keys in a sentence


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    if not isinstance(values, Mapping):
        return {prefix: values}
    return {
        dotted: value
        for key, entry in values.items()
        for dotted, value in flat(entry, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def told_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """ "a.b was 1 and is now 2 (and 1 more: c)"; "" when nothing differs. A key that one side lacks is None there."""
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    if not changed:
        return ""
    key = changed[0]
    more = f" (and {len(changed) - 1} more: {', '.join(changed[1:SHOWN])})" if len(changed) > 1 else ""
    return f"{key} was {old.get(key)!r} and is now {new.get(key)!r}{more}"
