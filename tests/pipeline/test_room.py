import errno
import os
import re
import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError

from depthmill.pipeline import room
from depthmill.pipeline.errors import RunStoppedError
from depthmill.pipeline.room import room_in

FULL = os.strerror(errno.ENOSPC)


@pytest.mark.parametrize(
    ("error", "free"),
    [
        (OSError(errno.ENOSPC, FULL), 1 << 40),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 1 << 40),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), 1 << 40),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 5243712 vs 5243664"), 4096),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_full_disk_is_said_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, free: int
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: usage)
    with (
        pytest.raises(RunStoppedError, match=rf"^{re.escape(str(tmp_path))} .* full, .* saved stays$"),
        room_in(tmp_path),
    ):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file", b"/gone/events"),  # tensorboard's
        SafetensorError('I/O error: No such file or directory (os error 2) at path "/gone/states/.tmp"'),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_folder_that_goes_away_is_said_in_a_line(error: Exception) -> None:
    with pytest.raises(RunStoppedError, match=r"^/gone can no longer be used "), room_in(Path("/gone")):
        raise error


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), OSError(errno.EIO, "I/O"), OSError("?")], ids=lambda error: type(error).__name__
)
def test_other_errors_stay_what_they_are(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as raised, room_in(tmp_path):
        raise error
    assert raised.value is error
