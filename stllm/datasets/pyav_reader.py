"""Frame-accurate reading of container videos with PyAV: index i is the i-th frame shown, whatever the file.

The timeline is read first (`timeline.py`); each frame wanted is then reached by decoding on or from the keyframe before
it, and is taken only by its presentation time. Where a seek lands wrong (a broken index, a keyframe that is none), an
earlier keyframe and at last the start of the file serve instead; a wrong frame is never handed out.
"""

from collections.abc import Collection, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING

from stllm.common.registry import readers
from stllm.datasets.media_info import Frame, MediaError, MediaInfo, Reader, check_indices, warn_once
from stllm.datasets.orientation import to_rgb, turn_of
from stllm.datasets.timeline import Timeline, average_fps, decoded_timeline, demuxed_timeline
from stllm.datasets.video_source import VideoSource

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

SEEK_COST = 8  # frames: a flushed decoder has to fill its threads and its reorder buffer again
NUM_CHECKED = 3  # frames decoded at opening, to see whether the timeline is what the decoder gives


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
            picture = to_rgb(first, self.turn)
            self.info = MediaInfo(
                kind="video",
                num_frames=self.timeline.num_promised,
                fps=average_fps(self.timeline, self.source.stream),
                width=picture.shape[1],
                height=picture.shape[0],
            )
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

    def times(self, indices: Sequence[int]) -> list[float]:
        self.check(indices)
        return [self.timeline.seconds(index) for index in indices]

    def close(self) -> None:
        self._pass = iter(())
        self._last = None
        self.source.close()

    def check(self, indices: Sequence[int]) -> None:
        """Raises MediaError for indices outside the video, or past where a cut file ends."""
        check_indices(self.path, self.info, indices)
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
        if timeline is not None and stamps[0] is not None:
            timeline = timeline.starting_at(stamps[0])
        if timeline is None or not timeline.begins_with(stamps):
            every_stamp = [frame.pts for _, frame in source.decode(None, counted=True)]
            timeline = decoded_timeline(source.stream, every_stamp)  # after decoding, which opens the file again
        if source.is_cut and timeline.num_promised == timeline.num_readable:
            warn_once(str(self.path), f"the file ends early; the {timeline.num_readable} frames in it are used")
        return timeline, start[0]

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
        if frame is None:
            raise MediaError(
                f"{self.path}: frame {index} of {self.info.num_frames} could not be decoded (damaged data), the "
                f"{index} frames before it could be read; copy or download the file again"
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
