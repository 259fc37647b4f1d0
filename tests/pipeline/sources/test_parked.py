from __future__ import annotations

from depthmill.pipeline.sources.parked import Parked


class File:
    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


def test_one_is_kept_and_all_others_are_closed() -> None:
    place, first, second, late = Parked[File](), File(), File(), File()
    place.park(first)
    place.park(second)
    assert place.take() is second
    assert place.take() is None
    place.park(second)
    place.close()
    place.park(late)
    assert place.take() is None
    assert [file.closed for file in (first, second, late)] == [1, 1, 1]
