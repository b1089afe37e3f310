"""Readers of container videos with other decoders than PyAV (decord, torchcodec), which users can choose by name.

PyAV is the default: on test files whose frames show their own number, its reader returned every frame correctly. The
other libraries returned wrong frames for some files. So PyAV opens each file first, determines indices and times, and
decodes the file itself if the library would return other frames.

decord 0.6 silently returns wrong frames after a seek in open GOPs, in which a picture is stored after a keyframe but
shown before it (HEVC by default, avi with B-frames), and in MPEG-TS. It ignores mirroring and cannot read AV1. It is
unmaintained and has no Arm wheel. torchcodec 0.17 returns wrong frames in MPEG-TS, in MPEG program streams, and if
times do not order the frames. It ignores mirroring and transparency. For other files, both return the same bytes as
PyAV.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from stllm.common.errors import UserError
from stllm.common.registry import readers
from stllm.media.info import Frame, Member, decoder_options, warn_once
from stllm.media.video import MIRRORING, PyAvReader, num_threads

SAME_TIME = 1e-6  # seconds


class LibraryReader(PyAvReader):
    """A reader with another library than PyAV. If the library cannot read a file correctly, PyAV reads it, with a note.

    library: name of the library. formats: FFmpeg's names of the formats in which the library returns wrong frames.
    open_gops: True if it returns wrong frames in open GOPs. Raises MediaError if the file has no decodable video.
    """

    library: str
    formats: tuple[str, ...]
    open_gops: bool

    def __init__(self, path: str | Path | Member) -> None:
        super().__init__(path)
        self._video: Any = None
        doubt, timeline, form = None, self.timeline, self.source.container.format.name
        is_wrong = timeline.counted or (timeline.open_gops and self.open_gops) or form in self.formats
        if decoder_options():
            doubt = f"{self.library} cannot limit the size of later frames"
        elif is_wrong or self.turn in MIRRORING or self.transparent:
            kinds = "no times in order, mirrored or transparent" + (", open GOPs" if self.open_gops else "")
            doubt = f"{self.library} would give wrong frames of it ({kinds}, or {' or '.join(self.formats)})"
        else:
            try:
                self._video = self._open(self.path.open() if isinstance(self.path, Member) else str(self.path))
                if len(self._video) != self.info.num_frames:
                    doubt = f"{self.library} sees {len(self._video)} frames where there are {self.info.num_frames}"
            except Exception as error:  # ImportError, or any error of the library
                if isinstance(error, UserError):
                    raise
                doubt = f"{self.library} cannot open it ({_first_line(error)})"
        if doubt:
            self._use_pyav(doubt)
        else:
            self._stop()

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        self.check(indices)
        for done, index in enumerate(indices):
            try:
                frame = None if self._video is None else self._frame(index)
            except Exception as error:  # decord raises its own type, IndexError, StopIteration, ...
                frame = None
                self._use_pyav(f"{self.library} failed at frame {index} ({_first_line(error)})")
            if frame is None:
                yield from super().frames(indices[done:])
                return
            yield frame

    def close(self) -> None:
        self._video = None
        super().close()

    @abstractmethod
    def _open(self, file: Any) -> Any:
        """Open a path or an open file with the library. Raises the library's errors."""

    @abstractmethod
    def _frame(self, index: int) -> Frame:
        """Decode a frame, upright, (H, W, 3) uint8 RGB. Raises the library's errors."""

    def _use_pyav(self, why: str) -> None:
        self._video = None
        warn_once(str(self.path), f"{why}; PyAV reads it instead")


@readers.register("decord")
class DecordReader(LibraryReader):
    """A reader of container videos with decord."""

    library = "decord"
    formats = ("mpegts",)
    open_gops = True

    def _open(self, file: Any) -> Any:
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        return decord.VideoReader(file, num_threads=num_threads())

    def _frame(self, index: int) -> Frame:
        frame = self._video[index]
        picture: Frame = frame.asnumpy() if hasattr(frame, "asnumpy") else np.asarray(frame)
        return picture


@readers.register("torchcodec")
class TorchCodecReader(LibraryReader):
    """A reader of container videos with torchcodec on the CPU. The time of each frame is compared with PyAV's.

    Raises UserError if torchcodec, or FFmpeg's libraries that it needs, cannot be loaded.
    """

    library = "torchcodec"
    formats = ("mpegts", "mpeg")
    open_gops = False
    device = "cpu"

    @staticmethod
    def check_installed() -> None:
        """Raise UserError if torchcodec cannot be loaded."""
        _torchcodec()

    def _open(self, file: Any) -> Any:
        return _torchcodec().VideoDecoder(
            file, dimension_order="NHWC", num_ffmpeg_threads=num_threads(), device=self.device
        )

    def _frame(self, index: int) -> Frame:
        found = self._video.get_frame_at(index)
        base = self.source.stream.time_base
        expected = float(int(self.timeline.stamps[index]) * base) if base is not None else 0.0
        if abs(found.pts_seconds - expected) > SAME_TIME:
            raise ValueError(f"its frame is of {found.pts_seconds:.6f} s, not {expected:.6f} s")
        picture: Frame = found.data.cpu().numpy()
        return picture


@readers.register("torchcodec_cuda")
class TorchCodecCudaReader(TorchCodecReader):
    """A reader of container videos with torchcodec on the GPU (NVDEC). Colours may differ from the CPU's by rounding.

    Without a GPU, and in data loader workers, where CUDA cannot be initialised, PyAV reads the file instead.
    """

    device = "cuda"


@cache
def _torchcodec() -> Any:
    """Import torchcodec.decoders. Raises UserError if it cannot be loaded."""
    try:
        from torchcodec import decoders
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"reader torchcodec: the package cannot be loaded ({_first_line(error)}): install the "
            "torchcodec that belongs to this torch, and FFmpeg's shared libraries (Debian's ffmpeg), or use pyav"
        ) from error
    return decoders


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
