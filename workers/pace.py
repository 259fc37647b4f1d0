"""How long something may take: by the configuration, and by what the same run took for the same so far."""

from __future__ import annotations

# A segment of n frames may take (n + _START_FRAMES) times the limit of a frame: opening a source takes a while too. In
# a long one, no step may take _STEP_FRAMES times that: opening it, labelling a batch, writing the last shard.
_START_FRAMES = 16
_STEP_FRAMES = 32
_PACES = 20.0  # times the measured pace is too long


class Pace:
    """The measured pace of a run, and limits after it."""

    def __init__(self, frame_limit_s: float, least_limit_s: float) -> None:
        """Nothing is measured yet.

        Args:
            frame_limit_s: Most seconds that a frame may take.
            least_limit_s: What a frame is granted at least, however quick the others were, if `frame_limit_s` is not
                less.
        """
        self._frame_limit_s, self._least_limit_s = frame_limit_s, least_limit_s
        self._seconds = self._frames = 0.0

    def add(self, frames: int, seconds: float) -> None:
        """Something was done."""
        self._frames += frames
        self._seconds += seconds

    @property
    def frame_s(self) -> float:
        """Seconds a frame so far; 0 if nothing was done."""
        return self._seconds / self._frames if self._frames else 0.0

    def limit(self, frames: int) -> float:
        """Seconds that so many frames may take."""
        return (frames + _START_FRAMES) * self._frame_limit()

    def step_limit(self) -> float:
        """Seconds that a worker may stand still."""
        return _STEP_FRAMES * self._frame_limit()

    def _frame_limit(self) -> float:
        if not self._frames:
            return self._frame_limit_s
        return min(self._frame_limit_s, max(_PACES * self.frame_s, self._least_limit_s))
