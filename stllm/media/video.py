"""Frame-accurate reading of container videos with PyAV: index i is the i-th frame shown, whatever the file.

The timeline is read first (`timeline.py`). Each frame is then reached by decoding on or from the keyframe before it,
and is recognised by its presentation time. Where a seek fails (a broken index, a false keyframe), the reader decodes
from an earlier keyframe and at last from the start of the file. Where times do not order the frames, the video is
decoded once to count its frames, and each is then found by decoding from the start.
"""

from collections.abc import Collection, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stllm.common.registry import readers
from stllm.media.info import Frame, MediaError, MediaInfo, Reader, decoder_options, warn_once
from stllm.media.orientation import is_transparent, to_rgb, turn_of
from stllm.media.timeline import Timeline, average_fps, counted_timeline, demuxed_timeline
from stllm.media.video_source import VideoSource

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

MAX_COUNTED = 4_000_000  # frames of which the counted timelines are kept, 16 bytes each
SEEK_COST = 8  # frames: a flushed decoder has to fill its threads and its reorder buffer again
NUM_CHECKED = 3  # frames decoded at opening, to see whether the timeline is what the decoder gives


_counted: dict[tuple[str, int, int, int], Timeline] = {}  # the oldest first; each data worker has its own


def _identity(path: Path) -> tuple[str, int, int, int]:
    stat = path.stat()
    return str(path.absolute()), stat.st_ino, stat.st_size, stat.st_mtime_ns


@readers.register("pyav")
class PyAvReader(Reader):
    """A container video (mp4, webm, avi, mov, mkv).

    Raises MediaError when the file holds no video that can be decoded.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.source = VideoSource(self.path)
        self._warned = False
        self._pass: Iterator[tuple[int, VideoFrame]] = iter(())
        self._wanted: Collection[int] = ()  # stamps that the running pass does not leave out
        self._last: int | None = None  # stamp of the frame that the running pass gave last; None: no pass runs
        try:
            self.timeline, first = self._read_timeline()
            self.turn = turn_of(first)  # the whole stream's
            self.transparent = is_transparent(first)
            picture = to_rgb(first, self.turn)
            self.info = MediaInfo(
                kind="video",
                num_frames=self.timeline.num_promised,
                fps=average_fps(self.timeline, self.source.stream),
                width=picture.shape[1],
                height=picture.shape[0],
            )
            missing = self.info.num_frames - self.timeline.num_readable  # of a file that was cut
            later = self.timeline.seconds[-1] + np.arange(1, missing + 1) / self.info.fps
            self.seconds = np.concatenate([self.timeline.seconds, later])
        except BaseException:
            self.close()
            raise
        self._seekable = not self.timeline.counted and len(self.timeline.keys) > 1

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        self.check(indices)
        wanted = frozenset(int(self.timeline.stamps[index]) for index in indices)
        for index, repeats in groupby(indices):
            picture = to_rgb(self._frame_at(index, wanted), self.turn)
            for _ in range(len(list(repeats)) - 1):
                yield picture.copy()  # callers may write into theirs
            yield picture

    def close(self) -> None:
        self._pass = iter(())
        self._last = None
        self.source.close()

    def check(self, indices: Sequence[int]) -> None:
        """Raises MediaError for indices outside the video, or past where a cut file ends."""
        super().check(indices)
        for index in indices:
            if index >= self.timeline.num_readable:
                raise MediaError(
                    f"{self.path}: the file is cut short: frame {index} was asked for, but of the "
                    f"{self.info.num_frames} frames it should hold {self.timeline.num_readable} could be read; "
                    "copy or download it again"
                )

    def _read_timeline(self) -> "tuple[Timeline, VideoFrame]":
        """The timeline, checked against the first frames that the decoder really gives, and the first of those."""
        source = self.source
        timeline = _counted.get(_identity(self.path))
        counted = timeline is not None
        if timeline is None:
            timeline = demuxed_timeline(source.container, source.stream, cut=source.is_cut)
            source.strict = timeline is not None and not timeline.open_gops
        start = self._first_frames()
        if source.strict and (timeline is None or not timeline.begins_with([frame.pts for frame in start])):
            source.strict = False
            start = self._first_frames()
        if not start:
            codec = source.stream.codec_context.name
            raise MediaError(
                f"{self.path}: 0 frames of its {codec} video could be read (damaged data); expected at least one: "
                "copy or download it again"
            )
        stamps = [frame.pts for frame in start]
        if timeline is not None and not counted and stamps[0] is not None:
            timeline = timeline.starting_at(stamps[0])
        if timeline is None or not (counted or timeline.begins_with(stamps)):
            timeline = self._count(self._decoded_stamps())
        if source.is_cut and timeline.num_promised == timeline.num_readable:
            warn_once(str(self.path), f"the file ends early; the {timeline.num_readable} frames in it are used")
        return timeline, start[0]

    def _decoded_stamps(self) -> list[int | None]:
        """The stamp of every frame, in the order in which decoding the whole video gives them."""
        return [frame.pts for _, frame in self.source.decode(None, counted=True)]

    def _count(self, stamps: list[int | None]) -> Timeline:
        """The timeline by those stamps; it is kept, so that a process counts the frames of a file once."""
        timeline = counted_timeline(self.source.stream, stamps)
        if timeline.num_readable <= MAX_COUNTED:
            _counted[_identity(self.path)] = timeline
        while sum(known.num_readable for known in list(_counted.values())) > MAX_COUNTED:
            _counted.pop(next(iter(_counted)), None)
        return timeline

    def _first_frames(self) -> "list[VideoFrame]":
        return [frame for _, frame in islice(self.source.decode(None, counted=True), NUM_CHECKED)]

    def _frame_at(self, index: int, wanted: Collection[int]) -> "VideoFrame":
        """Frame `index`, as it was stored, or as the decoder mends it where the file is damaged."""
        stamp = int(self.timeline.stamps[index])
        if self._wanted is not wanted:  # the running pass may have left out what this caller wants
            self._wanted, self._last = wanted, None
        frame = self._find(stamp)
        if frame is None and self.source.strict:
            self.source.strict = False
            self.source.reopen()
            frame = self._find(stamp)
        if frame is None and not self.timeline.counted:
            stamps = self._decoded_stamps()
            if len(stamps) == self.timeline.num_readable and stamps != self.timeline.stamps.tolist():
                self.timeline, self._seekable = self._count(stamps), False  # whole, but in another order
                self._last = None
                return self._frame_at(index, ())
        if frame is None:
            most = decoder_options().get("max_pixels")
            larger = f", or a picture of more than {most} pixels" if most else ""
            raise MediaError(
                f"{self.path}: frame {index} of {self.info.num_frames} could not be decoded (damaged data{larger}), "
                f"the {index} frames before it could be read; copy or download the file again"
            )
        if self.source.num_damaged and not self._warned:
            self._warned = True
            warn_once(str(self.path), f"damaged data up to frame {index}; pictures are shown as far as mended")
        return frame

    def _find(self, stamp: int) -> "VideoFrame | None":
        """The frame of that stamp, by the cheapest way that leads to it; None when none does."""
        if self._last is not None and self._last < stamp and not self._seek_is_cheaper(stamp):
            frame = self._reach(stamp)
            if frame is not None:
                return frame
        for key in self._starts(stamp):
            counted = self.timeline.counted  # then no frame may be left out
            self._pass = self.source.decode(key, wanted=None if counted else self._wanted, counted=counted)
            frame = self._reach(stamp)
            if frame is not None:
                # A frame that only decoding from the start gives: the index lies, and one lie is enough.
                self._seekable = self._seekable and (key is not None or self.timeline.key_at(stamp) == 0)
                return frame
        return None

    def _starts(self, stamp: int) -> Iterator[int | None]:
        """Keyframes to decode from, the nearest first; at last None, the start of the file."""
        nearest = self.timeline.key_at(stamp)
        if self._seekable:
            yield from (int(self.timeline.keys[at]) for at in (nearest, nearest - 1) if at > 0)
        yield None

    def _seek_is_cheaper(self, stamp: int) -> bool:
        key = int(self.timeline.keys[self.timeline.key_at(stamp)])
        assert self._last is not None
        return self._seekable and self.timeline.index_at(key) - self.timeline.index_at(self._last) > SEEK_COST

    def _reach(self, stamp: int) -> "VideoFrame | None":
        """Decodes on to the frame of that stamp; None when it does not come, or comes damaged."""
        self._last = None
        for found, frame in self._pass:
            if found > stamp:
                return None
            if found == stamp:
                if frame.is_corrupt:
                    return None
                self._last = found
                return frame
        return None
