from __future__ import annotations

import pytest

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


def test_one_that_met_an_error_is_not_lent_again() -> None:
    place, opened = Parked[File](), []

    def opens() -> File:
        opened.append(File())
        return opened[-1]

    def read(error: BaseException | None = None) -> None:
        with place.lent(opens) as lent:
            assert lent() is lent()
            if error is not None:
                raise error

    read()
    with pytest.raises(GeneratorExit):  # whoever reads no further
        read(GeneratorExit())
    assert len(opened) == 1
    with pytest.raises(OSError, match="away"):
        read(OSError("away"))
    assert opened[0].closed == 1
    with place.lent(opens):  # and is not asked for one
        pass
    read()
    assert len(opened) == 2
    place.close()
    assert [file.closed for file in opened] == [1, 1]
