"""The index of a container video: the number and time of each frame.

Packets are stored in decoding order. Their presentation times (pts), sorted, give the order in which the frames are
shown. Reading them takes some microseconds a packet and no decoding. That order is used only where the whole index
agrees with the codec; otherwise the video is decoded once and its frames are counted.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from stllm.media.time_bound import keep_reading

if TYPE_CHECKING:
    from av import Packet
    from av.container import InputContainer
    from av.video.stream import VideoStream

Stamps = np.ndarray[Any, np.dtype[np.int64]]
DECODING_TIMES = ("avi", "asf")  # containers that hold decoding times only; FFmpeg guesses presentation times from them
# Of HEVC's units:
RADL_RASL = range(6, 10)  # leading pictures; an IRAP picture may be followed by them
BLA, IDR = range(16, 19), range(19, 21)
IRAP = range(16, 24)
SPS, PPS = 33, 34
HEADER_BYTES = 256  # of a unit, at most; a slice header's beginning needs some twenty bits, an SPS some hundred bytes
PERIOD = 1 << 40  # from one IDR picture's place to the next one's; a POC has 32 bits


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

    def key_at(self, stamp: int) -> int:
        """The position in `keys` of the last keyframe shown no later than `stamp`; 0 when there is none."""
        return max(0, int(np.searchsorted(self.keys, stamp, side="right")) - 1)

    def index_at(self, stamp: int) -> int:
        """The index of the first frame shown at `stamp` or later."""
        return int(np.searchsorted(self.stamps, stamp))

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
    """The stream's packets.

    In a transport stream, another stream can begin in the middle of the file. PyAV fails at its first packet, which is
    left out; reading goes on behind it.
    """
    while True:
        with suppress(IndexError):
            yield from container.demux(stream)
            return


def demuxed_timeline(container: "InputContainer", stream: "VideoStream", *, cut: bool) -> Timeline | None:
    """The timeline from the packets alone; None unless all of them have plausible times.

    Times are rejected when one is missing or used twice, when decoding times (dts) do not ascend, and when the order
    that they give contradicts the codec. HEVC states the order of its pictures. In older codecs a B picture is shown
    before a picture that is stored before it, and no other picture is. Where neither is known, a codec that reorders
    frames must have times that do so, and any other codec must not.

    cut: the file is shorter than it should be. The missing frames are then still promised, and the last packets are
    not trusted: a lost B-frame might have been shown between them.
    """
    from av.error import FFmpegError

    context = stream.codec_context
    codec, by_dts, reorders = context.name, container.format.name in DECODING_TIMES, context.has_b_frames
    length_size = _length_size(context.extradata) if codec == "h264" else 0
    hevc = PictureOrder(context.extradata) if codec == "hevc" else None
    stamps, keys, places = array("q"), array("q"), array("q")  # eight bytes a frame each, however long the film
    num_hidden, last_dts, latest = 0, None, None
    usable, typed, reordered, open_gops = True, False, False, False
    try:
        for packet in packets(container, stream):
            keep_reading()
            if packet.size == 0:
                continue
            place = None if hevc is None else hevc.place(bytes(packet))  # of hidden pictures, too: others count on
            if packet.is_discard or _is_hidden(packet, codec):
                num_hidden += 1
                continue
            if packet.is_corrupt:  # the one across which the file was cut
                continue
            dts = packet.dts
            stamp = dts if by_dts else packet.pts
            if stamp is None and not reorders:
                stamp = dts
            if stamp is None:
                usable = False
                continue
            if dts is not None:
                usable = usable and (last_dts is None or dts > last_dts) and stamp >= dts
                last_dts = dts
            is_earlier = latest is not None and stamp < latest
            reordered = reordered or is_earlier
            if usable and (is_b := _is_b_picture(packet, codec, length_size)) is not None:
                typed, usable = True, is_b == is_earlier
            open_gops = open_gops or (is_earlier and bool(keys) and stamp < keys[-1])
            latest = stamp if latest is None else max(latest, stamp)
            stamps.append(stamp)
            if place is not None:
                places.append(place)
            if packet.is_keyframe:
                keys.append(stamp)
    except FFmpegError:
        pass  # the file ends here: what is missing shows in num_promised, or as a frame that cannot be decoded
    order = np.unique(np.array(stamps))
    if not usable or len(order) != len(stamps) or not keys:
        return None
    if hevc is not None:
        if len(places) != len(stamps) or (np.diff(np.array(stamps)[np.argsort(places)]) <= 0).any():
            return None
    elif not typed and reorders != reordered:
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


def _is_hidden(packet: "Packet[VideoStream]", codec: str) -> bool:
    """Check for a hidden reference frame, which VP8 stores as a packet; bit 4 of a frame's first byte is "show"."""
    return codec == "vp8" and not memoryview(packet)[0] & 0x10


def _length_size(extradata: bytes | None) -> int:
    """Bytes of the length before each H.264 unit, as mp4 and mkv store it; 0 where start codes separate units."""
    return (extradata[4] & 3) + 1 if extradata and len(extradata) > 4 and extradata[0] == 1 else 0


def _is_b_picture(packet: "Packet[VideoStream]", codec: str, length_size: int) -> bool | None:
    """Check whether the packet holds a B picture; None for another codec, or when no picture header is found.

    Sources: ISO/IEC 13818-2 (picture header), 14496-2 (video object plane), 14496-10 (slice header).
    """
    if codec == "h264":
        units = _units(memoryview(packet) if length_size else bytes(packet), length_size)
        slice_start = next((unit[1] for unit in units if len(unit) > 1 and unit[0] & 31 in (1, 5)), 0)  # nal_unit_type
        # Two Exp-Golomb codes: first_mb_in_slice is 0 (1), slice_type is B: 1 (010) or 6 (00111).
        return None if slice_start < 0x80 else slice_start >> 4 & 7 == 0b010 or slice_start >> 2 & 31 == 0b00111
    if codec == "mpeg4":  # a packet may hold several planes ("packed bitstream", as DivX and XviD write it)
        planes = bytes(packet).split(b"\0\0\1\xb6")[1:]
        return any(plane[:1] >= b"\x80" and plane[0] < 0xC0 for plane in planes) if planes else None
    if codec in ("mpeg1video", "mpeg2video"):
        header = bytes(packet).partition(b"\0\0\1\0")[2][:2]
        return header[1] >> 3 & 7 == 3 if len(header) == 2 else None
    return None


# ---- HEVC ------------------------------------------------------------------------------------------------------------


class _PictureSet(NamedTuple):
    """The fields of a PPS, and of its SPS, on which a slice header's layout depends."""

    sps: int
    has_output_flag: bool
    num_extra_bits: int


class _SequenceSet(NamedTuple):
    lsb_bits: int
    separate_planes: bool


class PictureOrder:
    """Places of an HEVC stream's pictures in the order of showing, picture by picture in the order of storing.

    A stored picture names its place: the picture order count (POC), which begins anew at an IDR picture. It is read
    from parameter sets and slice headers. Source: ITU-T H.265, 7.3.1.2 to 7.3.6.1 (headers), 8.3.1 (POC). Multi-layer
    streams are read by their base layer, which is what FFmpeg shows.

    extradata: the codec context's, with the parameter sets that are not stored between the pictures.
    """

    def __init__(self, extradata: bytes | None) -> None:
        self._sequences: dict[int, _SequenceSet] = {}
        self._pictures: dict[int, _PictureSet] = {}
        self._period, self._previous = -PERIOD, 0  # where this one's POC begins; the POC that the next one's continues
        self._length_size = 0
        extradata = extradata or b""
        if extradata[:1] == b"\1" and len(extradata) > 22:  # hvcC, ISO/IEC 14496-15
            self._length_size = (extradata[21] & 3) + 1
            units = _units_of_arrays(extradata)
        else:
            units = _units(extradata, 0)
        self._read(units)

    def place(self, packet: bytes) -> int | None:
        """The place of the packet's picture; later pictures have larger ones. None when its header cannot be read."""
        return self._read(_units(packet, self._length_size))

    def _read(self, units: Iterable[bytes]) -> int | None:
        try:
            for unit in units:
                place = self._take(unit)
                if place is not None:
                    return place
        except (IndexError, KeyError):  # cut headers, or parameter sets that never came
            pass
        return None

    def _take(self, unit: bytes) -> int | None:
        """Read a unit. Return the picture's place if the unit is the picture's first slice."""
        if len(unit) < 3:
            return None
        kind, layer, temporal_id = unit[0] >> 1 & 63, (unit[0] & 1) << 5 | unit[1] >> 3, (unit[1] & 7) - 1
        if layer or not (kind < 32 or kind in (SPS, PPS)):
            return None
        bits = _Bits(unit[2:])
        if kind == SPS:
            self._take_sequence_set(bits)
            return None
        if kind == PPS:
            number = bits.exp_golomb()
            self._pictures[number] = _PictureSet(bits.exp_golomb(), bits.read(2) & 1 == 1, bits.read(3))
            return None
        if not bits.read(1):  # not the picture's first slice
            return None
        bits.read(1 if kind in IRAP else 0)
        picture = self._pictures[bits.exp_golomb()]
        sequence = self._sequences[picture.sps]
        bits.read(picture.num_extra_bits)
        bits.exp_golomb()  # slice_type
        bits.read(picture.has_output_flag + 2 * sequence.separate_planes)
        count = 0 if kind in IDR else bits.read(sequence.lsb_bits)
        if kind in IDR or kind in BLA or self._period < 0:
            self._period += PERIOD
        else:  # as near to the previous picture's as its last bits allow
            size = 1 << sequence.lsb_bits
            count = self._previous + (count - self._previous + size // 2) % size - size // 2
        if temporal_id == 0 and kind not in RADL_RASL and (kind > 14 or kind % 2):
            self._previous = count
        return self._period + count

    def _take_sequence_set(self, bits: "_Bits") -> None:
        bits.read(4)
        num_sub_layers = bits.read(3)
        bits.read(1 + 88 + 8)  # profile, tier and level
        present = [bits.read(2) for _ in range(num_sub_layers)]
        bits.read(2 * (8 - num_sub_layers) if num_sub_layers else 0)
        for flags in present:
            bits.read(88 * (flags >> 1) + 8 * (flags & 1))
        number = bits.exp_golomb()
        separate_planes = bits.exp_golomb() == 3 and bits.read(1) == 1
        bits.exp_golomb()  # width and height
        bits.exp_golomb()
        for _ in range(4 * bits.read(1)):  # conformance window
            bits.exp_golomb()
        bits.exp_golomb()  # bit depths
        bits.exp_golomb()
        lsb_bits = bits.exp_golomb() + 4
        if lsb_bits <= 16:  # more is damage
            self._sequences[number] = _SequenceSet(lsb_bits, separate_planes)


class _Bits:
    """Reads a unit's payload bit by bit. Raises IndexError past its end."""

    def __init__(self, payload: bytes) -> None:
        data = payload.replace(b"\0\0\3", b"\0\0")  # emulation prevention
        self._bits, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def read(self, count: int) -> int:
        self._left -= count
        if self._left < 0:
            raise IndexError
        return self._bits >> self._left & (1 << count) - 1

    def exp_golomb(self) -> int:
        zeros = 0
        while not self.read(1):
            zeros += 1
        return (1 << zeros) - 1 + self.read(zeros)


def _units(data: bytes | memoryview, length_size: int) -> Iterator[bytes]:
    """The beginnings of the units in a packet. length_size: bytes of the length before each; 0: start codes."""
    at = 0
    if isinstance(data, memoryview) or length_size:
        while at + length_size < len(data):
            at += length_size
            end = at + int.from_bytes(data[at - length_size : at], "big")
            yield bytes(data[at : min(end, at + HEADER_BYTES)])
            at = end
    else:
        at = data.find(b"\0\0\1") + 3
        while at >= 3:
            end = data.find(b"\0\0\1", at, at + HEADER_BYTES)
            yield data[at : at + HEADER_BYTES if end < 0 else end]
            at = data.find(b"\0\0\1", at) + 3


def _units_of_arrays(extradata: bytes) -> Iterator[bytes]:
    """The parameter sets in an hvcC record."""
    at = 23
    for _ in range(extradata[22]):
        count, at = int.from_bytes(extradata[at + 1 : at + 3], "big"), at + 3
        for _ in range(count):
            if at >= len(extradata):
                return
            length = int.from_bytes(extradata[at : at + 2], "big")
            yield extradata[at + 2 : at + 2 + length]
            at += 2 + length
