"""ST-LLM: a video LLM that lets the language model do the temporal modelling (arXiv 2404.00308).

The public functions are imported at their first use (PEP 562), so that `import stllm` is fast.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stllm.conversation.chat import load_chat
    from stllm.models.build import build_model
    from stllm.models.checkpoints.load import load_model

__version__ = "0.1.0"

# torch reads this at its first tensor: on Linux, large tensors on a CPU are then in huge pages, which are faster
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__all__ = ["__version__", "build_model", "load_chat", "load_model"]

_HOMES = {
    "build_model": "stllm.models.build",
    "load_chat": "stllm.conversation.chat",
    "load_model": "stllm.models.checkpoints.load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'stllm' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # so that the next access does not call this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
