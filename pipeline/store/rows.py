"""Labels, decoded: rows of an array, or a frame's own, as `open_datasets` has them, but without a dataset.

Opening one costs milliseconds and some 60 KB a source. Here an array is opened by what is known of it, reading nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from depthmill.pipeline.store.files import decoding
from depthmill.pipeline.store.store import Store
from depthmill.pipeline.store.temporal import Temporal

if TYPE_CHECKING:
    import zarr


@dataclass(frozen=True, eq=False)
class Rows:
    """An array of labels, decoded by its attributes to float32: to the bit what xarray makes of it.

    Attributes:
        stored: Packed.
        scale: (frames,), of smoothed depth: what is decoded is scaled, then shifted.
        shift: (frames,).
    """

    stored: zarr.Array[Any]
    scale: npt.NDArray[np.float32] | None = None
    shift: npt.NDArray[np.float32] | None = None

    def __getitem__(self, key: tuple[Any, ...]) -> npt.NDArray[np.float32]:
        """Some of it, by an index for each axis as in Zarr's `oindex`; the last may be left out."""
        attributes: dict[str, Any] = dict(self.stored.attrs)
        packed = np.asarray(self.stored.oindex[key])
        values = packed.astype(np.float32)
        values *= np.float32(attributes.get("scale_factor", 1))
        if "add_offset" in attributes:  # adding 0 would lose the sign of -0
            values += np.float32(attributes["add_offset"])
        if (fill := attributes.get("_FillValue")) is not None:
            values[packed == fill] = np.nan
        if self.scale is not None and self.shift is not None:
            a, b = self.scale[key[0]], self.shift[key[0]]
            if np.ndim(a):
                a, b = (np.reshape(one, (-1,) + (1,) * (values.ndim - 1)) for one in (a, b))
            values = values * a + b
        return values


@dataclass(frozen=True, eq=False)
class SourceLabels:
    """One kind of labels of one source, a frame at a time. Made by `open_labels`; threads may read at once.

    Attributes:
        store: Where they are.
        source_id: Of the source.
        name: Of the labels.
        rows: All of them.
    """

    store: Store
    source_id: str
    name: str
    rows: Rows

    def read(self, frame: int) -> npt.NDArray[np.float32]:
        """A frame's, of its own size: (H, W), or (H, W, 3) normals; invalid as in `open_datasets`.

        Raises:
            StoreDamagedError: If they cannot be decoded.
        """
        with decoding(self.store.uri, f"{self.source_id}/{self.name}", f"frame {frame}: "):
            labels = self.rows[frame,]
            if self.store.attributes(self.source_id)["kind"] == "video":
                return labels
            height, width = self.store.read(self.source_id, "size", frame, frame + 1)[0]
            return labels[:height, :width]


def open_labels(store: Store, source_id: str, name: str, *, smooth: bool = False) -> SourceLabels:
    """Open one kind of labels of a source, none of which is read yet.

    Args:
        store: Where they are.
        source_id: Of the source.
        name: One of the layout's `arrays`.
        smooth: With scale and shift applied, or what was filtered; the source must be `Temporal.usable`.
    """
    rows = smoothed_rows(Temporal(store, source_id)).get(name) if smooth else None
    return SourceLabels(store, source_id, name, rows or Rows(store.array(source_id, name)))


def smoothed_rows(temporal: Temporal) -> dict[str, Rows]:
    """Those labels of a source that smoothing changes, by name."""
    store, source_id = temporal.store, temporal.source_id
    scale, shift = temporal.read("scale"), temporal.read("shift")
    rows = {"depth": Rows(store.array(source_id, "depth"), scale, shift)}
    if temporal.filtered():
        rows = {name: Rows(store.array(source_id, f"{name}_smooth")) for name in store.layout.labels}
    if store.layout.uncertainty:  # in units of depth, whose are others now
        rows["uncertainty"] = Rows(store.array(source_id, "uncertainty"), scale, np.zeros_like(shift))
    return rows
