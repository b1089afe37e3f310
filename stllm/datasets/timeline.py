"""The presentation timeline of a container video: what each frame's index and time are, known without decoding.

Packets are stored in decoding order; their presentation times (pts), sorted, are the frames in the order of showing.
Reading them costs some microseconds a packet and no decoding. The container's own sample index would be cheaper
still, but it holds decoding times only, which is not enough with B-frames.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from av import Packet
    from av.container import InputContainer
    from av.video.stream import VideoStream

Stamps = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Timeline:
    """Frames of one video stream in presentation order.

    stamps: (N,) ascending presentation times, in units of time_base seconds; with `counted`, merely 0 .. N-1.
    keys: (K,) stamps of the keyframes, ascending.
    num_promised: frames the file should hold; more than N when it was cut short.
    open_gops: some pictures are stored after a keyframe but shown before it.
    counted: the stream bears no usable times, so that only counting from its start tells frames apart.
    """

    stamps: Stamps
    keys: Stamps
    time_base: Fraction
    num_promised: int
    open_gops: bool = False
    counted: bool = False

    @property
    def num_readable(self) -> int:
        return len(self.stamps)

    def seconds(self, index: int) -> float:
        """When frame `index` is shown, in seconds after the first frame."""
        return float((int(self.stamps[index]) - int(self.stamps[0])) * self.time_base)

    def key_at(self, stamp: int) -> int:
        """The position in `keys` of the last keyframe shown no later than `stamp`; 0 when there is none."""
        return max(0, int(np.searchsorted(self.keys, stamp, side="right")) - 1)

    def index_at(self, stamp: int) -> int:
        """The index of the first frame shown at `stamp` or later."""
        return int(np.searchsorted(self.stamps, stamp))

    def begins_with(self, stamps: Sequence[int | None]) -> bool:
        """Whether those are its first stamps, one or more."""
        return len(stamps) > 0 and list(stamps) == self.stamps[: len(stamps)].tolist()

    def starting_at(self, stamp: int) -> "Timeline":
        """Without the frames before `stamp`, which the decoder does not give: a film cut inside an open GOP."""
        lost = self.index_at(stamp)
        return replace(
            self,
            stamps=self.stamps[lost:],
            keys=self.keys[self.keys >= stamp],
            num_promised=self.num_promised - lost,
        )


def demuxed_timeline(container: "InputContainer", stream: "VideoStream", *, cut: bool) -> Timeline | None:
    """The timeline from the packets alone; None when they bear no usable times.

    cut: the file is shorter than it should be. What is missing is then promised all the same, and the last packets are
    not trusted: a lost B-frame might have been shown between them.
    """
    from av.error import FFmpegError

    stamps, keys = array("q"), array("q")  # eight bytes a frame, however long the film
    num_hidden, last_dts, open_gops, usable = 0, None, False, True
    try:
        for packet in container.demux(stream):
            if packet.size == 0:
                continue
            if packet.is_discard or _is_hidden(packet, stream.codec_context.name):
                num_hidden += 1
                continue
            if packet.is_corrupt:  # the one across which the file was cut
                continue
            stamp = packet.pts
            if stamp is None and not stream.codec_context.has_b_frames:
                stamp = packet.dts
            if stamp is None:
                usable = False
                continue
            open_gops = open_gops or (bool(keys) and stamp < keys[-1])
            stamps.append(stamp)
            if packet.is_keyframe:
                keys.append(stamp)
            last_dts = packet.dts if packet.dts is not None else last_dts
    except FFmpegError:
        pass  # the file ends here: what is missing shows in num_promised, or as a frame that cannot be decoded
    order = np.unique(np.array(stamps))
    if not usable or len(order) != len(stamps) or not keys:
        return None
    num_promised = len(order)
    if cut:
        if last_dts is not None and stream.codec_context.has_b_frames:
            order = order[order <= last_dts]
        num_promised = max(num_promised, _promised(container, stream, num_hidden))
    return Timeline(order, np.unique(np.array(keys)), _time_base(stream), num_promised, open_gops)


def decoded_timeline(stream: "VideoStream", stamps: Sequence[int | None]) -> Timeline:
    """The timeline from what decoding the whole stream gave: the stamp of every frame, in the order they came."""
    known = np.array([-1 if stamp is None else stamp for stamp in stamps], dtype=np.int64)
    if None in stamps or bool(np.any(np.diff(known) <= 0)):
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        counts = np.arange(len(stamps), dtype=np.int64)
        return Timeline(counts, counts[:1], 1 / Fraction(rate), len(stamps), counted=True)
    return Timeline(known, known[:1], _time_base(stream), len(stamps))


def average_fps(timeline: Timeline, stream: "VideoStream") -> float:
    """Average frames a second: the container's own figure unless the times contradict it; 25 when nothing tells.

    The benchmarks' protocols turn seconds into indices by the container's figure (decord's get_avg_fps). Where the
    container does not count its frames (mkv, webm) that figure is a guess from the first ones.
    """
    stated = float(stream.average_rate or 0)
    span = timeline.seconds(-1) if timeline.num_readable > 1 else 0.0
    if span <= 0:
        return stated or float(stream.guessed_rate or 25)
    measured = (timeline.num_readable - 1) / span
    trusted = stream.frames > 0 or abs(stated - measured) < 0.02 * measured
    return stated if stated > 0 and trusted else measured


def _time_base(stream: "VideoStream") -> Fraction:
    assert stream.time_base is not None  # every demuxer sets it
    return stream.time_base


def _is_hidden(packet: "Packet[VideoStream]", codec: str) -> bool:
    """VP8 stores its hidden reference frames as packets of their own; bit 4 of a frame's first byte is "show"."""
    return codec == "vp8" and not memoryview(packet)[0] & 0x10


def _promised(container: "InputContainer", stream: "VideoStream", num_hidden: int) -> int:
    """Frames that a cut file should hold: as its header counts them, or else by its stated duration."""
    if stream.frames > 0:
        return stream.frames - num_hidden
    if container.duration and stream.average_rate:
        return int(container.duration / 1_000_000 * stream.average_rate)
    return 0
