"""Videos: every frame at its index, bit for bit the same however the reading is cut into segments.

A frame's identity is the packet that holds it: before a packet goes to the decoder, its timestamp is replaced by its
number in the packet table, and the picture that comes out carries that number. So nothing depends on timestamps
after a seek, and a frame that went missing is noticed.

Damage. Reading runs fast and multithreaded from a group of pictures to the next as long as every packet gives its
picture. At the first sign of damage, the group is decoded again, alone, by one thread, from its keyframe: that pass
alone says which frames are lost, and since it does not depend on where reading started, neither do they. What is
decoded behind the first damaged packet of a group counts as lost up to the next keyframe: the decoder would invent
those pictures from damaged ones, and labels of invented pictures are worse than none. So does the packet before the
first that the decoder objects to: most codecs have no checksums, and damage that begins in the middle of a packet is
often decoded as if it were a picture. Where the demuxer says that bytes are missing, FFV1's checksums that they are
wrong, or the numbers of H.264's frames that packets are missing, damage is known to begin there.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import av
import av.video.frame
from av.video.reformatter import VideoReformatter

from depthmill.pipeline.errors import SourceError
from depthmill.pipeline.machine import give_back_freed_memory
from depthmill.pipeline.sources.base import BaseSource
from depthmill.pipeline.sources.limits import check_range
from depthmill.pipeline.sources.naming import source_id
from depthmill.pipeline.sources.versions import changed, check_unchanged, settled, version_of
from depthmill.pipeline.sources.video_container import check_resources, reason
from depthmill.pipeline.sources.video_decode import DamageError, Decoder, LostPlaceError, starts_badly
from depthmill.pipeline.sources.video_packets import Group, PacketTable, fingerprint, scan
from depthmill.pipeline.sources.video_pixels import to_rgb, upright_size
from depthmill.pipeline.types import Frame, Source

# How many groups before its own a group may be decoded from, where its keyframe turns out to be none (streams with
# periodic intra refresh call a picture a keyframe that is complete only some frames later; and some flags are false).
_MAX_GROUPS_BACK = 2

# A stream whose first packets cannot be decoded is described by the first of these that can.
_MAX_PROBED_PACKETS = 300
# Packets from which on libav's index, which grows by a sixteenth of itself at a time, leaves megabytes behind.
_LONG = 1 << 14


@dataclass(frozen=True)
class _Verdict:
    """What decoding a damaged group alone, by one thread, has shown.

    Attributes:
        first: Packet to decode the group from.
        lost_from: First packet whose picture is lost; the table's length if all is well.
        damaged: First packet with something wrong; the same, or the one behind it.
        why: What is wrong with that.
    """

    first: int
    lost_from: int
    damaged: int
    why: str


class VideoSource(BaseSource[tuple[Source, PacketTable, str], Decoder]):
    """A video file, read by PyAV. Several reads may run at once, each with a decoder of its own."""

    def __init__(self, uri: str | Path, max_pixels: int, max_frames: int, threads: int) -> None:
        """As the others; of a video whose size changes, frames with far more than `max_pixels` fail."""
        super().__init__(uri, max_pixels, max_frames, threads)
        self._verdicts: dict[int, _Verdict] = {}
        self._seeks = self._at_once = True

    def probe(self) -> Source:
        """Describe the video: its packets are read, one frame is decoded.

        Raises:
            SourceError: If the file is no video, holds no frame, or too many, or too large ones; or the disk or the
                network fails.
            SourceChangedError: If the file changes meanwhile.
        """
        source, table, _ = self._open()
        return replace(source, time_s=table.time_s)

    def read(self, start: int, stop: int, on_passed: Callable[[], None] = lambda: None) -> Iterator[Frame]:
        """Yield the frames [start, stop); one that cannot be decoded comes with its reason instead of a picture.

        `on_passed` is told of each packet.

        Raises:
            SourceError: If the file cannot be probed or read.
            SourceChangedError: If it is another than when it was probed; this may come after the last frame.
        """
        check_range(self._open()[0], start, stop)
        return self._read(start, stop, on_passed)

    def _probe(self) -> tuple[Source, PacketTable, str]:
        self._version, probed = settled(self._uri, lambda: (version_of(self._uri), self._scanned()))
        return probed

    def _scanned(self) -> tuple[Source, PacketTable, str]:
        table = scan(self._uri, self._max_frames, self._max_pixels)
        decoder = Decoder(self._uri, table, self._threads, self._seeks, self._max_pixels)
        with closing(decoder):
            height, width, codec, rate = decoder.describe()
            self._check_size(height, width)
            first = next(decoder.decode(0, min(len(table.size), _MAX_PROBED_PACKETS) - 1, errors={}), None)
        if first is not None:
            height, width = upright_size(first[1])
            self._check_size(height, width)
        if not height or not width:
            raise SourceError(f"{self._uri}: no size in its header and no frame that decodes: leave it out")
        frames = len(table.order)
        if table.lost:
            there = len(table.size) - 1
            why = f"the file is cut off: of {there + table.lost} packets in its index {there} are there"
            self._verdicts[frames - 1] = _Verdict(there, there, there, why)
        duration_s = float(table.time_s[-1])
        source = Source(
            id=source_id(self._uri),
            uri=self._uri,
            kind="video",
            frames=frames,
            height=height,
            width=width,
            fps=(frames - 1) / duration_s if duration_s > 0 else rate,
            fingerprint=fingerprint(self._uri, table),
        )
        return source, table, codec

    def _check_size(self, height: int, width: int) -> None:
        pixels = height * width
        if pixels > self._max_pixels:
            raise SourceError(
                f"{self._uri}: {width}x{height} is {pixels} pixels a frame; at most {self._max_pixels} are read: scale "
                "it down, or raise max_pixels"
            )

    def _read(self, start: int, stop: int, on_passed: Callable[[], None]) -> Iterator[Frame]:
        try:
            # Not lent again after an error: libav remembers that reading failed, and says so at the end of the file.
            with self._parked.lent(self._decoder) as lent:
                decoder = lent()
                decoder.on_packet = on_passed
                try:
                    yield from self._frames(decoder, start, stop)
                finally:
                    decoder.on_packet = lambda: None
                # Those of another file may have been taken for its packets, or for damage.
                check_unchanged(self._uri, self._version)
        except SourceError:
            check_unchanged(self._uri, self._version)
            raise

    def _decoder(self) -> Decoder:
        table = self._open()[1]
        decoder = Decoder(self._uri, table, self._threads, self._seeks, self._max_pixels, at_once=self._at_once)
        if len(table.size) > _LONG:
            give_back_freed_memory()
        return decoder

    def _frames(self, decoder: Decoder, start: int, stop: int) -> Iterator[Frame]:
        source, table, codec = self._open()
        reformatter = VideoReformatter()
        index = start
        while index < stop:
            group = table.group(table.group_of(index))
            end = min(stop, group.stop)
            for frame, picture, error in self._read_group(decoder, table, group, index, end):
                if picture is None:
                    yield Frame(frame, None, error)
                    continue
                try:
                    image = to_rgb(
                        picture,
                        reformatter,
                        codec=codec,
                        height=source.height,
                        width=source.width,
                        threads=self._threads,
                    )
                except (av.FFmpegError, ValueError) as problem:
                    check_resources(problem, errno.EAGAIN, errno.ENOMEM)
                    yield Frame(frame, None, f"{picture.format.name} cannot be converted: {reason(problem)}")
                else:
                    yield Frame(frame, image)
            index = end

    def _read_group(
        self, decoder: Decoder, table: PacketTable, group: Group, start: int, stop: int
    ) -> Iterator[tuple[int, av.video.frame.VideoFrame | None, str]]:
        """Yield the frames [start, stop) of one group: index, and the picture or the reason why there is none."""
        damaged = group.start in self._verdicts
        while start < stop:
            try:
                if damaged:
                    verdict = self._verdicts.get(group.start) or self._judge(table, group, decoder.on_packet)
                    self._verdicts[group.start] = verdict
                    if self._at_once and verdict.first == group.first and verdict.lost_from == len(table.size):
                        self._at_once = False  # of what is whole, errors are told as well
                        decoder.one_by_one()
                    for index, picture in self._rescue(table, group, verdict, start, stop, decoder.on_packet):
                        yield index, picture, "" if picture else _why_lost(table, verdict, index)
                        start = index + 1
                else:
                    for index, picture in decoder.frames(group, start, stop):
                        yield index, picture, ""
                        start = index + 1
            except DamageError:
                damaged = True
            except LostPlaceError:
                if not self._seeks:
                    raise changed(self._uri, "its packets are others") from None
                self._seeks = decoder.seeks = False

    def _judge(self, table: PacketTable, group: Group, on_packet: Callable[[], None]) -> _Verdict:
        """Decode a damaged group alone, to see from which packet on it is lost."""
        number = table.group_of(group.start)
        packets = table.packets_of(group)
        best = _Verdict(group.first, -1, -1, "")
        for back in range(min(number, _MAX_GROUPS_BACK) + 1):
            first = int(table.group_first[number - back])
            if table.corrupt[first : group.first].any():
                break  # the decoder may not say what comes of that
            verdict = self._inspect(table, group, packets, first, on_packet)
            if verdict.damaged > best.damaged:
                best = verdict
            if best.damaged > packets[0]:
                break  # its keyframe is whole: starting earlier would change nothing
        return best

    def _inspect(
        self, table: PacketTable, group: Group, packets: list[int], first: int, on_packet: Callable[[], None]
    ) -> _Verdict:
        errors: dict[int, str] = {}
        whole: set[int] = set()
        flawed: set[int] = set()
        with closing(Decoder(self._uri, table, 1, self._seeks, self._max_pixels, on_packet)) as decoder:
            for ordinal, frame in decoder.decode(first, group.last, errors):
                bad = frame.is_corrupt or (first == group.first and starts_badly(group, ordinal, frame))
                (flawed if bad else whole).add(ordinal)
        for before, ordinal in pairwise([packets[0], *packets]):
            if table.corrupt[ordinal]:
                return _Verdict(
                    first, ordinal, ordinal, "bytes of it are missing or wrong, or packets before it are missing"
                )
            if ordinal in errors:
                return _Verdict(first, before, ordinal, f"the decoder rejects it ({errors[ordinal]})")
            if ordinal in flawed:
                return _Verdict(first, before, ordinal, "the decoder met errors in it")
            if ordinal not in whole:
                return _Verdict(first, before, ordinal, "the decoder makes no picture of it")
        return _Verdict(first, len(table.size), len(table.size), "")

    def _rescue(
        self,
        table: PacketTable,
        group: Group,
        verdict: _Verdict,
        start: int,
        stop: int,
        on_packet: Callable[[], None],
    ) -> Iterator[tuple[int, av.video.frame.VideoFrame | None]]:
        """Yield the frames [start, stop) of a damaged group: those before the damage, and None for the others."""
        waiting: dict[int, av.video.frame.VideoFrame] = {}
        with closing(Decoder(self._uri, table, 1, self._seeks, self._max_pixels, on_packet)) as decoder:
            outputs = decoder.decode(verdict.first, group.last, errors={})
            for index in range(start, stop):
                if table.order[index] < verdict.lost_from:
                    while index not in waiting:
                        ordinal, frame = next(outputs, (None, None))
                        if ordinal is None or frame is None:  # those that were whole when it was judged
                            raise LostPlaceError
                        if index <= table.shown[ordinal] < stop and ordinal < verdict.lost_from:
                            waiting.setdefault(int(table.shown[ordinal]), frame)
                yield index, waiting.pop(index, None)


def _why_lost(table: PacketTable, verdict: _Verdict, index: int) -> str:
    damaged = int(table.shown[verdict.damaged])
    if damaged == index:
        return f"cannot be decoded: {verdict.why}"
    if table.order[index] < verdict.damaged:
        return f"may be damaged, like frame {damaged}, which comes right behind it in the file: {verdict.why}"
    return f"cannot be decoded: depends on frame {damaged}, which is lost: {verdict.why}"
