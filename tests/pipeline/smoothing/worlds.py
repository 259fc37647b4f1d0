"""Clips of a textured room and their exact depth, in milliseconds a frame: what the tests of smoothing look at.

Disturbed, a clip's depth is what a model that flickers would say of it: that of rendered clips, too, and in benchmarks.
"""

import cv2
import numpy as np

H, W = 96, 128
_SIDES_M = np.array([4.0, 3.0, 14.0])  # half the width and height of the room; its far wall


def room(frames: int, camera: str, seed: int = 0, height: int = H, width: int = W) -> tuple[np.ndarray, np.ndarray]:
    """(N, H, W, 3) uint8 and (N, H, W) metres along the optical axis.

    The camera stands still, turns by 0.2° a frame, or goes forward by 6 cm a frame.
    """
    texture = np.random.default_rng(seed).normal(size=(3, 512, 512)).astype(np.float32)
    texture = sum(cv2.GaussianBlur(t, (0, 0), s) * s for t, s in zip(texture, (2, 5, 12), strict=True))
    texture = cv2.normalize(texture, None, 20, 235, cv2.NORM_MINMAX)
    v, u = np.mgrid[:height, :width]
    rays = np.stack([(u + 0.5 - width / 2) / width, (v + 0.5 - height / 2) / width, np.ones_like(u)], -1)
    images, depths = [], []
    for frame in range(frames):
        angle = np.radians(0.2 * (frame - frames / 2)) if camera == "pan" else 0.0
        turn = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
        at = np.array([0.5, 0.4, 0.06 * frame if camera == "forward" else 0.0])
        world = rays @ turn.T
        with np.errstate(divide="ignore"):
            along = np.where(world != 0, (np.sign(world) * _SIDES_M - at) / world, np.inf)
        depth = np.where(along > 0, along, np.inf).min(-1)
        hit, side = at + depth[..., None] * world, along.argmin(-1)
        a, b = np.where(side == 0, hit[..., 2], hit[..., 0]), np.where(side == 1, hit[..., 2], hit[..., 1])
        where = [np.float32(i * 24 + 100 * side) for i in (a, b)]
        grey = cv2.remap(texture, *where, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
        images.append(np.repeat(grey[..., None], 3, -1).astype(np.uint8))
        depths.append(depth)
    return np.stack(images), np.stack(depths)


def normalised(metres: np.ndarray, valid: np.ndarray | None = None, beyond: float = 0) -> np.ndarray:
    """Depth as a perfect model gives it: into [0.25, 0.75], by one map for the whole clip, NaN where it is not valid.

    `beyond` is what percentage of it lies nearer than that, and what farther; clipped to [0, 1].
    """
    valid = np.ones(metres.shape, bool) if valid is None else valid
    near, far = np.percentile(metres[valid], [beyond, 100 - beyond])
    mapped = 0.25 + 0.5 * (metres - near) / (far - near)
    return np.where(valid, np.clip(mapped, 0, 1), np.nan).astype(np.float32)


def disturbed(depth: np.ndarray, seed: int, noise: float = 0.01) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`normalised` depth as a model that flickers gives it, stored; and the scale and shift of each frame.

    Log-scale σ 0.08 about the middle, shift σ 5 % and noise of the range, which is 0.5.
    """
    rng = np.random.default_rng(seed)
    scale, offset = np.exp(rng.normal(0, 0.08, len(depth))), rng.normal(0, 0.05 * 0.5, len(depth))
    shift = 0.5 * (1 - scale) + offset
    got = depth * scale[:, None, None] + shift[:, None, None] + rng.normal(0, noise * 0.5, depth.shape)
    return stored(got), scale, shift


def stored(depth: np.ndarray) -> np.ndarray:
    """Depth as the store gives it back: clipped, in steps of 1/5120."""
    return (np.clip(np.round(depth * 5120), 0, 5120) / 5120).astype(np.float32)
