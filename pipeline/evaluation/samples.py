"""The pictures of a set: which there are, what is true of them, and how the model is to see them."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from depthmill.pipeline.errors import EvaluationError, RunStoppedError, UnscorableError, check_memory
from depthmill.pipeline.evaluation import decode
from depthmill.pipeline.evaluation.archive import Archive
from depthmill.pipeline.evaluation.datasets import Colours, Crop, EvaluationSet
from depthmill.pipeline.evaluation.decode import Floats
from depthmill.pipeline.geometry import axes_signs
from depthmill.pipeline.store import write_atomically

_SHOWN = 3


@dataclass(frozen=True)
class Sample:
    """One picture of a set: the paths of its files, and its name, the picture's path without suffix."""

    name: str
    picture: str
    truth: str
    mask: str | None


@dataclass(frozen=True, eq=False)
class Truth:
    """Ground truth as it is scored.

    Attributes:
        values: (H, W) metres; or (H, W, 3) vectors, x right, y up, z towards the viewer.
        mask: (H, W) bool, what is scored; at least one pixel, all finite.
        nan_pixels: How many pixels are NaN, or infinite, and are none of `mask`.
    """

    values: Floats
    mask: npt.NDArray[np.bool_]
    nan_pixels: int


def open_samples(wanted: EvaluationSet, data: Path, split: Path | None = None) -> tuple[Archive, tuple[Sample, ...]]:
    """Open a set and list its pictures, sorted by name; whatever is missing is found here, before any work.

    Args:
        wanted: The set.
        data: Its tar, the folder that the tar unpacks to, or a folder that has either at `wanted.archive`.
        split: A list of pictures to use instead of all: each line begins with a picture's path in the set, as in
            Marigold's `data_split/` and DSINE's `split/`, or with its name. Lines whose second word is `None` (KITTI's
            without ground truth) are left out.

    Raises:
        EvaluationError: If files are missing; names the first.
    """
    archive = Archive(data)
    try:
        samples = _samples(wanted, archive)
        if not samples and (data / wanted.archive).exists():
            archive = Archive(data / wanted.archive)
            samples = _samples(wanted, archive)
        if not samples:
            raise EvaluationError(
                f"{data} holds no ground truth of {wanted.name}; expected files such as {wanted.example}, as in "
                f"{wanted.archive} of {wanted.home}: give that, or the folder above it"
            )
        return archive, _choose(wanted, archive, samples, split)
    except EvaluationError:
        archive.close()
        raise


def read_truth(wanted: EvaluationSet, archive: Archive, sample: Sample) -> Truth:
    """Read a picture's ground truth.

    Raises:
        UnscorableError: If it cannot be decoded, or nothing in it can be scored.
        EvaluationError: If its files cannot be read: that is no fault of the picture's.
    """
    truth, valid = archive.read(sample.truth), None if sample.mask is None else archive.read(sample.mask)
    try:
        values = wanted.decode(truth)
        mask = None if valid is None else decode.array(valid) != 0
        if wanted.crop is not None:
            values = values[wanted.crop(*values.shape[:2])]
    except Exception as error:  # Pillow's and FFmpeg's decoders raise whatever they stumble over
        check_memory(error)
        raise UnscorableError(f"its ground truth cannot be read: {str(error) or type(error).__name__}") from error
    H, W = values.shape[:2]
    if wanted.modality == "normals":
        values = values * np.array(axes_signs(wanted.axes), values.dtype)
        finite = np.isfinite(values).all(-1)
        mask = finite & values.any(-1)
    else:
        finite = np.isfinite(values)
        if mask is None:
            mask = (values > wanted.valid_range[0]) & (values < wanted.valid_range[1])
        elif mask.shape != (H, W):
            raise UnscorableError(f"its mask is {mask.shape[0]}x{mask.shape[1]}, its ground truth {H}x{W}")
        elif bad := int((mask & ~(finite & (values > 0))).sum()):
            raise UnscorableError(f"its mask calls {bad} pixels valid whose depth is NaN, infinite or not above 0")
    scored = np.zeros((H, W), bool)
    scored[... if wanted.region is None else wanted.region(H, W)] = True
    mask = mask & scored
    if not mask.any():
        raise UnscorableError("its ground truth has no valid pixel")
    return Truth(values, mask, int((~finite).sum()))


def write_picture(data: bytes, path: Path, *, crop: Crop | None = None, colours: Colours | None = None) -> Path:
    """Write a picture as the model is to see it, and return where: `path`, with `.png` if it had to be changed.

    What need not be cut, turned or coloured is written as it is, byte for byte, as is what cannot be decoded, or cut:
    labelling, or scoring, says what is wrong with it. The reference evaluation reads pixels as they lie, whatever a
    picture's EXIF orientation says.

    Raises:
        RunStoppedError: If memory does not suffice: what is wrong is not the picture, and nothing is written.
    """
    try:
        prepared = _prepared(data, crop, colours)
    except MemoryError as error:
        raise RunStoppedError(
            f"{path.name} cannot be prepared, since no memory is left: free some, and run again; what is prepared stays"
        ) from error
    if prepared is not None:
        path, data = path.with_suffix(".png"), prepared
    write_atomically(path, data)
    return path


def some(names: list[str]) -> str:
    """The first names of a list, and how many more there are: for messages."""
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _prepared(data: bytes, crop: Crop | None, colours: Colours | None) -> bytes | None:
    """A picture as the PNG that the model is to see; None if that is the picture as it is, or it is damaged.

    Raises:
        MemoryError: If memory does not suffice.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if crop is None and colours is None and image.getexif().get(0x0112, 1) == 1:
                return None
            pixels: npt.NDArray[Any] = np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
        check_memory(error)
        return None
    if crop is not None:
        try:
            pixels = pixels[crop(*pixels.shape[:2])]
        except ValueError:  # too small for that
            return None
    buffer = io.BytesIO()
    Image.fromarray(pixels if colours is None else colours(pixels)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _samples(wanted: EvaluationSet, archive: Archive) -> list[Sample]:
    samples = []
    for name in archive.names:
        match = re.fullmatch(wanted.truth, name)
        if match:
            picture = match.expand(wanted.picture)
            mask = None if wanted.mask is None else match.expand(wanted.mask)
            samples.append(Sample(PurePosixPath(picture).with_suffix("").as_posix(), picture, name, mask))
    return samples


def _choose(wanted: EvaluationSet, archive: Archive, samples: list[Sample], split: Path | None) -> tuple[Sample, ...]:
    if split is not None:
        known = {key: sample for sample in samples for key in (sample.name, sample.picture)}
        pictures = _read_split(split)
        _refuse_missing(wanted, archive, [picture for picture in pictures if picture not in known])
        samples = list(dict.fromkeys(known[picture] for picture in pictures))
    files = [file for sample in samples for file in (sample.picture, sample.mask) if file is not None]
    _refuse_missing(wanted, archive, [file for file in files if file not in archive.names])
    if split is None and len(samples) != wanted.count:
        raise EvaluationError(
            f"{archive.path} has {len(samples)} pictures of {wanted.name} with ground truth; expected {wanted.count}: "
            f"get {wanted.archive} anew from {wanted.home}; or give --split with a list of those to use"
        )
    return tuple(sorted(samples, key=lambda sample: sample.name))


def _read_split(path: Path) -> list[str]:
    try:
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"the split {path} cannot be read ({error}); expected a text file of paths") from error
    pictures = list(dict.fromkeys(line[0] for line in lines if line and line[1:2] != ["None"]))
    if not pictures:
        raise EvaluationError(f"the split {path} names no picture; expected a picture's path at the start of each line")
    return pictures


def _refuse_missing(wanted: EvaluationSet, archive: Archive, missing: list[str]) -> None:
    if missing:
        raise EvaluationError(
            f"{archive.path} lacks {some(sorted(missing))}, or their ground truth: get "
            f"{wanted.archive} anew from {wanted.home}; or give --split with a list of what is there"
        )
