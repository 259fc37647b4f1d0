"""Which packets of interlaced H.264 hold one field alone, two of which make a picture (ITU-T H.264, 7.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

_SLICES, _SEQUENCE = (1, 2, 5), 7  # types of NAL units
_SLICE_HEAD = 20  # bytes of a slice that hold what is read of it

# Profiles whose sequences say how colours are stored.
_HIGH = (44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244)


def field_finder(extradata: bytes | None) -> Callable[[bytes], bool] | None:
    """What says of a packet whether all of it is one field; None for streams that have no fields.

    The first sequence parameter set of the stream's header is taken to hold for all of it; without one that can be
    read, the stream counts as progressive.
    """
    data = extradata or b""
    configured = data[:1] == b"\1"  # as MP4 and Matroska store it: lengths before the units, not start codes
    length_bytes = (data[4] & 3) + 1 if configured and len(data) > 6 else 0
    units = _units(data[6:], 2) if configured else _units(data, 0)
    try:
        skipped_bits = next((_frame_number_bits(unit) for unit in units if unit[0] & 31 == _SEQUENCE), None)
    except ValueError:
        return None
    if skipped_bits is None:
        return None

    def is_one_field(packet: bytes) -> bool:
        slices = (unit for unit in _units(packet, length_bytes) if unit[0] & 31 in _SLICES)
        try:
            parities = {_parity(unit, skipped_bits) for unit in slices}
        except ValueError:
            return False
        return parities in ({"top"}, {"bottom"})

    return is_one_field


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


def _frame_number_bits(sequence: bytes) -> int | None:
    """Bits in a slice from the picture parameter set's number to field_pic_flag; None where there is no such flag."""
    bits = _Bits(sequence)
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
    frame_number = bits.number() + 4
    order = bits.number()
    if order == 0:
        bits.number()
    elif order == 1:
        bits.fixed(1)
        bits.skip_numbers(2)
        bits.skip_numbers(bits.number())
    bits.number()
    bits.fixed(1)
    bits.skip_numbers(2)
    frames_only = bits.fixed(1)
    return None if frames_only else 2 * planes + frame_number


def _parity(unit: bytes, skipped_bits: int) -> str:
    bits = _Bits(unit[:_SLICE_HEAD])
    bits.skip_numbers(3)
    bits.fixed(skipped_bits)
    return ("top", "bottom")[bits.fixed(1)] if bits.fixed(1) else "frame"


class _Bits:
    """A NAL unit's bits behind its first byte. All raise ValueError at the end of it."""

    def __init__(self, unit: bytes) -> None:
        self._bits = "".join(f"{byte:08b}" for byte in unit[1:].replace(b"\0\0\3", b"\0\0"))
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
