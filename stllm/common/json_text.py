"""JSON from anywhere to values: whatever is wrong with it is a ValueError with a reason."""

import json
from collections.abc import Callable
from typing import Any


def loads(data: str | bytes, *, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """The value of a JSON text, or of its bytes in UTF-8, -16 or -32; a byte order mark is no part of it.

    Raises ValueError for what is no JSON, is nested too deeply, or has a number of thousands of digits.
    """
    text = data if isinstance(data, str) else data.decode(json.detect_encoding(data))
    try:
        return json.loads(text.removeprefix("\ufeff"), object_hook=object_hook)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
