"""What a server says of an object: whether that may be the one that was probed."""

from __future__ import annotations

import errno
import io
from typing import Any

import pytest

from depthmill.pipeline.errors import SourceError
from depthmill.pipeline.sources.versions import Version, is_another

OLD, NEW = "Mon, 02 Nov 2026 10:00:00 GMT", "Mon, 30 Nov 2026 10:00:00 GMT"


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        (Version(9, '"a"', OLD), Version(9, '"a"', OLD), True),
        (Version(9, '"a"', OLD), Version(9, '"b"', NEW), False),
        (Version(9, '"a"', OLD), Version(9, '"a"', NEW), True),  # brought to another machine, tagged by content
        (Version(9, '"a"', OLD), Version(9, '"b"', OLD), True),  # another machine's inode is in its tag
        (Version(9, '"a"', OLD), Version(9, 'W/"a"', OLD), True),  # packed on the way
        (Version(9, 'W/"a"', OLD), Version(9, 'W/"a"', NEW), False),
        (Version(9, 'W/"a"'), Version(9, 'W/"a"'), True),
        (Version(9, 'W/"a"'), Version(9, 'W/"b"'), False),
        (Version(9, '"a"'), Version(9, 'W/"a"'), True),
        (Version(9, '"a"'), Version(9, '"b"'), False),
        (Version(9, "", OLD), Version(9, "", OLD), True),
        (Version(9, "", OLD), Version(9, "", NEW), False),
        (Version(9), Version(9, '"a"', OLD), True),  # not told before
        (Version(9, '"a"', OLD), Version(8, '"a"', OLD), False),
        (Version(9), Version(8), False),
        (Version(9), Version(None), True),
        (Version(None), Version(9), True),
    ],
)
def test_versions_that_may_be_the_same(before: Version, now: Version, same: bool) -> None:
    assert before.same(now) == now.same(before) == same


class Failing(io.BytesIO):
    code = errno.ENOENT

    def seek(self, *_: Any) -> int:
        raise OSError(self.code, "no answer")


def test_a_picture_that_cannot_be_read_for_no_reason_of_its_own_is_not_taken_for_the_same() -> None:
    picture = Failing()
    assert not is_another(picture, "")
    picture.code = errno.EIO
    with pytest.raises(SourceError, match="no answer"):
        is_another(picture, "")
