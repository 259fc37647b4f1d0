"""By what a video is known to be another one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from depthmill.pipeline.sources import open_source
from depthmill.pipeline.sources.video_packets import fingerprint, scan
from depthmill.pipeline.types import MAX_FRAMES, MAX_PIXELS
from depthmill.tests import media as make


def test_fingerprint_catches_a_replaced_file(tmp_path: Path) -> None:
    path = make.write_video(tmp_path / "clip.mp4")
    before = open_source(path).probe()
    path.write_bytes(path.read_bytes())
    assert open_source(path).probe().fingerprint == before.fingerprint
    make.write_video(path, pictures=[make.paint(index) for index in range(1, 41)])
    after = open_source(path).probe()
    assert after.fingerprint != before.fingerprint
    assert after.id == before.id


def test_a_fingerprint_is_of_the_packets_the_size_and_both_ends(tmp_path: Path) -> None:
    path = make.write_video(tmp_path / "clip.mp4", frames=4)
    table = scan(str(path), MAX_FRAMES, MAX_PIXELS)
    tables = [table, replace(table, pts=table.pts + 1), replace(table, size=table.size + 1)]
    contents = [bytes(200_000), b"x" + bytes(199_999), bytes(199_999) + b"x", bytes(200_001)]
    prints: set[str] = set()
    for content, packets in [(contents[0], one) for one in tables] + [(one, table) for one in contents]:
        path.write_bytes(content)
        prints.add(fingerprint(str(path), packets))
    assert len(prints) == 6
