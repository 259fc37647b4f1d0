"""What the readers of training sets share: options, files that may be missing, decoding, and what makes a sample."""

from __future__ import annotations

import errno
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from pydantic import Field

from depthmill.pipeline.config import StrictModel
from depthmill.pipeline.errors import SampleError, SourceError, TrainingError, check_memory
from depthmill.pipeline.file_state import holds_files
from depthmill.pipeline.sources.opening import AWAY_ERRORS
from depthmill.pipeline.sources.pictures import decode_image
from depthmill.pipeline.training.batch import Batch
from depthmill.pipeline.types import MAX_PIXELS

logger = logging.getLogger(__name__)

# Errors in reading that are a file's own, and not its folder's (decoders' have no number).
_OWN_ERRORS = (None, errno.EINVAL, errno.EISDIR, errno.ELOOP)


class SetOptions(StrictModel):
    """What every training set is told.

    Attributes:
        ratio: Share of the batches that come from this set, relative to the others' ratios.
    """

    ratio: float = Field(default=1.0, gt=0, allow_inf_nan=False)


_ANSWERS = "expected a disk or network that answers, and rights to read: run the same command again"


def existing(root: Path, pictures: Sequence[tuple[str, ...]], remedy: str) -> list[tuple[str, ...]]:
    """The pictures that have all their files; how many do not is logged.

    Args:
        root: Folder that the files are in.
        pictures: For each, the paths of its files below `root`, with forward slashes.
        remedy: What to do about missing files.

    Raises:
        TrainingError: If not one picture is complete, or a folder cannot be listed though it is there.
    """

    @cache
    def names(folder: str) -> frozenset[str]:
        # One listing a folder: asking for a hundred thousand files one by one takes minutes on a network's disk.
        try:
            return frozenset(path.name for path in (root / folder).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return frozenset()
        except OSError as error:
            raise TrainingError(f"{root / folder} cannot be listed ({error.strerror}): {_ANSWERS}") from error

    def missing(files: tuple[str, ...]) -> str | None:
        return next((file for file in files if file.rpartition("/")[2] not in names(file.rpartition("/")[0])), None)

    complete, first = [], None
    for files in pictures:
        lacks = missing(files)
        first = first or lacks
        if lacks is None:
            complete.append(files)
    if not complete:
        met = f"no {root / first}" if first else "no picture at all"
        raise TrainingError(f"{root}: {met}, and none of {len(pictures)} pictures is complete: {remedy}")
    if first:
        lost = len(pictures) - len(complete)
        logger.warning("%s: %d of %d pictures lack files and are left out, first %s", root, lost, len(pictures), first)
    return complete


def read_rgb(path: Path) -> npt.NDArray[np.uint8]:
    """Decode a picture to (H, W, 3) uint8.

    Raises:
        SampleError: If it cannot be read.
        OSError: If that is for a reason that is not its own.
    """
    try:
        return decode_image(path, MAX_PIXELS)
    except (SourceError, OSError) as error:
        _check_own(path, error)
        raise SampleError(f"{path}: {error}") from error


def read_16_bit(path: Path) -> npt.NDArray[np.uint16]:
    """Decode a grey PNG of 16 bits to (H, W) uint16, as stored.

    Raises:
        SampleError: If it cannot be read, or is of another type.
        OSError: If it cannot be read for a reason that is not its own.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            mode, values = image.mode, np.asarray(image)
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
        check_memory(error)
        _check_own(path, error)
        raise SampleError(f"{path}: cannot be decoded ({error or type(error).__name__}): replace it") from error
    if not mode.startswith("I"):
        raise SampleError(f"{path}: a picture of mode {mode}; expected grey with 16 bits: replace it")
    return values.astype(np.uint16)


def sample(
    where: object,
    rgb: npt.NDArray[np.uint8],
    target: npt.NDArray[np.float32],
    mask: npt.NDArray[np.bool_],
    size: tuple[int, int] | None = None,
) -> Batch:
    """Make a picture and its truth a batch of one.

    Args:
        where: What the picture is called in errors.
        rgb: (H, W, 3).
        target: (H, W) depth or (H, W, 3) normals; anything where `mask` is False.
        mask: (H, W), where there is truth.
        size: (h, w) to bring it to: a piece of that aspect ratio is cut from the middle and resized. Colours are
            averaged down; truth is taken at the nearest pixel, since a mean across an edge is true of neither side.

    Raises:
        SampleError: If the parts differ in size, no pixel has truth, or truth that `mask` vouches for is not finite.
    """
    shapes = {part.shape[:2] for part in (rgb, target, mask)}
    if len(shapes) > 1:
        raise SampleError(f"{where}: picture and truth differ in size, {sorted(shapes)}: replace one of the files")
    finite = np.isfinite(target).reshape(*mask.shape, -1).all(-1)
    if bad := int((mask & ~finite).sum()):
        raise SampleError(f"{where}: the truth of {bad} pixels is NaN or infinite: replace or remove the picture")
    if size is not None and size != mask.shape:
        rgb, target, mask = _resized(rgb, target, mask, size)
    if not mask.any():
        raise SampleError(f"{where}: not one pixel has truth: remove the picture")
    values = np.where(mask if target.ndim == 2 else mask[..., None], target, np.float32(0))
    channels = values.reshape(*mask.shape, -1).transpose(2, 0, 1)
    return Batch(
        rgb=torch.from_numpy(rgb.transpose(2, 0, 1)[None].astype(np.float32)) / 255,
        target=torch.from_numpy(np.ascontiguousarray(channels[None])),
        mask=torch.from_numpy(np.ascontiguousarray(mask[None])),
    )


def _check_own(path: Path, error: Exception) -> None:
    """See that a file could not be read for a reason of its own; else raise what its disk or network said."""
    cause = error if isinstance(error, OSError) else error.__cause__
    if not isinstance(cause, OSError) or cause.errno in _OWN_ERRORS:
        return
    if cause.errno not in AWAY_ERRORS or not holds_files(path.parent):
        raise cause


def _resized(
    rgb: npt.NDArray[np.uint8], target: npt.NDArray[np.float32], mask: npt.NDArray[np.bool_], size: tuple[int, int]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    (H, W), (height, width) = mask.shape, size
    scale = min(H / height, W / width)
    h, w = height * scale, width * scale
    top, left = (H - h) / 2, (W - w) / 2
    picture = Image.fromarray(rgb).resize(
        (width, height), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h)
    )
    rows = (top + (np.arange(height) + 0.5) * scale).astype(int).clip(max=H - 1)
    columns = (left + (np.arange(width) + 0.5) * scale).astype(int).clip(max=W - 1)
    return np.asarray(picture), target[np.ix_(rows, columns)], mask[np.ix_(rows, columns)]
