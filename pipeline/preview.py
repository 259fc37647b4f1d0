"""Pictures of a store, for people: a contact sheet of each source, and a side-by-side video of each video.

Of a smoothed store on demand raw and smoothed side by side, and what smoothing did over time: see `timeline`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import track

from depthmill.pipeline.colours import GREY, Rgb, depth_rgb, normals_rgb
from depthmill.pipeline.config import make_folder
from depthmill.pipeline.errors import ConfigError, DepthmillError, RunStoppedError, SourceError, StoreError
from depthmill.pipeline.mp4 import write_mp4
from depthmill.pipeline.room import room_in
from depthmill.pipeline.sources import open_source
from depthmill.pipeline.sources.naming import preview_name
from depthmill.pipeline.sources.video_container import open_container
from depthmill.pipeline.store import Store, open_datasets, open_store, write_atomically
from depthmill.pipeline.store.files import damaged
from depthmill.pipeline.store.smoothed import smoothed as apply_smoothing
from depthmill.pipeline.store.temporal import Temporal
from depthmill.pipeline.timeline import Timeline, draw_timeline
from depthmill.pipeline.types import LABELLED, FrameSource

if TYPE_CHECKING:
    import xarray

log = logging.getLogger(__name__)

_RANGE_FRAMES = 32  # sampled for the depth range, over the whole length
_CELL_WIDTH, _CELL_HEIGHT = 320, 400  # most pixels of a contact sheet's picture
_MARGIN, _GAP, _LINE = 72, 4, 18
_TIMELINE_FRAMES, _TIMELINE_WIDTH = 1024, 480  # at most; at least, in pixels
_CONTOURS = 12  # over the range of colours
_SMOOTHED = "{}\nsmoothed"  # what the smoothed kind of a label is called


@dataclass(frozen=True, eq=False)
class _View:
    """What is drawn of one source.

    Attributes:
        source_id: Its id.
        dataset: Its labels as the model gave them, decoded.
        labels: What is drawn, by the name that it is given, in order: depths and normals as in `dataset`.
        status: (frames,) uint8.
        near_far: Depths that get the first and the last colour, the same for all frames.
        pictures: Where its frames can be read, or None.
        note: Why not, or "".
    """

    source_id: str
    dataset: xarray.Dataset
    labels: dict[str, xarray.DataArray]
    status: npt.NDArray[np.uint8]
    near_far: tuple[float, float]
    pictures: FrameSource | None
    note: str

    @property
    def rows(self) -> tuple[str, ...]:
        return ("picture", *self.labels) if self.pictures else tuple(self.labels)


@dataclass(frozen=True)
class Drawn:
    """What came of a preview.

    Attributes:
        files: Those written, in order of source.
        left_out: Id -> why a source is not drawn, or not whole.
    """

    files: list[Path]
    left_out: dict[str, str]


def preview(
    store_path: str | Path,
    out_dir: Path,
    *,
    source_id: str | None = None,
    frames: int = 6,
    max_width: int = 1920,
    smooth: bool = False,
    video: bool = True,
    start_s: float = 0.0,
    stop_s: float = math.inf,
) -> Drawn:
    """Draw a store: for each source a contact sheet (PNG), and for each video a side-by-side MP4.

    A source that cannot be drawn keeps no other from it.

    Args:
        store_path: The store.
        out_dir: Where the files go, named by source id, so that no run takes them for inputs; made if there is none.
        source_id: Only this source.
        frames: Columns of a contact sheet, spread over the source's length.
        max_width: Most pixels across the side-by-side video; it is no higher either.
        smooth: Draw smoothed labels beside the raw ones, and below the contact sheet how they go over time;
            without `source_id`, sources that are not smoothed are drawn as ever.
        video: Whether to draw the MP4.
        start_s: Of the part of the video that the MP4 shows, from where its time counts.
        stop_s: Likewise.

    Raises:
        StoreError: If there is no such store or source, or it is not smoothed and `smooth` asks for that.
        ConfigError: If the folder cannot be written, or an option makes no sense.
        RunStoppedError: If the disk is full.
    """
    if frames < 1 or max_width < 64:
        raise ConfigError(f"preview of {frames} frames, {max_width} pixels wide: give at least 1 frame and 64 pixels")
    if not 0 <= start_s < stop_s:
        raise ConfigError(f"a preview from {start_s} to {stop_s} s: give a start of at least 0, and a stop after it")
    store = open_store(store_path)
    before = store.sources()  # those that are added, or removed, while others are opened are not damaged
    datasets = open_datasets(store_path, sources=None if source_id is None else [source_id])
    smoothed = {}
    if smooth and source_id is not None:
        Temporal(store, source_id).check_current()
        smoothed = apply_smoothing(store, datasets)
    elif smooth:
        smoothed = apply_smoothing(store, {one: datasets[one] for one in _smoothed(store) if one in datasets})
    make_folder(out_dir)
    names = [one for one in store.sources() if one in before] if source_id is None else [source_id]
    check = f"`depthmill verify {quote(store.uri)}`"
    lost = {one: f"it cannot be opened: run {check}" for one in names if one not in datasets}
    drawn = Drawn([], {**store.damaged, **lost})
    for name in datasets:
        try:
            with room_in(out_dir), _viewed(store, name, datasets[name], smoothed.get(name)) as view:
                timeline = _timeline(store, view) if name in smoothed else None
                drawn.files.append(_write_contact_sheet(view, timeline, out_dir / preview_name(name, ".png"), frames))
                if "time" in view.dataset and video:
                    shown = _between(store, view, start_s, stop_s)
                    if shown:
                        path = out_dir / preview_name(name, ".mp4")
                        drawn.files.append(_write_video(view, shown, start_s, path, max_width))
                    else:
                        log.warning("%s: it has no frame from %g to %g s; it gets no video", name, start_s, stop_s)
        except RunStoppedError:
            raise
        except Exception as error:  # codecs and libav raise whatever they stumble over
            why = f"{type(error).__name__}: {error}; {check} says whether its labels are damaged"
            drawn.left_out[name] = str(error) if isinstance(error, DepthmillError) else why
    return drawn


@contextmanager
def _viewed(store: Store, name: str, dataset: xarray.Dataset, smoothed: xarray.Dataset | None) -> Iterator[_View]:
    """A source, opened to be drawn."""
    attributes = store.attributes(name)
    pictures, note = _open_pictures(attributes["uri"], attributes["fingerprint"])
    if note:
        log.warning("%s: %s; drawing its labels alone", name, note)
    status = store.status(name)
    with closing(pictures) if pictures else nullcontext():
        labels = _labels(store, name, dataset, smoothed)
        yield _View(name, dataset, labels, status, _near_far(dataset, status), pictures, note)


def _labels(
    store: Store, source_id: str, raw: xarray.Dataset, smoothed: xarray.Dataset | None
) -> dict[str, xarray.DataArray]:
    """What is drawn of a source, by name: normals twice only where they were filtered."""
    found: dict[str, xarray.DataArray] = {}
    for name in store.layout.labels:
        found[name] = raw[name]
        if smoothed is not None and (name == "depth" or Temporal(store, source_id).filtered()):
            found[_SMOOTHED.format(name)] = smoothed[name]
    return found


def _timeline(store: Store, view: _View) -> Timeline:
    """One column, in the middle, of as many frames as can be told apart, and what was solved for all."""
    frames, width = view.status.size, view.dataset.sizes["x"]
    column = width // 2
    shown = _spread(frames, _TIMELINE_FRAMES)
    raw, smoothed = (
        np.stack([array[i, :, column].values for i in shown], -1)
        for array in (view.labels["depth"], view.labels[_SMOOTHED.format("depth")])
    )
    scale, shift, shot = map(Temporal(store, view.source_id).read, ("scale", "shift", "shot"))
    known = view.status == LABELLED
    return Timeline(
        raw=raw,
        smoothed=smoothed,
        scale=np.where(known, scale, np.nan),
        shift=np.where(known, shift, np.nan),
        shot=shot,
        times_s=view.dataset["time"].values if "time" in view.dataset else None,
        column=f"column {column} of {width}",
    )


def _open_pictures(uri: str, fingerprint: str) -> tuple[FrameSource | None, str]:
    """The source's own frames, or why there are none."""
    try:
        source = open_source(uri)
        found = source.probe().fingerprint
    except SourceError as error:
        return None, str(error)
    if found != fingerprint:
        source.close()
        return None, f"{uri} is not what was labelled: it changed since"
    return source, ""


def _near_far(dataset: xarray.Dataset, status: npt.NDArray[np.uint8]) -> tuple[float, float]:
    """The 2nd and 98th percentile of a source's depth, once for all frames, so that colours do not flicker."""
    labelled = np.flatnonzero(status == LABELLED)
    if "depth" not in dataset or not labelled.size:
        return 0.0, 1.0
    chosen = labelled[_spread(labelled.size, _RANGE_FRAMES)]
    stride = max(1, max(dataset.sizes["y"], dataset.sizes["x"]) // 256)
    sample = np.concatenate([dataset["depth"][i].values[::stride, ::stride].ravel() for i in chosen.tolist()])
    if np.isnan(sample).all():
        return 0.0, 1.0
    near, far = np.nanpercentile(sample, (2, 98))
    return float(near), float(far)


def _spread(length: int, count: int) -> list[int]:
    """At most `count` different indexes spread evenly over [0, length), both ends included."""
    indexes: list[int] = np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(int)).tolist()
    return indexes


def _draw(view: _View, index: int, row: str, picture: Rgb | None) -> Image.Image:
    """One picture of one frame: (H, W), or its valid part where pictures differ in size."""
    if row == "picture" and picture is not None:
        return Image.fromarray(picture)
    if row == "picture" or view.status[index] != LABELLED:
        return _grey(view, index)
    label = view.labels[row][index].values
    if "size" in view.dataset:
        height, width = view.dataset["size"][index].values.tolist()
        label = label[:height, :width]
    if np.isnan(label).all() if label.ndim == 2 else not label.any():  # which is what Zarr makes of a file that is gone
        raise ValueError(f"frame {index} is labelled, but its {row.replace(chr(10), ' ')} is missing")
    return Image.fromarray(depth_rgb(label, *view.near_far) if label.ndim == 2 else normals_rgb(label))


def _grey(view: _View, index: int) -> Image.Image:
    height, width = view.dataset.sizes["y"], view.dataset.sizes["x"]
    if "size" in view.dataset and view.status[index] == LABELLED:
        height, width = view.dataset["size"][index].values.tolist()
    return Image.new("RGB", (width, height), (GREY, GREY, GREY))


def _write_contact_sheet(view: _View, timeline: Timeline | None, path: Path, frames: int) -> Path:
    """Columns are frames; rows are the picture and its labels; above a column its time or name; below, the timeline."""
    H, W = view.dataset.sizes["y"], view.dataset.sizes["x"]
    scale = min(_CELL_WIDTH / W, _CELL_HEIGHT / H, 1)
    cell = max(1, round(W * scale)), max(1, round(H * scale))
    columns = _spread(view.status.size, frames)
    top = 2 * _LINE + _GAP
    width = _MARGIN + len(columns) * (cell[0] + _GAP)
    sheet = Image.new("RGB", (width, top + len(view.rows) * (cell[1] + _GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    draw.text((_GAP, 2), view.source_id + (f"   (labels alone: {view.note})" if view.note else ""), "black", font)
    for row, name in enumerate(view.rows):
        draw.text((_GAP, top + row * (cell[1] + _GAP) + cell[1] // 2 - 6), name, "black", font)
    for column, index in enumerate(columns):
        x = _MARGIN + column * (cell[0] + _GAP)
        draw.text((x, _LINE + 2), _fitting(_caption(view, index), cell[0], font), "black", font)
        picture = _picture(view, index)
        for row, name in enumerate(view.rows):
            drawn = _draw(view, index, name, picture)
            drawn.thumbnail(cell)
            sheet.paste(drawn, (x, top + row * (cell[1] + _GAP)))
    if timeline is not None:
        sheet = _with_timeline(sheet, timeline, view.near_far)
    data = BytesIO()
    sheet.save(data, "PNG")
    write_atomically(path, data.getvalue())
    return path


def _with_timeline(sheet: Image.Image, timeline: Timeline, near_far: tuple[float, float]) -> Image.Image:
    near, far = near_far
    width = max(sheet.width - _MARGIN - _GAP, _TIMELINE_WIDTH)
    step = max(far - near, 1e-3) / _CONTOURS
    drawn = draw_timeline(timeline, width, _MARGIN, lambda depth: depth_rgb(depth, near, far), step)
    both = Image.new("RGB", (drawn.width + _GAP, sheet.height + drawn.height), "white")
    both.paste(sheet)
    both.paste(drawn, (0, sheet.height))
    return both


def _picture(view: _View, index: int) -> Rgb | None:
    if view.pictures is None:
        return None
    (frame,) = view.pictures.read(index, index + 1)
    return frame.image


def _caption(view: _View, index: int) -> str:
    if "time" in view.dataset:
        return f"{float(view.dataset['time'][index]):.2f} s"
    return str(view.dataset["key"].values[index])


def _fitting(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text, its front cut off until it fits: names differ at their ends."""
    short = text
    while font.getlength(short) > width and len(short) > 2:
        short = "…" + short[2:]
    return short


def _smoothed(store: Store) -> list[str]:
    """The sources whose smoothing is there, whole, and of today's labels."""
    found = []
    for source_id in store.sources():
        temporal = Temporal(store, source_id)
        try:
            if temporal.attributes() is not None:
                temporal.check_current()
                found.append(source_id)
        except StoreError as error:
            log.warning("%s; drawing its labels as they are", error)
    return found


def _between(store: Store, view: _View, start_s: float, stop_s: float) -> range:
    """The frames that are shown from `start_s` until before `stop_s`."""
    times_s = view.dataset["time"].values
    if np.isnan(times_s).any():  # which is what Zarr makes of a file that is gone
        raise damaged(store.uri, f"{view.source_id}/time", "times are missing")
    return range(*np.searchsorted(times_s, (start_s, stop_s)).tolist())


def _pixel_aspect(view: _View) -> Fraction:
    """Width over height of a pixel on the screen: 1 but for anamorphic videos, and where the source is gone."""
    if view.pictures is None:
        return Fraction(1)
    container, stream = open_container(view.pictures.probe().uri)
    with container:
        aspect = stream.sample_aspect_ratio or Fraction(1)
        turned = (stream.height, stream.width) != (view.dataset.sizes["y"], view.dataset.sizes["x"])
    return 1 / aspect if turned else aspect


def _write_video(view: _View, frames: range, start_s: float, path: Path, max_width: int) -> Path:
    """Picture | depth | normals, each frame shown when the source shows it, from `start_s` on."""
    H, W = view.dataset.sizes["y"], view.dataset.sizes["x"]
    shrink = min(1, max_width // len(view.rows) / W, max_width / H)
    panel = max(2, int(W * shrink) // 2 * 2), max(2, round(H * shrink / 2) * 2)  # yuv420p wants even sides
    # A video of one frame has no rate, and need not: each frame has its own time.
    rate = Fraction(view.dataset.attrs.get("fps") or 25).limit_denominator(1001) or Fraction(1, 1001)
    times_s = view.dataset["time"].values
    console = Console(stderr=True)
    strips = track(
        _strips(view, frames, panel),
        path.name,
        len(frames),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    shown = ((float(times_s[index]) - start_s, np.asarray(strip)) for index, strip in strips)
    write_mp4(path, shown, (panel[0] * len(view.rows), panel[1]), rate, _pixel_aspect(view))
    return path


def _strips(view: _View, frames: range, panel: tuple[int, int]) -> Iterator[tuple[int, Image.Image]]:
    """Frames of a video in order, one held at a time."""
    read = view.pictures.read(frames.start, frames.stop) if view.pictures else None
    for index, picture in zip(frames, (frame.image for frame in read) if read else (None,) * len(frames), strict=True):
        strip = Image.new("RGB", (panel[0] * len(view.rows), panel[1]))
        for column, row in enumerate(view.rows):
            drawn = _draw(view, index, row, picture).resize(panel, Image.Resampling.BILINEAR)
            strip.paste(drawn, (column * panel[0], 0))
            if _SMOOTHED.format("depth") in view.labels and row in view.labels:
                _tag(strip, row.replace("\n", " "), column * panel[0])
        yield index, strip


def _tag(strip: Image.Image, text: str, x: int) -> None:
    """A panel's name in its corner: raw and smoothed look alike until they move."""
    draw = ImageDraw.Draw(strip)
    font = ImageFont.load_default(size=max(10, strip.height // 30))
    draw.text((x + 6, 4), text, "black", font, stroke_width=2, stroke_fill="white")
