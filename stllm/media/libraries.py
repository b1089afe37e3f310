"""Container videos decoded by other libraries than PyAV, for those who ask for one by name.

PyAV reads the file first, so that indices, times and errors are its own, and takes over wherever the library would give
other frames. PyAV is the default because its reader gave the right frame in every file tried. The libraries, tried on
files whose frames carry their own number, do not:

decord 0.6 silently gives wrong frames after a seek when a picture is stored after a keyframe but shown before it (open
GOPs: HEVC by default, any avi with B-frames) and in MPEG-TS, knows no mirrored display matrix and no AV1; it is also
unmaintained and has no Arm wheel. torchcodec 0.17 gives wrong frames in MPEG-TS, MPEG program streams and where times
do not order the frames, and shows neither mirroring nor transparency. On other files both give the same bytes.
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
    """A container video decoded by another library, or by PyAV where that cannot be used; one note a file says why.

    library: its name. formats: FFmpeg's names of the formats in which it gives wrong frames. open_gops: whether it
    gives wrong frames there. Raises MediaError when the file holds no video that can be decoded.
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
            except Exception as error:  # ImportError, or whatever the library makes of the file
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
            except Exception as error:  # decord raises its own, IndexError, StopIteration, ...
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
        """The library's own reader of a path, or of an open file. Raises whatever the library raises."""

    @abstractmethod
    def _frame(self, index: int) -> Frame:
        """A frame as shown. Raises whatever the library raises."""

    def _use_pyav(self, why: str) -> None:
        self._video = None
        warn_once(str(self.path), f"{why}; PyAV reads it instead")


@readers.register("decord")
class DecordReader(LibraryReader):
    """A container video decoded by decord."""

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
    """A container video decoded by torchcodec on the CPU. Each frame's time is compared with PyAV's.

    Raises UserError when torchcodec, or FFmpeg's libraries that it needs, cannot be loaded.
    """

    library = "torchcodec"
    formats = ("mpegts", "mpeg")
    open_gops = False
    device = "cpu"

    @staticmethod
    def check_installed() -> None:
        """Raise UserError when torchcodec cannot be loaded."""
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
    """A container video decoded by torchcodec on the GPU (NVDEC), whose colours may differ from the CPU's by rounding.

    Without a GPU, and in the data loader's workers, where CUDA cannot begin, PyAV reads the file instead.
    """

    device = "cuda"


@cache
def _torchcodec() -> Any:
    """The module torchcodec.decoders. Raises UserError when it cannot be loaded."""
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
