"""`Timeline`: the number and time of each frame of a video, read from its packets without decoding.

A container stores packets in decoding order. Sorted by presentation time (pts), they are in the order in which the
frames are shown. Reading them takes some microseconds a packet. In some files the times are wrong: the video reader
(video.py) checks the order while it decodes, and if it is wrong, decodes and counts all frames instead.
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
DECODING_TIMES = ("avi", "asf")  # containers without presentation times; FFmpeg guesses them from the decoding times


@dataclass(frozen=True)
class Timeline:
    """The frames of one video stream in the order in which they are shown.

    stamps: (N,) ascending, one for each frame: its presentation time in units of time_base, or 0 .. N-1 if `counted`.
    seconds: (N,), the time from the first frame to each frame.
    keys: (K,), the stamps of the keyframes, ascending.
    num_promised: the number of frames according to the file; more than N if the file is incomplete.
    open_gops: some frames are stored after a keyframe but shown before it.
    counted: the times in the file are wrong, so a frame can be found only by decoding from the start.
    """

    stamps: Stamps
    seconds: "np.ndarray[Any, np.dtype[np.float64]]"
    keys: Stamps
    num_promised: int
    open_gops: bool = False
    counted: bool = False

    @property
    def num_readable(self) -> int:
        """The number of frames that the file holds, N."""
        return len(self.stamps)

    def index_at(self, stamp: int) -> int:
        """Return the index of the first frame whose stamp is `stamp` or later."""
        return int(self.stamps.searchsorted(stamp))

    def begins_with(self, stamps: Sequence[int | None]) -> bool:
        """Check whether the timeline begins with these stamps (at least one)."""
        return len(stamps) > 0 and list(stamps) == self.stamps[: len(stamps)].tolist()

    def starting_at(self, stamp: int) -> "Timeline":
        """Return the timeline without the frames before `stamp`.

        A video that was cut out within an open GOP starts with frames that cannot be decoded.
        """
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
    """Yield all packets of a stream. `demux` alone would stop where another stream begins later (TS, MPEG)."""
    while True:
        with suppress(IndexError):
            yield from container.demux(stream)
            return


def demuxed_timeline(container: "InputContainer", stream: "VideoStream", *, cut: bool) -> Timeline | None:
    """Return the timeline according to the packets, or None if their times are not plausible.

    They are not plausible if a time is missing or occurs twice, if decoding times (dts) do not ascend, or if the codec
    reorders frames in a container that holds only decoding times.

    cut: the file is incomplete. The missing frames then count in num_promised. The last packets are not used, because a
    lost B-frame might belong between them.
    """
    from av.error import FFmpegError

    by_dts, reorders = container.format.name in DECODING_TIMES, stream.codec_context.has_b_frames
    if by_dts and reorders:
        return None
    stamps, keys = array("q"), array("q")  # arrays take 8 bytes a frame
    num_hidden, last_dts, latest, open_gops = 0, None, None, False
    with suppress(FFmpegError):  # the file ends here; num_promised includes the rest
        for packet in packets(container, stream):
            keep_reading()
            if packet.size == 0 or (packet.is_corrupt and not packet.is_discard):  # the last one of a cut file
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
        if stream.frames > 0:  # from the header, or else from the duration in it
            num_promised = max(num_promised, stream.frames - num_hidden)
        elif container.duration and stream.average_rate:
            num_promised = max(num_promised, int(container.duration / 1_000_000 * stream.average_rate))
    return Timeline(order, _seconds(order, stream), np.unique(np.array(keys)), num_promised, open_gops)


def counted_timeline(stream: "VideoStream", stamps: Sequence[int | None]) -> Timeline:
    """Return the timeline of a stream that was decoded from start to end.

    stamps: one for each frame, in the order of decoding; None: unknown. The known times are assigned to their frames in
    ascending order. Frames between them are spaced evenly. If a time occurs twice, or fewer than two are known, all
    frames are spaced evenly.
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
    """Return the average frames a second: the rate in the container's header if the frames' times agree with it.

    Otherwise the rate is computed from the times; without times it is 25. The benchmarks' protocols use the header's
    rate (decord's get_avg_fps). A header that also counts the frames includes the duration of the last frame in its
    rate; it is rejected only if the video would end before its last frame is shown. Other containers (mkv, webm)
    estimate the rate from the first frames.
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
