"""Picture order of HEVC streams, read from parameter sets and slice headers.

A stored picture names its place in the order of showing: the picture order count (POC), which begins anew at an IDR
picture. Source: ITU-T H.265, 7.3.1.2 to 7.3.6.1 (headers), 8.3.1 (POC). Multi-layer streams are read by their base
layer, which is what FFmpeg shows.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

RADL_RASL = range(6, 10)  # leading pictures; an IRAP picture may be followed by them
BLA, IDR = range(16, 19), range(19, 21)
IRAP = range(16, 24)
SPS, PPS = 33, 34
HEADER_BYTES = 256  # of a unit, at most; a slice header's beginning needs some twenty bits, an SPS some hundred bytes
PERIOD = 1 << 40  # from one IDR picture's place to the next one's; a POC has 32 bits


class _PictureSet(NamedTuple):
    """The fields of a PPS, and of its SPS, on which a slice header's layout depends."""

    sps: int
    has_output_flag: bool
    num_extra_bits: int


class _SequenceSet(NamedTuple):
    lsb_bits: int
    separate_planes: bool


class PictureOrder:
    """Places of a stream's pictures in the order of showing, picture by picture in the order of storing.

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
        """The place of the packet's picture: a later picture's is larger. None when its header cannot be read."""
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
        """Reads a unit; the place of its picture when it is a picture's first slice."""
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


def _units(data: bytes, length_size: int) -> Iterator[bytes]:
    """The beginnings of the units in a packet. length_size: bytes of the length before each; 0: start codes."""
    at = 0
    if length_size:
        while at + length_size < len(data):
            at += length_size
            end = at + int.from_bytes(data[at - length_size : at], "big")
            yield data[at : min(end, at + HEADER_BYTES)]
            at = end
    else:
        at = data.find(b"\0\0\1")
        while at >= 0:
            following = data.find(b"\0\0\1", at + 3)
            end = len(data) if following < 0 else following
            yield data[at + 3 : min(end, at + 3 + HEADER_BYTES)]
            at = following


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
