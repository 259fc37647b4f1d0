"""One pass of the decoder over a video's packets, in which every picture says which packet it came from."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import av
import av.video.frame
import numpy as np

from depthmill.pipeline.sources.video_container import (
    check_resources,
    decoder_limits,
    demux,
    is_intra,
    open_container,
    reason,
)
from depthmill.pipeline.sources.video_packets import NO_VALUE, Group, PacketTable

# Codecs reorder by at most 16 frames: when more wait for one, that one is not coming.
_MAX_WAITING = 24


class DamageError(Exception):
    """A packet did not give its picture: the group has to be looked at on its own."""


class LostPlaceError(Exception):
    """After a seek, packets came that the table does not know."""


def starts_badly(group: Group, ordinal: int, frame: av.video.frame.VideoFrame) -> bool:
    """Whether this is the picture that a group is decoded from, and is made of others: it is falsely called a key."""
    return group.start > 0 and ordinal == group.first and is_intra(frame) is False


class Decoder:
    """One decoder on one open file, and the frames that it has ahead.

    Attributes:
        position: The next frame that it can give without a seek, or None.
        seeks: Whether to seek at all; else packets are skipped from the start of the file.
        on_packet: Told of each packet that is decoded or skipped.
    """

    def __init__(
        self,
        uri: str,
        table: PacketTable,
        threads: int,
        seeks: bool,
        max_pixels: int,
        on_packet: Callable[[], None] = lambda: None,
        at_once: bool = False,
    ) -> None:
        """Open the file; `at_once`: whether threads may decode a picture each, with the least error as damage."""
        self._uri, self._table, self._threads, self._max_pixels = uri, table, threads, max_pixels
        self._at_once = at_once and threads != 1 and not table.fields  # fields are called corrupt then
        self.position: int | None = None
        self.seeks = seeks
        self.on_packet = on_packet
        self._outputs: Iterator[tuple[int, av.video.frame.VideoFrame]] = iter(())
        self._whole: set[int] = set()  # packets that gave their picture
        self._waiting: dict[int, av.video.frame.VideoFrame] = {}
        self._open()

    def describe(self) -> tuple[int, int, str, float | None]:
        """What the header says: height, width, name of the codec, frames per second."""
        context = self._stream.codec_context
        rate = self._stream.average_rate
        return context.height, context.width, context.name, float(rate) if rate else None

    def one_by_one(self) -> None:
        """Decode no pictures at once from now on."""
        self.close()
        self._at_once = False
        self._open()

    def close(self) -> None:
        """Release the file and the decoder's threads."""
        self._outputs, self._waiting, self.position = iter(()), {}, None
        self._container.close()

    def frames(self, group: Group, start: int, stop: int) -> Iterator[tuple[int, av.video.frame.VideoFrame]]:
        """Yield the frames [start, stop) of a group, each once all that may say that it is lost has been decoded.

        Raises:
            DamageError: If any of the group's packets did not give its picture.
            LostPlaceError: If packets came that the table does not know.
            SourceError: If the disk or the network fails; the decoder is good for nothing then.
        """
        afresh = self.position != start
        if afresh:
            self._whole, self._waiting = set(), {}
            self._outputs = self.decode(group.first)
        self._whole = {ordinal for ordinal in self._whole if ordinal >= group.first}
        packets = self._table.packets_of(group)
        done = 0
        for index in range(start, stop):
            self.position = None  # until the frame is out, for whoever continues after an error
            while True:
                while done < len(packets) and packets[done] in self._whole:
                    done += 1
                # With the packet behind it, too: where that is damaged, this frame counts as lost.
                reached = done == len(packets) or (done > 0 and packets[done - 1] > self._table.order[index])
                if reached and index in self._waiting:
                    break
                self._take_output(group, index, afresh)
            frame = self._waiting.pop(index)
            self.position = index + 1
            if self.position == group.stop and not self._went_well(group, packets):
                self.position = None  # the next group starts afresh, as it does for whoever starts reading there
            yield index, frame

    def _went_well(self, group: Group, packets: list[int]) -> bool:
        return all(ordinal in self._whole for ordinal in packets if self._table.shown[ordinal] < group.stop)

    def _take_output(self, group: Group, index: int, afresh: bool) -> None:
        ordinal, frame = next(self._outputs, (None, None))
        if ordinal is None or frame is None:
            raise DamageError
        shown = int(self._table.shown[ordinal])
        if shown < group.start or ordinal in self._whole:
            return  # cut off by an edit list; or shown before the keyframe that decoding started from
        if frame.is_corrupt or self._table.corrupt[ordinal] or (afresh and starts_badly(group, ordinal, frame)):
            raise DamageError
        self._whole.add(ordinal)
        if shown >= index:
            self._waiting[shown] = frame
            if len(self._waiting) > _MAX_WAITING:
                raise DamageError

    def decode(
        self, first: int, last: int | None = None, errors: dict[int, str] | None = None
    ) -> Iterator[tuple[int, av.video.frame.VideoFrame]]:
        """Decode afresh from packet `first`, up to and with packet `last`; yield each picture with its packet.

        Args:
            first: Packet to start from.
            last: Packet to end with; None for the end of the file.
            errors: Takes the packets that the decoder rejects, with its reason; None to stop at the first of them.

        Raises:
            DamageError: If a packet is rejected and `errors` is None.
            LostPlaceError: If packets came that the table does not know.
            SourceError: If the disk or the network fails; the decoder is good for nothing then.
        """
        ordinal = first
        for ordinal, packet in self._packets(first):  # which may open the file anew: the decoder is then another
            packet.pts = packet.dts = ordinal
            yield from self._pictures(packet, ordinal, errors)
            if last is not None and ordinal >= last:
                break
        yield from self._pictures(None, ordinal, errors)

    def _pictures(
        self, packet: av.Packet[Any] | None, ordinal: int, errors: dict[int, str] | None
    ) -> list[tuple[int, av.video.frame.VideoFrame]]:
        """What the decoder gives for a packet, or, for None, has left at the end; see `decode`."""
        try:
            decoded = self._stream.codec_context.decode(packet)
        except av.FFmpegError as error:
            if errors is None:
                raise DamageError from error  # for a closer look, on a single thread
            check_resources(error, errno.EAGAIN)  # of damage, too, a decoder may say that memory is short
            errors.setdefault(ordinal, reason(error))
            return []
        known = range(len(self._table.size))
        return [(frame.pts, frame) for frame in decoded if frame.pts is not None and frame.pts in known]

    def _packets(self, first: int) -> Iterator[tuple[int, av.Packet[Any]]]:
        """Yield packets, each with its number, from number `first` on: by a seek, or from the start."""
        for timestamp in self._landing_places(first):
            self._started = True
            try:
                self._container.seek(timestamp, stream=self._stream)
            except (av.FFmpegError, OSError):
                continue
            found = self._find(first)
            if found is not None:
                yield from found
                return
        if self._started:
            self._container.close()
            self._open()
        self._started = True
        yield from self._numbered(demux(self._container, self._stream), 0, first)

    def _landing_places(self, first: int) -> list[int]:
        """Timestamps to ask the demuxer for, so that it lands at or before packet `first`, which begins a group.

        It may land late: hence also those of groups before.
        """
        if not self.seeks or first == 0 or not self._table.told_apart:
            return []
        number = int(np.searchsorted(self._table.group_first, first))
        places = [int(self._table.group_seek[number - back]) for back in (0, 1, 4) if number >= back]
        return [timestamp for timestamp in places if timestamp != NO_VALUE]

    def _find(self, first: int) -> Iterator[tuple[int, av.Packet[Any]]] | None:
        """After a seek: the packets from `first` on, or None if this place lies behind it."""
        packets = demux(self._container, self._stream)
        for tried, packet in enumerate(packets):
            ordinal = self._table.find(*_key(packet))
            if ordinal is not None and ordinal <= first:
                return self._numbered(itertools.chain([packet], packets), ordinal, first)
            if ordinal is not None or tried > 50:
                return None  # landed behind it, or nowhere that the table knows
        return None

    def _numbered(
        self, packets: Iterator[av.Packet[Any]], start: int, first: int
    ) -> Iterator[tuple[int, av.Packet[Any]]]:
        for ordinal, packet in enumerate(packets, start):
            if ordinal >= len(self._table.size) or packet.size != self._table.size[ordinal]:
                raise LostPlaceError
            self.on_packet()
            if ordinal >= first:
                yield ordinal, packet

    def _open(self) -> None:
        self._container, self._stream = open_container(self._uri)
        context = self._stream.codec_context
        context.thread_count = self._threads
        options = decoder_limits(self._max_pixels)
        if context.name == "mjpeg" or self._at_once:
            # Else motion JPEG passes broken pictures as whole; others say so, but of those decoded at once too late.
            options["err_detect"] = "explode"
        context.options = options
        self._stream.thread_type = "AUTO" if self._at_once else "SLICE"
        self._started = False


def _key(packet: av.Packet[Any]) -> tuple[int, int, int]:
    return (
        NO_VALUE if packet.pts is None else packet.pts,
        NO_VALUE if packet.pos is None else packet.pos,
        packet.size,
    )
