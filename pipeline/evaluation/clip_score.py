"""Predictions of a clip against its truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from depthmill.pipeline.errors import EvaluationError, UnscorableError
from depthmill.pipeline.evaluation.clips import ClipFrame, ClipSet, TrueClip, read_true_depth
from depthmill.pipeline.evaluation.decode import Floats
from depthmill.pipeline.evaluation.metrics import Moments, depth_metrics, unscorable
from depthmill.pipeline.evaluation.samples import Sample
from depthmill.pipeline.evaluation.score import Scores, Skip
from depthmill.pipeline.evaluation.temporal import alignment_error, steadiness

CLIP_METRICS = ("abs_rel", "delta1", "tae", "scale_spread", "scale_flicker", "shift_spread", "shift_flicker")
_NEAREST_M = 1e-3


@dataclass(frozen=True)
class ClipRow:
    """One clip that was scored.

    Attributes:
        name: Of the clip.
        metrics: Its figures; NaN for those it has no truth for.
        frames: How many were scored.
        pixels: How many.
        scale: Of the clip's alignment.
        shift: Likewise, metres.
        empty: Frames without valid truth: left out.
        pairs: Pairs of consecutive frames that TAE is the mean of.
        unpaired: Pairs left out of it, because a pose is missing or they show nothing in common.
    """

    name: str
    metrics: dict[str, float]
    frames: int
    pixels: int
    scale: float
    shift: float
    empty: int
    pairs: int
    unpaired: int


def score_clips(
    wanted: ClipSet,
    clips: Sequence[TrueClip],
    read: Callable[[Sample], Floats],
    *,
    advance: Callable[[], object] = lambda: None,
) -> Scores[ClipRow]:
    """Score a set; a frame's depth and truth are in memory at a time, and its predecessor's.

    Args:
        wanted: The set.
        clips: Of it.
        read: Gives a frame's (h, w) depth; raises UnscorableError if there is none.
        advance: Called after each clip.

    Raises:
        EvaluationError: If not one clip can be scored.
    """
    rows: list[ClipRow] = []
    skipped: list[Skip] = []
    for clip in clips:
        try:
            rows.append(_score_clip(wanted, clip, read))
        except UnscorableError as error:
            skipped.append(Skip(clip.name, str(error)))
        advance()
    if not rows:
        raise EvaluationError(
            f"none of the {len(skipped)} clips of {wanted.name} can be scored; {skipped[0].name}: {skipped[0].reason}"
        )
    metrics = {}
    for name in CLIP_METRICS:
        values = [row.metrics[name] for row in rows if not np.isnan(row.metrics[name])]
        metrics[name] = float(np.mean(values)) if values else np.nan
    return Scores(metrics, tuple(rows), tuple(skipped))


def _score_clip(wanted: ClipSet, clip: TrueClip, read: Callable[[Sample], Floats]) -> ClipRow:
    nearest_m = np.inf
    found: list[Moments | None] = []
    for frame in clip.frames:
        depth, truth = _compared(wanted, frame, read)
        found.append(_moments(frame, depth, truth))
        nearest_m = min(nearest_m, float(np.nanmin(truth, initial=np.inf)))
    known = [one for one in found if one is not None]
    if not known:
        raise UnscorableError(f"none of its {len(clip.frames)} frames has a pixel of valid depth")
    whole = Moments.pooled(known)
    scale, shift = whole.affine
    figures: list[dict[str, float]] = []
    errors: list[float] = []
    before: tuple[ClipFrame, Floats] | None = None
    for frame, moments in zip(clip.frames, found, strict=True):
        depth, truth = _compared(wanted, frame, read)
        valid = np.isfinite(truth)
        if moments is not None:
            figures.append(depth_metrics(depth[valid], truth[valid], scale, shift, (_NEAREST_M, wanted.cap_m)))
        # TAE divides by this: what alignment puts behind the camera would be all of it.
        aligned = np.clip(scale * depth + shift, nearest_m, wanted.cap_m)
        if before is not None:
            errors += _both_ways(*before, frame, aligned)
        before = frame, aligned
    metrics = {name: float(np.mean([one[name] for one in figures])) for name in ("abs_rel", "delta1")}
    metrics["tae"] = 100 * float(np.mean(errors)) if errors else np.nan
    metrics |= steadiness(found)
    return ClipRow(
        name=clip.name,
        metrics=metrics,
        frames=len(known),
        pixels=whole.count,
        scale=scale,
        shift=shift,
        empty=len(clip.frames) - len(known),
        pairs=len(errors) // 2,
        unpaired=len(clip.frames) - 1 - len(errors) // 2,
    )


def _moments(frame: ClipFrame, depth: Floats, truth: Floats) -> Moments | None:
    valid = np.isfinite(truth)
    p = depth[valid]
    if bad := int(unscorable(p).sum()):
        raise UnscorableError(
            f"prediction of {frame.sample.name} is NaN, infinite or above 3.4e38 at {bad} of {len(p)} valid pixels"
        )
    return Moments.of(p, truth[valid]) if len(p) else None


def _compared(wanted: ClipSet, frame: ClipFrame, read: Callable[[Sample], Floats]) -> tuple[Floats, Floats]:
    """What is scored of a prediction, resized bilinearly to what its picture shows, and of the truth: (H, W) each."""
    truth = read_true_depth(wanted, frame)
    try:
        depth: Floats = read(frame.sample).astype(np.float64)  # what is aligned may overflow a file's float16
    except UnscorableError as error:
        raise UnscorableError(f"{frame.sample.name}: {error}") from error
    if depth.ndim != 2 or not depth.size:
        raise UnscorableError(f"{frame.sample.name}: its prediction is of shape {depth.shape}; expected (H, W)")
    if depth.shape != truth.shape:
        size = (truth.shape[1], truth.shape[0])
        depth = np.asarray(cv2.resize(depth, size, interpolation=cv2.INTER_LINEAR), np.float64)
    scored = (wanted.rows, wanted.columns) if frame.uncut else (slice(None), slice(None))
    return depth[scored], truth[scored]


def _both_ways(one: ClipFrame, depth: Floats, other: ClipFrame, other_depth: Floats) -> list[float]:
    """Both terms of a pair, or none where it has no poses or nothing in common."""
    if one.pose is None or other.pose is None or one.intrinsics is None or other.intrinsics is None:
        return []
    errors = [
        alignment_error(depth, other_depth, one.intrinsics, other.intrinsics, one.pose, other.pose),
        alignment_error(other_depth, depth, other.intrinsics, one.intrinsics, other.pose, one.pose),
    ]
    return [] if np.isnan(errors).any() else errors
