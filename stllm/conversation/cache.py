"""A bounded store of encoded videos: what was seen once is not encoded again for the next question."""

from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock

from torch import Tensor


class FeatureCache:
    """Least-recently-used tensors, kept in main memory up to `max_bytes`. Safe to share between threads.

    Keys are content digests, so the same video under another name is found and a changed file is not.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._entries: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Tensor | None:
        """The tensor of that key, or None; it becomes the most recently used."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Keeps a copy in main memory and drops the least recently used beyond `max_bytes`.

        What alone is larger than that is not kept, and drops nothing else.
        """
        tensor = tensor.detach().cpu()
        with self._lock:
            self._drop(key)
            if tensor.nbytes > self.max_bytes:
                return
            self._entries[key] = tensor
            self.num_bytes += tensor.nbytes
            while self.num_bytes > self.max_bytes:
                self._drop(next(iter(self._entries)))

    def clear(self) -> None:
        """Drops everything."""
        with self._lock:
            self._entries.clear()
            self.num_bytes = 0

    def _drop(self, key: Hashable) -> None:
        old = self._entries.pop(key, None)
        if old is not None:
            self.num_bytes -= old.nbytes
