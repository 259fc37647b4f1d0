"""Where the pixels of one frame are in another: dense optical flow, by OpenCV's DIS."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from depthmill.pipeline.config import Preset

_PRESETS = {
    "ultrafast": cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST,
    "fast": cv2.DISOPTICAL_FLOW_PRESET_FAST,
    "medium": cv2.DISOPTICAL_FLOW_PRESET_MEDIUM,
}
# OpenCV 5.0 reads out of bounds, and dies, where a short side is less than its pyramid expects (16 by 200 pixels does).
_SHORTEST = 32


def dense_flow(of: npt.NDArray[np.uint8], to: npt.NDArray[np.uint8], preset: Preset) -> npt.NDArray[np.float32]:
    """Flow from one picture to another, the same however many threads OpenCV has.

    Args:
        of: (h, w) uint8 grey.
        to: (h, w) uint8 grey.
        preset: How hard DIS tries (Kroeger et al., ECCV 2016).

    Returns:
        (h, w, 2) float32 pixels, x then y: the pixel (x, y) of `of` is at (x, y) + flow[y, x] in `to`.
    """
    h, w = of.shape
    below, beside = max(0, _SHORTEST - h), max(0, _SHORTEST - w)
    if below or beside:
        of, to = (np.pad(grey, ((0, below), (0, beside)), mode="edge") for grey in (of, to))
    search = cv2.DISOpticalFlow.create(_PRESETS[preset])
    return np.asarray(search.calc(of, to, None)[:h, :w], np.float32)  # type: ignore[call-overload]
