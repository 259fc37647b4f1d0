"""The disk is full, or something else cannot be written: nothing that was committed is harmed."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from depthmill.pipeline.errors import StoreError, StoreFullError
from depthmill.pipeline.types import Segment
from depthmill.tests.pipeline.store.samples import VIDEO, files, labels, write

FILL = """
import json, sys
from pathlib import Path
from depthmill.pipeline import store as stores
from depthmill.pipeline.errors import StoreFullError
from depthmill.pipeline.store.verify import verify
from depthmill.tests.pipeline.store.samples import IDENTITY, LAYOUT, VIDEO, files, write

path = Path(sys.argv[1]) / "s"
store = stores.create(path, LAYOUT, IDENTITY)
store.add(VIDEO)
committed = before = None
try:
    for segment in store.segments("video"):
        write(store, segment)
        committed, before = segment, files(path)
except StoreFullError as error:
    said = str(error)
else:
    sys.exit("it all fitted")
after = files(path)
free = stores.open_store(path)
left = [str(segment) for segment in free.pending("video")]
(Path(sys.argv[1]) / "ballast").unlink()
for segment in free.pending("video"):
    write(free, segment)
print(json.dumps({
    "said": said, "left": left, "harmed": [key for key in before or {} if after.get(key) != before[key]],
    "partial": [key for key in after if key.endswith(".partial")],
    "damage": [str(one) for one in verify(free).damage], "pending": len(free.pending("video")),
}))
"""


def test_a_disk_that_fills_up(tmp_path):
    """A real one: a tmpfs of a mount namespace of its own, with room for one segment and a half."""
    unshare = [shutil.which("unshare") or "unshare", "-rm", "sh", "-ec"]
    mount = f"mount -t tmpfs -o size=256k depthmill-test '{tmp_path}'"
    try:
        subprocess.run([*unshare, mount], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no mount namespaces here: {error}")
    ballast = f"head -c 143360 /dev/zero > '{tmp_path}/ballast'"
    fill = f"{mount}; {ballast}; exec '{sys.executable}' -c \"$FILL\" '{tmp_path}'"
    env = {**os.environ, "FILL": FILL}
    done = subprocess.run([*unshare, fill], capture_output=True, text=True, timeout=100, env=env)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert f"{tmp_path}/s/video/" in report["said"]
    assert "No space left on device" in report["said"]
    assert " are free there" in report["said"]
    assert report["left"] == ["video[8:16]", "video[16:18]"]
    assert (report["harmed"], report["partial"], report["damage"], report["pending"]) == ([], [], [], 0)


@pytest.mark.parametrize("code", [28, 122], ids=["ENOSPC", "EDQUOT"])
def test_every_write_that_finds_no_space_says_so(store, monkeypatch, code):
    segment = Segment("video", 16, 18)
    before = files(store.uri)

    def full(file):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        writer = store.writer(segment)
        for index in (16, 17):
            writer.put(index, *labels(index))
        free = shutil.disk_usage(store.uri).free // 10**9
        with pytest.raises(
            StoreFullError, match=rf"video/depth/c/4/0/0 cannot be written: .* {free:,}[0-9,]* are free"
        ):
            writer.commit()
        with pytest.raises(StoreFullError, match=r"run\.json"):
            store.directory.write("run.json", b"{}")
    assert files(store.uri) == before, "no file, and no part of one, is left"
    assert segment in store.pending("video")
    write(store, segment)
    assert segment not in store.pending("video")


def test_a_file_that_may_not_be_so_long_says_so(store):
    """A real failure in the middle of a write: this process may write no file of more than 1,000 bytes."""
    before = files(store.uri)
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
        with pytest.raises(StoreFullError, match=r"cannot be written: File too large; .* raise that limit"):
            write(store, Segment("video", 16, 18))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert files(store.uri) == before
    assert not list(Path(store.uri).rglob("*.partial"))


@pytest.mark.parametrize("leaves", ["nothing", "an empty folder"])
def test_a_store_that_is_away_is_not_begun_anew_where_it_was(store, tmp_path, leaves):
    path, away = Path(store.uri), tmp_path / "away"
    before = files(path)
    path.rename(away)
    if leaves == "an empty folder":
        path.mkdir()
    for attempt in (
        lambda: write(store, Segment("video", 16, 18)),
        lambda: store.add_source(dataclasses.replace(VIDEO, id="another")),
        lambda: store.publish(["video"]),
    ):
        with pytest.raises(StoreError, match=rf"{path}.*is (away|gone).*mount.*same command again"):
            attempt()
    assert path.exists() == (leaves != "nothing")
    assert not path.exists() or not any(path.iterdir())
    path.exists() and path.rmdir()
    away.rename(path)
    assert files(path) == before
    write(store, Segment("video", 16, 18))
