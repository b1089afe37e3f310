"""Reading container videos with decord, for those who ask for it by name.

PyAV comes first (`reader: auto`) because decord 0.6, tried on files whose frames carry their own number, silently gives
wrong frames after a seek when a picture is stored after a keyframe but shown before it (open GOPs: HEVC by default, any
avi with B-frames), knows no mirrored display matrix and no AV1; it is also unmaintained and has no Arm wheel. On plain
H.264 both give the same bytes. So PyAV's timeline decides here what decord may be trusted with.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stllm.common.registry import readers
from stllm.media.info import Frame, Reader, decoder_options, warn_once
from stllm.media.orientation import MIRRORING
from stllm.media.video import PyAvReader
from stllm.media.video_source import MAX_THREADS


@readers.register("decord")
class DecordReader(Reader):
    """A container video decoded by decord; PyAV serves instead, with one logged note, where decord cannot.

    Indices, times and errors are PyAvReader's. Raises MediaError when the file holds no video that can be decoded.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._pyav = PyAvReader(path)
        self.info, self.seconds = self._pyav.info, self._pyav.seconds
        self._decord: Any = None
        doubt = self._doubt()
        if doubt:
            _note(self.path, doubt)

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        self.check(indices)
        for done, index in enumerate(indices):
            if self._decord is None:
                yield from self._pyav.frames(indices[done:])
                return
            try:
                frame = self._decord[index]
            except Exception as error:  # decord raises its own, IndexError, StopIteration, ...
                _note(self.path, f"decord failed at frame {index} ({_first_line(error)})")
                self._decord = None
                yield from self._pyav.frames(indices[done:])
                return
            yield frame.asnumpy() if hasattr(frame, "asnumpy") else np.asarray(frame)

    def check(self, indices: Sequence[int]) -> None:
        self._pyav.check(indices)

    def close(self) -> None:
        self._decord = None
        self._pyav.close()

    def _doubt(self) -> str | None:
        """Opens the file with decord; why it cannot be trusted with it, or None."""
        if decoder_options():
            return "decord cannot limit the size of later frames"
        timeline = self._pyav.timeline
        if timeline.open_gops or timeline.counted or self._pyav.turn in MIRRORING or self._pyav.transparent:
            return "decord would give wrong frames of it (open GOPs, no times, mirrored or transparent)"
        try:
            import decord

            decord.logging.set_level(decord.logging.QUIET)
            self._decord = decord.VideoReader(str(self.path), num_threads=MAX_THREADS)
        except Exception as error:  # ImportError, or whatever decord makes of the file
            return f"decord cannot open it ({_first_line(error)})"
        if len(self._decord) != self.info.num_frames:
            found, self._decord = len(self._decord), None
            return f"decord sees {found} frames where there are {self.info.num_frames}"
        return None


def _note(path: Path, why: str) -> None:
    warn_once(str(path), f"{why}; PyAV reads it instead")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
