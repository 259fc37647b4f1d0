"""The packet table of a video: how many frames there are, when each is shown, and where its decoding has to start.

Frames are counted from the packets, in the order in which they are shown; containers' headers are not believed. The
table also cuts the video into groups of pictures: runs of frames, contiguous as shown, that are decoded from one
keyframe on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, pairwise
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from depthmill.pipeline.errors import SourceError
from depthmill.pipeline.sources.limits import check_frames
from depthmill.pipeline.sources.opening import file_size, open_binary, unanswered
from depthmill.pipeline.sources.video_checksums import is_sound
from depthmill.pipeline.sources.video_container import decoder_limits, demux, is_intra, lacking, open_container
from depthmill.pipeline.sources.video_slices import slice_reader

Int = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
Bool = npt.NDArray[np.bool_]

NO_VALUE = np.iinfo(np.int64).min  # where a packet has no timestamp or no position

_KEY, _CORRUPT, _HIDDEN, _FIELD, _GAP, _SOUND = 1, 2, 4, 8, 16, 32  # flags of a packet while it is read
_COLUMNS = {"pts": np.int64, "dts": np.int64, "pos": np.int64, "size": np.int32, "flags": np.uint8}
_PACKET = np.dtype(list(_COLUMNS.items()))
_BLOCK = 4096  # packets read at once: a column that grew as a whole would leave its former selves behind in the heap

# MPEG-4's pictures that are not coded, which stand for the one before, take no more. Some decode to that one again.
_MAX_UNCODED_BYTES = 16

_NO_TIMESTAMPS = 0x80  # libav's AVFMT_NOTIMESTAMPS, of formats

_GAP_STEPS = 1.5  # between frames, of the usual one: there is room for one more

_LOOKED_AT = 64  # packets, to see if they are reordered, or keyframes

# Files in these formats may be joined by putting one behind the other, each with a clock of its own: where packets are
# decoded by so much earlier, or later, than the one before, another clock begins.
_JOINABLE = ("mpegts", "mpeg")
_BACK_S, _AHEAD_S = 0.5, 3600.0

_LONGEST_S = 100 * 365.25 * 86400  # from first to last frame: timestamps that say more are damaged


@dataclass(frozen=True)
class Group:
    """Frames [start, stop), in the order shown, that are decoded from packet `first`; all are in by packet `last`."""

    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True, eq=False)
class PacketTable:
    """The packets of one video stream in the order of the file (P of them) and the frames they hold (F).

    Attributes:
        pts: (P,) int32 or int64 presentation timestamp in units of the stream's time base, or NO_VALUE.
        pos: (P,) int32 or int64 byte offset in the file, or NO_VALUE.
        size: (P,) int32 bytes.
        corrupt: (P,) bool, True where bytes are missing or wrong, or packets before are missing.
        shown: (P,) int32 index of the frame that the packet holds, or -1 if it holds none that is shown.
        order: (F,) int32 packet of each frame.
        ticks: (F,) int32 or float64 times since the first frame, in units of `tick_s`.
        tick_s: Seconds.
        fields: Whether there are packets that hold one field alone; a picture is then that of the first of two.
        lost: Packets that the file's index lists and that are behind its end, as it is cut off. The last packet, of
            size 0, and the last frame, a group of its own, stand for them.
        group_start: (G,) int64 first frame of each group.
        group_first: (G,) int64 packet from which each group is decoded.
        group_seek: (G,) int64 timestamp by which the demuxer finds that packet: when it is decoded, or, where the file
            does not say, shown; or NO_VALUE.
    """

    pts: Int | Int32
    pos: Int | Int32
    size: Int32
    corrupt: Bool
    shown: Int32
    order: Int32
    ticks: Int32 | npt.NDArray[np.float64]
    tick_s: float
    fields: bool
    lost: int
    group_start: Int
    group_first: Int
    group_seek: Int

    @property
    def time_s(self) -> npt.NDArray[np.float64]:
        """(F,) float64 seconds since the first frame."""
        return np.asarray(self.ticks * self.tick_s, np.float64)

    @cached_property
    def group_last(self) -> Int32:
        """(G,) int32 last packet that each group needs: of a picture whose second field is a packet, that one."""
        last = np.maximum.reduceat(self.order, self.group_start)
        return np.asarray(last + (self.fields & (np.append(self.shown, 0)[last + 1] < 0)), np.int32)

    @cached_property
    def told_apart(self) -> bool:
        """Whether no two packets have the same timestamp, position and size."""
        by_key = np.lexsort((self.size, self.pos, self.pts))
        same = [np.diff(column[by_key]) == 0 for column in (self.pts, self.pos, self.size)]
        return not np.logical_and.reduce(same).any()

    def find(self, pts: int, pos: int, size: int) -> int | None:
        """The packet with this timestamp, position and size, if there is one and they are `told_apart`."""
        found = np.flatnonzero((self.pts == pts) & (self.pos == pos) & (self.size == size))
        return int(found[0]) if len(found) else None

    def group_of(self, frame: int) -> int:
        """Number of the group that holds `frame`."""
        return int(np.searchsorted(self.group_start, frame, side="right")) - 1

    def group(self, number: int) -> Group:
        """The group of this number."""
        stop = self.group_start[number + 1] if number + 1 < len(self.group_start) else len(self.order)
        return Group(
            int(self.group_start[number]), int(stop), int(self.group_first[number]), int(self.group_last[number])
        )

    def packets_of(self, group: Group) -> list[int]:
        """The packets on which frames of the group may depend, in decoding order.

        Those between its keyframe and its last frame, without the pictures that an open group of pictures shows
        before its keyframe: these belong to the group before.
        """
        shown = self.shown[group.first : group.last + 1]
        return (np.flatnonzero(shown >= group.start) + group.first).tolist()


def scan(uri: str, max_frames: int, max_pixels: int) -> PacketTable:
    """Read all packets of a video, decoding nothing unless they do not say in what order they are shown.

    Where the codec's header announces reordered pictures and the timestamps have none, the first 64 packets are
    decoded: if they are reordered, the timestamps are those of decoding; if not, the rest is taken not to be, either.
    So they are where most packets are called keyframes, as some demuxers call all whose file does not say: if one of
    them is none, all packets are decoded, and the decoder says which are.

    Raises:
        SourceError: If the file is no video, or has no frames, or more packets than `max_frames`.
    """
    container, stream = open_container(uri)
    with container:
        context = stream.codec_context
        looks = _looks(context.name, context.extradata)
        rows = (_row(packet, looks) for packet in islice(demux(container, stream), max_frames + 1))
        blocks = []
        while len(block := np.fromiter(islice(rows, _BLOCK), _PACKET)):
            blocks.append(block)
        lost = lacking(container, stream, sum(map(len, blocks)))
        # AVI has no presentation timestamps, and bare streams have none at all: where pictures are reordered, libav's
        # are the order of the file, or guessed (of MPEG-1 wrongly where it begins).
        reorders = context.has_b_frames
        intra_only = context.codec.intra_only
        bare = container.format.flags & _NO_TIMESTAMPS
        invented = bool(reorders and (bare or "avi" in container.format.name.split(",")))
        uncoded = context.name == "mpeg4"
        joinable = container.format.name in _JOINABLE
        time_base = float(stream.time_base or 0)
        # The average of a stream that is no container's is made up; what its own header says is in the guess.
        rate = float(stream.guessed_rate or stream.average_rate or 25)
    if not blocks:
        raise SourceError(f"{uri}: its video stream holds no packets; expected at least one frame: leave it out")
    if lost:  # one more frame stands for them
        end = max(block["pts"].max() for block in blocks) + max(1, round(1 / (rate * time_base)))
        blocks.append(np.array([(end, NO_VALUE, NO_VALUE, 0, _KEY | _CORRUPT)], _PACKET))
    pts, dts, pos, size, flags = (np.concatenate([block[name] for block in blocks]) for name in _COLUMNS)
    del blocks
    check_frames(uri, len(pts), max_frames)
    key, corrupt, hidden, sound = ((flags & flag).astype(bool) for flag in (_KEY, _CORRUPT, _HIDDEN, _SOUND))
    if sound.any():
        corrupt |= ~sound
    clock = _one_clock(pts, dts, time_base, rate) if joinable else pts
    visible = clock[~hidden]
    uncoded = uncoded and bool((size <= _MAX_UNCODED_BYTES).any())
    told = not (invented or uncoded or (visible == NO_VALUE).any() or len(np.unique(visible)) < len(visible))
    doubted = not intra_only and len(key) > 1 and 2 * key.sum() > len(key)  # whether they are keyframes
    in_order = told and reorders and (np.diff(visible) > 0).all()
    if in_order or (told and doubted):
        # Not reordered although the codec says so: is it, and were decoding times written instead?
        decoded, is_key = _decoded_order(uri, hidden[:_LOOKED_AT], max_pixels)
        invented = bool(in_order and (np.diff(decoded[decoded >= 0]) < 0).any())
        doubted = doubted and not is_key.all()
    fields = bool((flags & _FIELD).any())
    told = told and not invented and not fields
    rank = np.argsort(np.argsort(clock, kind="stable"), kind="stable")
    if doubted or not told:
        decoded, is_key = _decoded_order(uri, hidden, max_pixels)
        rank = rank if told else decoded
        key = is_key if doubted else key
    if lost:
        rank[-1], key[-1] = rank.max() + 1, True
    ordinals = np.flatnonzero((rank >= 0) & ~hidden)
    order = ordinals[np.argsort(rank[ordinals], kind="stable")]
    if not len(order):
        raise SourceError(f"{uri}: none of its {len(pts)} packets can be decoded; expected one frame: leave it out")
    shown = np.full(len(pts), -1, dtype=np.int32)
    shown[order] = np.arange(len(order))
    group_start, group_first = _groups(rank, key, order)
    timestamp = dts[group_first]
    ticks, tick_s = _times(_sorted(clock[order]) if invented else clock[order], time_base, rate)
    corrupt |= _behind_gaps((flags & _GAP).astype(bool), ticks, group_start, group_first)
    return PacketTable(
        pts=_compact(pts),
        pos=_compact(pos),
        size=size,
        corrupt=corrupt,
        shown=shown,
        order=order.astype(np.int32),
        ticks=ticks,
        tick_s=tick_s,
        fields=fields,
        lost=lost,
        group_start=group_start,
        group_first=group_first,
        group_seek=np.where(timestamp == NO_VALUE, pts[group_first], timestamp),
    )


def fingerprint(uri: str, table: PacketTable) -> str:
    """Hash of a video's size, packet sizes and timestamps, and first and last 64 KiB.

    Any other encoding changes the packet table; touching the file, moving or copying it changes nothing.

    Raises:
        SourceError: If the disk or the network fails.
    """
    digest = hashlib.sha256()
    try:
        size = file_size(uri)
        digest.update(f"{size} {len(table.size)}".encode())
        for column in (table.size, table.pts):
            digest.update(np.ascontiguousarray(column, "<i8").data)
        with open_binary(uri) as file:
            digest.update(file.read(1 << 16))
            file.seek(max(0, size - (1 << 16)))
            digest.update(file.read(1 << 16))
    except OSError as error:
        raise unanswered(uri, error) from error
    return digest.hexdigest()


def _looks(codec: str, extradata: bytes | None) -> Callable[[bytes, bool], int] | None:
    """What tells flags of a packet from its bytes, and whether it is a keyframe; None if there is nothing to see."""
    if codec in ("vp8", "libvpx"):  # its show_frame bit: alternate references are packets of their own
        return lambda packet, _: _HIDDEN * (not packet[0] & 0x10)
    if codec == "ffv1":
        return lambda packet, _: _SOUND * is_sound(packet)
    read = slice_reader(extradata) if codec == "h264" else None
    if not read:
        return None

    def looks(packet: bytes, is_key: bool) -> int:
        is_field, is_gap = read(packet, is_key)
        return _FIELD * is_field | _GAP * is_gap

    return looks


def _row(packet: av.Packet[Any], looks: Callable[[bytes, bool], int] | None) -> tuple[int, int, int, int, int]:
    """Presentation timestamp, decoding timestamp, position, size, flags."""
    hidden = packet.is_discard  # decoded but not shown: an edit list cuts it off
    return (
        NO_VALUE if packet.pts is None else packet.pts,
        NO_VALUE if packet.dts is None else packet.dts,
        NO_VALUE if packet.pos is None else packet.pos,
        packet.size,
        _KEY * packet.is_keyframe
        | _CORRUPT * packet.is_corrupt
        | _HIDDEN * hidden
        | (looks(bytes(packet), packet.is_keyframe) if looks else 0),
    )


def _one_clock(pts: Int, dts: Int, time_base: float, rate: float) -> Int:
    """(P,) int64 presentation timestamps by which files that were joined follow each other, a frame apart."""
    known = np.flatnonzero(dts != NO_VALUE)
    step_s = np.diff(dts[known]) * time_base
    starts = known[1:][(step_s < -_BACK_S) | (step_s > _AHEAD_S)]
    clock, last = pts.copy(), None
    for start, stop in pairwise([0, *starts.tolist(), len(pts)]):
        part = clock[start:stop]
        told = part != NO_VALUE
        if not told.any():
            continue
        if last is not None:
            part[told] += last - part[told].min() + max(1, round(1 / (rate * time_base)))
        last = part[told].max()
    return clock


def _sorted(pts: Int) -> Int:
    """Timestamps as shown that were given out as decoded: the same ones, in order."""
    known = pts != NO_VALUE
    pts[known] = np.sort(pts[known])
    return pts


def _decoded_order(uri: str, hidden: Bool, max_pixels: int) -> tuple[Int, Bool]:
    """Decode a video's first packets, or all, because they do not say in what order they are shown, or which are keys.

    Returns:
        (len(hidden),) int64 rank of each packet as the decoder shows them; -1 where it holds no picture of its own. A
        packet that the decoder rejects is a frame that fails: it comes behind the packet before it.
        (len(hidden),) bool, True for those that the decoder calls keyframes; for all if it says of every picture that
        it depends on no other, or of none anything.
    """
    ranks = np.full(len(hidden), -1, dtype=np.int64)
    keys = np.zeros(len(hidden), dtype=bool)
    intra = set[bool | None]()
    rejected: list[int] = []
    container, stream = open_container(uri)
    with container:
        stream.codec_context.options = decoder_limits(max_pixels)
        stream.codec_context.thread_count = 1  # with more, an error does not say which packet it means
        count = 0
        packets = islice(demux(container, stream), len(hidden))
        for ordinal, packet in chain(enumerate(packets), [(-1, None)]):  # at the end, what it has left
            if packet is not None:
                packet.pts = packet.dts = ordinal
            try:
                frames = stream.codec_context.decode(packet)
            except av.FFmpegError:
                if packet is not None:
                    rejected.append(ordinal)
                continue
            for frame in frames:
                if frame.pts is not None and ranks[frame.pts] < 0:
                    ranks[frame.pts] = count
                    count += 1
                    keys[frame.pts] = frame.key_frame
                    intra.add(is_intra(frame))
    # Room between the ranks for the rejected packets, each behind the latest rank of any packet before it.
    spread = np.where(ranks >= 0, ranks * (len(ranks) + 1), -1)
    before = np.maximum.accumulate(spread)
    for number, ordinal in enumerate(rejected):
        if ranks[ordinal] < 0:
            spread[ordinal] = max(int(before[ordinal]), 0) + 1 + number
    return spread, keys | (intra in ({True}, {None}))


def _groups(rank: Int, key: Bool, order: Int) -> tuple[Int, Int]:
    """Cut the frames into groups, each with the packet to start from.

    Decoding can start at a keyframe behind which nothing is decoded that is shown with the frames before it, other
    than the pictures shown directly before it (an open group of pictures): those belong to the group before.
    """
    before = np.concatenate([[-1], np.maximum.accumulate(rank)[:-1]])
    entries = np.flatnonzero(key & (rank > before))
    starts = np.searchsorted(rank[order], rank[entries])
    kept = (starts < len(order)) & (np.diff(starts, append=-1) != 0)  # of two that start at one frame, the later
    entries, starts = entries[kept], starts[kept]
    if not len(starts) or starts[0] > 0:  # frames before the first keyframe as shown: all there is comes first
        entries, starts = np.append(0, entries), np.append(0, starts)
    return starts.astype(np.int64), entries.astype(np.int64)


def _behind_gaps(gap: Bool, ticks: Int32 | npt.NDArray[np.float64], group_start: Int, group_first: Int) -> Bool:
    """(P,) bool: the packets before which one is missing, by its number and by a frame that is in no group's time.

    Some encoders count wrongly, and what they write is decoded well: by the numbers alone, all of it would be lost.
    """
    if not gap.any() or len(ticks) < 2:
        return np.zeros_like(gap)
    steps = np.diff(ticks)
    long = steps > _GAP_STEPS * np.median(steps)
    waits = np.logical_or.reduceat(np.append(long, False) | np.append(False, long), group_start)
    group = np.searchsorted(group_first, np.arange(len(gap)), side="right") - 1
    return np.asarray(gap & waits[group.clip(0)])


def _compact(values: Int) -> Int | Int32:
    """The values in half the bytes, if they fit."""
    limits = np.iinfo(np.int32)
    fit = limits.min <= values.min() and values.max() <= limits.max
    return values.astype(np.int32) if fit else values


def _times(pts: Int, time_base: float, rate: float) -> tuple[Int32 | npt.NDArray[np.float64], float]:
    """(F,) times since the first frame, and their unit in seconds, from the timestamps as shown.

    Gaps are filled, as are both ends.

    Where these go back, or over a century, frames come at the rate.
    """
    known = np.flatnonzero(pts != NO_VALUE)
    if not len(known) or time_base == 0 or (np.diff(pts[known]) < 0).any():
        return np.arange(len(pts)) / rate, 1.0
    index, first, last = np.arange(len(pts)), known[0], known[-1]
    if (int(pts[last]) - int(pts[first])) * time_base > _LONGEST_S:  # which int64 may not hold
        return index / rate, 1.0
    since = np.interp(index, known, pts[known] - pts[first])
    # By the average: libav's guess at a rate goes by the few timestamps that there are.
    apart = (pts[last] - pts[first]) / (last - first) if last > first else 1 / (rate * time_base)
    since += (index - index.clip(first, last)) * apart
    since -= since[0]
    whole = since.astype(np.int32) if since[-1] <= np.iinfo(np.int32).max else since
    return whole if (whole == since).all() else since, time_base
