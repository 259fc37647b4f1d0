"""The checksums of FFV1's slices (RFC 9043, 4.9): where one is wrong, libav shows an older picture, without a word."""

from __future__ import annotations

import zlib

_FOOTER = 8  # bytes: the slice's size, in 3, a status, a checksum over all of it in 4
_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def is_sound(packet: bytes) -> bool:
    """Whether a packet is made of slices whose checksums are right; false of all that have none."""
    stop = len(packet)
    while stop >= _FOOTER:
        start = stop - _FOOTER - int.from_bytes(packet[stop - _FOOTER : stop - 5])
        # Highest bits first and from zero on; zlib's CRC-32 has the lowest first, and inverts before and behind.
        if start < 0 or zlib.crc32(packet[start:stop].translate(_MIRRORED), 0xFFFFFFFF) != 0xFFFFFFFF:
            return False
        stop = start
    return stop == 0 < len(packet)
