"""Videos of painted frames, of each kind that is to be read right."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from depthmill.tests import media as make
from depthmill.tests.pipeline.sources.contract import read_all

FRAMES = 40

OPEN_GOP = {"x264-params": "open-gop=1:b-adapt=0:scenecut=0"}
INTRA_REFRESH = {"x264-params": "intra-refresh=1:scenecut=0"}
ALT_REF = {"auto-alt-ref": "1", "lag-in-frames": "10", "deadline": "good", "cpu-used": "5"}
TIMES_MS = [40 * index + 13 * (index % 3) for index in range(FRAMES)]

GOOD = {
    "b_frames.mp4": {},
    "no_b_frames.mp4": {"bframes": 0},
    "open_gop.mp4": {"bframes": 3, "options": OPEN_GOP},
    "intra_refresh.mp4": {"gop": 12, "options": INTRA_REFRESH},
    "ten_bit.mkv": {"pix_fmt": "yuv420p10le"},
    "variable_rate.mp4": {"times_ms": TIMES_MS},
    "transport.ts": {},
    "open_gop.ts": {"codec": "mpeg2video"},
    "program.mpg": {"codec": "mpeg2video"},
    "no_pts.avi": {},
    "reordered.avi": {"codec": "mpeg4"},
    "intra.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p", "bframes": 0},
    "raw.h264": {},
    "hevc.mp4": {"codec": "libx265"},
    "hidden_frames.webm": {"codec": "libvpx", "options": ALT_REF},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "av1.mp4": {"codec": "libsvtav1"},
}


def noisy(frames: int = FRAMES) -> list[make.Picture]:
    """Painted frames with enough noise that every frame has bytes worth breaking."""
    random = np.random.default_rng(1)
    return [
        np.clip(make.paint(index) + random.integers(-20, 20, (make.HEIGHT, make.WIDTH, 1)), 0, 255).astype(np.uint8)
        for index in range(frames)
    ]


def indices(path: Path) -> list[int | None]:
    return [None if frame.image is None else make.read_index(frame.image) for frame in read_all(path)]
