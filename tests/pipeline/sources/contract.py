"""What every kind of source promises. A new kind subclasses SourceContract and says how to make its media."""

from __future__ import annotations

import dataclasses
import functools
import threading
from pathlib import Path

import numpy as np
import pytest

from depthmill.pipeline.sources import open_source, prefetch, source_id
from depthmill.pipeline.types import Frame, FrameSource, Source


def content(frames: list[Frame]) -> list[tuple[int, bytes | None, tuple[int, ...], str]]:
    """Frames as values that compare bit for bit."""
    return [
        (frame.index, None, (), frame.error)
        if frame.image is None
        else (frame.index, frame.image.tobytes(), frame.image.shape, frame.error)
        for frame in frames
    ]


def probe_and_read(path: Path, **options: int) -> tuple[Source, list[Frame]]:
    source = open_source(path, **options)
    try:
        return source.probe(), list(source.read(0, source.probe().frames))
    finally:
        source.close()


def read_all(path: Path) -> list[Frame]:
    return probe_and_read(path)[1]


@functools.lru_cache(maxsize=64)
def _read_once(path: Path, modified_ns: int) -> tuple[Frame, ...]:
    return tuple(read_all(path))


class SourceContract:
    """Subclasses give `media`, a fixture: the path of a source of about 40 frames, some of which may be broken."""

    @pytest.fixture
    def source(self, media: Path):
        source = open_source(media)
        yield source
        source.close()

    @pytest.fixture
    def whole(self, media: Path) -> list[Frame]:
        return list(_read_once(media, media.stat().st_mtime_ns))

    def test_probe_describes_what_is_read(self, media: Path, source: FrameSource, whole: list[Frame]) -> None:
        probed = source.probe()
        assert probed.frames == len(whole) > 0
        assert probed.id == source_id(media)
        assert probed.uri == str(media.absolute())
        for frame in whole:
            assert (frame.image is None) == bool(frame.error)
            if frame.image is not None:
                assert frame.image.dtype == np.uint8
                assert frame.image.flags.c_contiguous
                assert frame.image.shape[2:] == (3,)
                assert frame.image.shape[0] <= probed.height
                assert frame.image.shape[1] <= probed.width
        if probed.kind == "video":
            assert probed.time_s is not None
            assert probed.time_s.shape == (probed.frames,)
            assert probed.time_s[0] == 0
            assert (np.diff(probed.time_s) >= 0).all()
        else:
            assert probed.keys is not None
            assert len(set(probed.keys)) == probed.frames

    def test_probe_is_the_same_each_time(self, media: Path, source: FrameSource) -> None:
        first, second = (dataclasses.asdict(source.probe()) for _ in range(2))
        np.testing.assert_equal(first, second)
        again = open_source(media)
        assert again.probe().fingerprint == source.probe().fingerprint
        again.close()

    def test_order_and_count(self, whole: list[Frame]) -> None:
        assert [frame.index for frame in whole] == list(range(len(whole)))

    @pytest.mark.parametrize("frames", [1, 7])
    def test_segments_equal_the_whole(self, media: Path, whole: list[Frame], frames: int) -> None:
        starts = range(0, len(whole), frames)
        forward, backward = open_source(media), open_source(media)
        for start in starts:
            stop = min(start + frames, len(whole))
            assert content(list(forward.read(start, stop))) == content(whole[start:stop])
        for start in reversed(starts):
            stop = min(start + frames, len(whole))
            assert content(list(backward.read(start, stop))) == content(whole[start:stop])
        forward.close()
        backward.close()

    def test_a_first_read_anywhere_equals_the_whole(self, media: Path, whole: list[Frame]) -> None:
        for start in (len(whole) - 1, len(whole) // 2, len(whole) // 3):
            source = open_source(media)
            assert content(list(source.read(start, len(whole)))) == content(whole[start:])
            source.close()

    def test_interleaved_reads(self, source: FrameSource, whole: list[Frame]) -> None:
        half = len(whole) // 2
        first, second = source.read(0, half), source.read(half, 2 * half)
        pairs = list(zip(first, second, strict=True))
        assert content([pair[0] for pair in pairs]) == content(whole[:half])
        assert content([pair[1] for pair in pairs]) == content(whole[half : 2 * half])

    def test_a_read_that_stops_early_harms_no_other(self, source: FrameSource, whole: list[Frame]) -> None:
        running = source.read(0, len(whole))
        for _ in range(len(whole) // 2):
            next(running)
        running.close()
        assert content(list(source.read(0, len(whole)))) == content(whole)
        assert content(list(source.read(1, 3))) == content(whole[1:3])

    def test_prefetched(self, source: FrameSource, whole: list[Frame]) -> None:
        assert content(list(prefetch(source.read(0, len(whole)), 3))) == content(whole)

    def test_bounds(self, source: FrameSource, whole: list[Frame]) -> None:
        assert list(source.read(2, 2)) == []
        for start, stop in ((-1, 2), (3, 2), (0, len(whole) + 1)):
            with pytest.raises(ValueError, match="asked for"):
                source.read(start, stop)

    def test_what_is_closed_can_be_read(self, media: Path, whole: list[Frame]) -> None:
        before = threading.active_count()
        source = open_source(media)
        source.probe()
        source.close()
        for start in (len(whole) // 2, 0):
            assert content(list(source.read(start, start + 1))) == content(whole[start : start + 1])
        assert threading.active_count() == before

    def test_close_leaves_no_thread(self, media: Path) -> None:
        before = threading.active_count()
        source = open_source(media)
        running = source.read(0, source.probe().frames)
        next(running)
        source.close()
        running.close()
        assert threading.active_count() == before
