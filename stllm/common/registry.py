"""Registries: mappings from names to classes, functions or data, one registry per kind of thing.

A registry imports the modules that register into it at its first lookup. So importing the package stays fast, and no
module must be imported only to register its classes.
"""

from collections.abc import Callable, Iterator
from importlib import import_module
from pkgutil import iter_modules
from threading import RLock
from typing import Any, Generic, TypeVar

from stllm.common.errors import UserError, unknown_name

T = TypeVar("T")
V = TypeVar("V")


class Registry(Generic[T]):
    """A mapping from names (and their aliases) to classes, functions or data.

    kind: the kind of the entries in messages, such as "video input".
    modules: the modules that register the entries, imported at the first lookup. If one is a package, all its modules
    are imported.
    """

    def __init__(self, kind: str, *, modules: tuple[str, ...] = ()) -> None:
        self.kind = kind
        self.modules = modules
        self._entries: dict[str, T] = {}
        self._aliases: dict[str, str] = {}
        self._loaded = False
        self._loading = False
        self._lock = RLock()  # re-entrant: a module may look something up while it is being imported

    def register(self, name: str, *aliases: str) -> Callable[[V], V]:
        """Return a decorator that registers a class or function; `register("name")(value)` registers other data.

        Raises ValueError when a name or alias is taken.
        """

        def enter(value: V) -> V:
            for new in (name, *aliases):
                if new in self._entries or new in self._aliases:
                    raise ValueError(f"{self.kind} {new!r} is registered twice: choose another name for {value!r}")
            self._entries[name] = value  # type: ignore[assignment]  # V is T, kept as given for the decorated name
            self._aliases.update(dict.fromkeys(aliases, name))
            return value

        return enter

    def get(self, name: str) -> T:
        """Return the entry of that name or alias. Raises UserError, listing the known names, if there is none."""
        self._load()
        canonical = self._aliases.get(name, name)
        if canonical not in self._entries:
            raise UserError(unknown_name(self.kind, name, [*self._entries, *self._aliases]))
        return self._entries[canonical]

    def names(self) -> list[str]:
        """List the registered names alphabetically, without aliases."""
        self._load()
        return sorted(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._entries or name in self._aliases

    def _load(self) -> None:
        if self._loaded:
            return
        with self._lock:
            if self._loading:
                return
            self._loading = True
            try:
                for name in self.modules:
                    folder = getattr(import_module(name), "__path__", ())
                    for module in iter_modules(folder):
                        import_module(f"{name}.{module.name}")
                self._loaded = True
            finally:
                self._loading = False


models: Registry[Any] = Registry("model", modules=("stllm.models.st_llm",))
vision_encoders: Registry[Any] = Registry("vision encoder", modules=("stllm.models.vision",))
video_inputs: Registry[Any] = Registry("video input", modules=("stllm.models.video_inputs",))
processors: Registry[Any] = Registry("processor", modules=("stllm.processors.transforms",))
datasets: Registry[Any] = Registry("data set type", modules=("stllm.datasets",))
tasks: Registry[Any] = Registry("task", modules=("stllm.tasks.video_text_it", "stllm.toy.seeing"))
runners: Registry[Any] = Registry("runner", modules=("stllm.runners.train",))
readers: Registry[Any] = Registry("reader", modules=("stllm.media.open",))
benchmarks: Registry[Any] = Registry("benchmark", modules=("stllm.evaluation.benchmarks",))
templates: Registry[Any] = Registry("prompt template", modules=("stllm.processors.templates",))
