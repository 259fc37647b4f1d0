"""A run that asks for little."""

import pytest

from depthmill.pipeline.config import LabelConfig
from depthmill.tests import media


@pytest.fixture
def config(checkpoints, loaded_once):
    return LabelConfig(
        checkpoint=str(checkpoints / "depth"),
        normals_checkpoint=str(checkpoints / "normals"),
        device="cpu",
        batch_size=4,
        shard_frames=4,
        segment_frames=8,
        workers=0,
        threads=1,
    )


@pytest.fixture
def video(tmp_path):
    return media.write_video(tmp_path / "clip.mp4", frames=19)
