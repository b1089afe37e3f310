"""The index of a container video: the number and time of each frame.

Packets are stored in decoding order. Their presentation times (pts), sorted, give the order in which the frames are
shown. Reading them takes some microseconds a packet and no decoding. Some files hold times that do not order their
frames: the reader of the video checks the order while it decodes (video.py), and counts the frames where it is wrong.
"""

from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from stllm.media.time_bound import keep_reading

if TYPE_CHECKING:
    from av import Packet
    from av.container import InputContainer
    from av.video.stream import VideoStream

Stamps = np.ndarray[Any, np.dtype[np.int64]]
DECODING_TIMES = ("avi", "asf")  # containers that hold decoding times only; FFmpeg guesses presentation times from them


@dataclass(frozen=True)
class Timeline:
    """Frames of one video stream in presentation order.

    stamps: (N,) ascending; each identifies a frame: its presentation time in units of time_base, or 0 .. N-1 with
        `counted`.
    seconds: (N,) when each frame is shown, after the first one.
    keys: (K,) stamps of the keyframes, ascending.
    num_promised: frames the file should hold; more than N when it was cut short.
    open_gops: some pictures are stored after a keyframe but shown before it.
    counted: the stream's times do not order its frames, so that frames are found only by decoding from the start.
    """

    stamps: Stamps
    seconds: "np.ndarray[Any, np.dtype[np.float64]]"
    keys: Stamps
    num_promised: int
    open_gops: bool = False
    counted: bool = False

    @property
    def num_readable(self) -> int:
        return len(self.stamps)

    def index_at(self, stamp: int) -> int:
        """The index of the first frame shown at `stamp` or later."""
        return int(self.stamps.searchsorted(stamp))

    def begins_with(self, stamps: Sequence[int | None]) -> bool:
        """Check whether the timeline starts with these stamps, one or more."""
        return len(stamps) > 0 and list(stamps) == self.stamps[: len(stamps)].tolist()

    def starting_at(self, stamp: int) -> "Timeline":
        """The timeline without the frames before `stamp`. The decoder lacks them in a film cut inside an open GOP."""
        lost = self.index_at(stamp)
        if lost in (0, self.num_readable):
            return self
        return replace(
            self,
            stamps=self.stamps[lost:],
            seconds=self.seconds[lost:] - self.seconds[lost],
            keys=self.keys[self.keys >= stamp],
            num_promised=self.num_promised - lost,
        )


def packets(container: "InputContainer", stream: "VideoStream") -> "Iterator[Packet[VideoStream]]":
    """All packets of the stream; av's own loop ends at the first packet of a stream that appears late (TS, MPEG)."""
    while True:
        with suppress(IndexError):
            yield from container.demux(stream)
            return


def demuxed_timeline(container: "InputContainer", stream: "VideoStream", *, cut: bool) -> Timeline | None:
    """The timeline from the packets alone; None unless all of them have plausible times.

    Times are rejected when one is missing or used twice, when decoding times (dts) do not ascend, and in a container
    that holds only these when the codec reorders frames.

    cut: the file is shorter than it should be. The missing frames are then still promised, and the last packets are
    not trusted: a lost B-frame might have been shown between them.
    """
    from av.error import FFmpegError

    by_dts, reorders = container.format.name in DECODING_TIMES, stream.codec_context.has_b_frames
    if by_dts and reorders:
        return None
    stamps, keys = array("q"), array("q")  # eight bytes a frame each, however long the film
    num_hidden, last_dts, latest, open_gops = 0, None, None, False
    with suppress(FFmpegError):  # the file ends there: num_promised counts the rest, or it fails to be decoded
        for packet in packets(container, stream):
            keep_reading()
            if packet.size == 0 or (packet.is_corrupt and not packet.is_discard):  # the one across which a file was cut
                continue
            # VP8 stores hidden reference frames as packets; bit 4 of a frame's first byte is "show" (RFC 6386, 9.1).
            if packet.is_discard or (stream.codec_context.name == "vp8" and not memoryview(packet)[0] & 0x10):
                num_hidden += 1
                continue
            dts = packet.dts
            stamp = dts if by_dts or (packet.pts is None and not reorders) else packet.pts
            if stamp is None or (dts is not None and (stamp < dts or (last_dts is not None and dts <= last_dts))):
                return None
            last_dts = last_dts if dts is None else dts
            open_gops = open_gops or (latest is not None and bool(keys) and stamp < min(latest, keys[-1]))
            latest = stamp if latest is None else max(latest, stamp)
            stamps.append(stamp)
            if packet.is_keyframe:
                keys.append(stamp)
    order = np.unique(np.array(stamps))
    if len(order) != len(stamps) or not keys:
        return None
    num_promised = len(order)
    if cut:
        if last_dts is not None and reorders:
            order = order[order <= last_dts]
        if stream.frames > 0:  # as the header counts them, or else by the duration that it states
            num_promised = max(num_promised, stream.frames - num_hidden)
        elif container.duration and stream.average_rate:
            num_promised = max(num_promised, int(container.duration / 1_000_000 * stream.average_rate))
    return Timeline(order, _seconds(order, stream), np.unique(np.array(keys)), num_promised, open_gops)


def counted_timeline(stream: "VideoStream", stamps: Sequence[int | None]) -> Timeline:
    """The timeline of a stream that was decoded whole. stamps: of every frame, in the order in which they were decoded.

    The k-th frame gets the k-th time in ascending order. Frames without a time are spaced evenly between those that
    have one. Where times are doubled or fewer than two are known, all frames are spaced evenly.
    """
    indices = np.arange(len(stamps), dtype=np.int64)
    places = np.array([index for index, stamp in enumerate(stamps) if stamp is not None])
    known = np.unique(np.array([stamp for stamp in stamps if stamp is not None], dtype=np.int64))
    if len(known) == len(places) >= 2:
        step = (known[-1] - known[0]) / (places[-1] - places[0])
        before, after = np.minimum(indices - places[0], 0), np.maximum(indices - places[-1], 0)
        seconds = _seconds(np.interp(indices, places, known) + (before + after) * step, stream)
    else:
        seconds = indices / float(stream.average_rate or stream.guessed_rate or 25)
    return Timeline(indices, seconds, indices[:1], len(stamps), counted=True)


def average_fps(timeline: Timeline, stream: "VideoStream") -> float:
    """Average frames a second: the container's own figure unless the frames' times contradict it; 25 without either.

    The benchmarks' protocols turn seconds into indices by the container's figure (decord's get_avg_fps). Containers
    that count their frames include how long the last one is shown, so theirs is contradicted only when the video would
    end before its last frame is shown. Others (mkv, webm) guess the figure from the first frames.
    """
    stated = float(stream.average_rate or 0)
    count, span = timeline.num_readable, float(timeline.seconds[-1])
    if span <= 0:
        return stated or float(stream.guessed_rate or 25)
    measured = (count - 1) / span
    agrees = abs(stated - measured) < 0.02 * measured
    return stated if stated > 0 and (agrees or (stream.frames > 0 and count / stated > span)) else measured


def _seconds(stamps: "np.ndarray[Any, Any]", stream: "VideoStream") -> "np.ndarray[Any, np.dtype[np.float64]]":
    assert stream.time_base is not None  # every demuxer sets it
    return (stamps - stamps[:1]) * stream.time_base.numerator / stream.time_base.denominator
