"""Stores whose depth flickers, for smoothing; smoothing in this process, and what it wrote."""

import io

import numpy as np
from rich.console import Console

from depthmill.pipeline.config import SmoothConfig
from depthmill.pipeline.sources import open_source
from depthmill.pipeline.store import Layout, create
from depthmill.tests.pipeline.store import samples
from depthmill.workers.smooth import smooth


def labelled(path, video, segment_frames=8, upto=None, labels=("depth", "normals"), failed=()):
    """A store in which the depth of a video, or of pictures, flickers: its id too; `upto` segments are labelled."""
    source = open_source(str(video))
    about = source.probe()
    store = create(path, Layout(labels=labels, shard_frames=4, segment_frames=segment_frames), samples.IDENTITY)
    store.add(about)
    rng = np.random.default_rng(0)
    ramp = np.linspace(0.3, 0.6, about.width, dtype=np.float32) * np.ones((about.height, 1), np.float32)
    depths = (np.float32(rng.uniform(0.8, 1.2)) * ramp for _ in range(about.frames))
    x, y = np.meshgrid(np.linspace(-0.6, 0.3, about.width), np.linspace(0.2, 0.5, about.height))
    normals = np.stack([x, y, np.sqrt(1 - x**2 - y**2)], -1).astype(np.float32)
    for segment in store.segments(about.id)[:upto]:
        writer = store.writer(segment)
        for index in range(segment.start, segment.stop):
            if index in failed:
                writer.fail(index, "broken")
            else:
                writer.put(index, next(depths), normals if "normals" in labels else None)
        writer.commit()
    source.close()
    return store, about.id


def written(store, source_id=""):
    """Path -> bytes of every file that smoothing wrote, or of those of one source."""
    found = samples.files(store.uri)
    return {k: v for k, v in found.items() if k.startswith(source_id) and ("/temporal/" in k or "_smooth/" in k)}


def run(store, **options):
    console = Console(file=io.StringIO())
    return smooth(store.uri, SmoothConfig(**{"workers": 0, "max_edge": 4, **options}), console=console)
