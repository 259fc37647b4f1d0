"""What the heads of H.264's slices say that libav does not (ITU-T H.264, 7.3 and 7.4.3).

Which packets hold one field alone, two of which make a picture; and before which of them a packet is missing, in whose
place libav takes an older picture without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

_SLICES, _SEQUENCE = (1, 2, 5), 7  # types of NAL units
_INTRA = (2, 4)  # kinds of slices
_SLICE_HEAD = 20  # bytes of a slice that hold what is read of it

# Profiles whose sequences say how colours are stored.
_HIGH = (44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244)


@dataclass(frozen=True)
class _Sequence:
    """What a sequence parameter set says of the heads of slices, and of the pictures that there may be.

    Attributes:
        plane_bits: Of the number of a colour plane.
        number_bits: Of a frame's number.
        gaps: Whether numbers may be left out.
        fields: Whether a slice may be of one field.
    """

    plane_bits: int
    number_bits: int
    gaps: bool
    fields: bool


def slice_reader(extradata: bytes | None) -> Callable[[bytes, bool], tuple[bool, bool]] | None:
    """What is asked of each packet in turn, and told if it is a keyframe: is it one field, is one missing before it?

    A packet is missing if others depend on its frame and the number that such frames have leaves one out. The stream's
    first sequence parameter set is taken to hold until a packet has another; if none can be read, the answer is None,
    and the stream counts as whole and progressive.
    """
    data = extradata or b""
    configured = data[:1] == b"\1"  # as MP4 and Matroska store it: lengths before the units, not start codes
    length_bytes = (data[4] & 3) + 1 if configured and len(data) > 6 else 0
    units = _units(data[6:], 2) if configured else _units(data, 0)
    try:
        first = next((_sequence(unit) for unit in units if unit[0] & 31 == _SEQUENCE), None)
    except ValueError:
        return None
    if first is None or (first.gaps and not first.fields):
        return None
    sequence = first
    last: int | None = None  # number of a frame that others may depend on

    def read(packet: bytes, is_key: bool) -> tuple[bool, bool]:
        nonlocal last, sequence
        parities, missing = set[str](), False
        try:
            for unit in _units(packet, length_bytes):
                if unit[0] & 31 == _SEQUENCE:
                    sequence = _sequence(unit)
                if unit[0] & 31 not in _SLICES:
                    continue
                number, is_intra, parity = _head(unit, sequence)
                parities.add(parity)
                if last is not None and not (is_key and is_intra):  # which needs none of those before
                    missing |= (number - last) % (1 << sequence.number_bits) > 1
                if unit[0] & 0x60:
                    last = number
                if not sequence.fields:
                    break
        except ValueError:
            parities.clear()
        return parities in ({"top"}, {"bottom"}), missing and not sequence.gaps

    return read


def _units(data: bytes, length_bytes: int) -> Iterator[bytes]:
    """The NAL units of a packet, behind lengths of so many bytes; for 0, behind start codes and up to the end."""
    at = 0
    if not length_bytes:
        while (at := data.find(b"\0\0\1", at) + 3) > 2 and at < len(data):
            yield data[at:]
    while length_bytes and at + length_bytes < len(data):
        start = at + length_bytes
        at = start + int.from_bytes(data[at:start], "big")
        if at > start:
            yield data[start:at]


def _sequence(unit: bytes) -> _Sequence:
    bits = _Bits(unit)
    profile = bits.fixed(8)
    bits.fixed(16)
    bits.number()
    planes = 0
    if profile in _HIGH:
        chroma = bits.number()
        planes = bits.fixed(1) if chroma == 3 else 0  # each colour is a picture of its own
        bits.skip_numbers(2)
        bits.fixed(1)
        if bits.fixed(1):
            for matrix in range(12 if chroma == 3 else 8):
                if bits.fixed(1):
                    bits.skip_scaling_list(16 if matrix < 6 else 64)
    number_bits = bits.number() + 4
    order = bits.number()
    if order == 0:
        bits.number()
    elif order == 1:
        bits.fixed(1)
        bits.skip_numbers(2)
        bits.skip_numbers(bits.number())
    bits.number()
    gaps = bits.fixed(1)
    bits.skip_numbers(2)
    return _Sequence(2 * planes, number_bits, bool(gaps), not bits.fixed(1))


def _head(unit: bytes, sequence: _Sequence) -> tuple[int, bool, str]:
    """Number of a slice's frame; whether it depends on no other; `top`, `bottom` or `frame`."""
    bits = _Bits(unit[:_SLICE_HEAD])
    bits.number()
    kind = bits.number()
    bits.number()
    number = bits.fixed(sequence.plane_bits + sequence.number_bits) % (1 << sequence.number_bits)
    one_field = sequence.fields and bits.fixed(1)
    return number, kind % 5 in _INTRA, ("top", "bottom")[bits.fixed(1)] if one_field else "frame"


class _Bits:
    """A NAL unit's bits behind its first byte. All raise ValueError at the end of it."""

    def __init__(self, unit: bytes) -> None:
        data = unit[1:].replace(b"\0\0\3", b"\0\0")
        self._bits = f"{int.from_bytes(data):0{8 * len(data)}b}" if data else ""
        self._at = 0

    def fixed(self, count: int) -> int:
        """An unsigned number of so many bits."""
        self._at += count
        return int(self._bits[self._at - count : self._at], 2)

    def number(self) -> int:
        """An Exp-Golomb number, unsigned (9.1)."""
        zeros = self._bits.index("1", self._at) - self._at
        self._at += zeros
        return self.fixed(zeros + 1) - 1

    def skip_numbers(self, count: int) -> None:
        """Pass so many of them."""
        for _ in range(count):
            self.number()

    def skip_scaling_list(self, size: int) -> None:
        """Pass a list of which each number says how it differs from the last, up to one that comes to 0."""
        last = 8
        for _ in range(size):
            code = self.number()
            last = (last + (code + 1) // 2 * (1 if code % 2 else -1)) % 256
            if not last:
                return
