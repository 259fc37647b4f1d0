import os
from pathlib import Path

import pytest

from depthmill.pipeline.errors import TrainingError
from depthmill.pipeline.training.folder import read_config, write_config


@pytest.mark.parametrize("damage", [b"", b"\0" * 40, b'{"steps": ', b"\xff", None], ids=str)
def test_a_configuration_that_cannot_be_read_is_named(tmp_path: Path, damage: bytes | None) -> None:
    write_config(tmp_path, {"steps": 4})
    assert read_config(tmp_path) == {"steps": 4}
    (tmp_path / "config.json").unlink()
    if damage is not None:
        (tmp_path / "config.json").write_bytes(damage)
    with pytest.raises(TrainingError, match=r"/config\.json cannot be read \(.*put it back, or start over with --over"):
        read_config(tmp_path)


def test_a_kill_while_the_configuration_is_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(tmp_path, {"steps": 4})
    monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        write_config(tmp_path, {"steps": 5})
    assert read_config(tmp_path) == {"steps": 4}
