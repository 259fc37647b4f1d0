"""How long something may take, by the configuration and by what the same run took so far; how long to wait for it."""

from __future__ import annotations

from dataclasses import dataclass

# A segment of n frames may take (n + _START_FRAMES) times the limit of a frame. In a long one, no step may take
# _STEP_FRAMES times that: labelling a batch, writing the last shard.
_START_FRAMES = 16
_STEP_FRAMES = 32
OPEN_FRAMES = 30.0  # frames' limits that opening a source may take, of which no pace tells anything
_PACES = 20.0  # times the measured pace is too long


# What is away for a moment (inputs, a store, a device) is waited for: so often, and so for a minute and a half.
HOPELESS_AFTER = 8
PATIENCE_S = 95.0


def rest_s(times: int) -> float:
    """How long to wait after so many failures before: 1, 2, 4 … 32 s, so that eight take `PATIENCE_S`."""
    return 2.0 ** min(times, 5)


class Rests:
    """Rests, longer each time, while something does not answer.

    Attributes:
        times: How many there were since it last did.
        until_s: When the last ends.
    """

    def __init__(self) -> None:
        """All answers."""
        self.times, self.until_s = 0, float("-inf")

    def over(self, now_s: float) -> bool:
        """Whether it is time to go on."""
        return now_s >= self.until_s

    def begin(self, now_s: float) -> bool:
        """Rest once more; whether that makes sense, after so many."""
        if self.times >= HOPELESS_AFTER:
            return False
        self.until_s = now_s + rest_s(self.times)
        self.times += 1
        return True

    def answered(self) -> None:
        """What was waited for is there again: the next rest is a short one."""
        self.times = 0


@dataclass(frozen=True)
class Limits:
    """How long something may take.

    Attributes:
        all_s: From its beginning to its end.
        still_s: How long nothing of it may be seen to be done; None if that cannot be seen.
        open_s: The same before its first step, if that is more: each worker opens a source anew.
    """

    all_s: float = float("inf")
    still_s: float | None = None
    open_s: float = 0.0


class Pace:
    """The measured pace of a run, and limits after it."""

    def __init__(self, frame_limit_s: float, least_limit_s: float, open_limit_s: float) -> None:
        """Nothing is measured yet.

        Args:
            frame_limit_s: Most seconds that a frame may take.
            least_limit_s: What a frame is granted at least, however quick the others were, if `frame_limit_s` is not
                less.
            open_limit_s: Most seconds that opening a source may take.
        """
        self._frame_limit_s, self._least_limit_s, self._open_limit_s = frame_limit_s, least_limit_s, open_limit_s
        self._seconds = self._frames = 0.0

    def add(self, frames: int, seconds: float) -> None:
        """So many frames were labelled; what took its time and labelled none tells nothing."""
        if frames:
            self._frames += frames
            self._seconds += seconds

    @property
    def frame_s(self) -> float:
        """Seconds a frame so far; 0 if nothing was done."""
        return self._seconds / self._frames if self._frames else 0.0

    def to_do(self, frames: int, probe_s: float | None = None, leave: float = 1.0) -> Limits:
        """For so many frames, and for opening their source.

        Args:
            frames: How many.
            probe_s: What opening it took before; None if nobody knows.
            leave: Times that it may take what the pace lets expect, up to what the configuration grants.
        """
        frame_s, open_s = self._frame_limit_s, self._open_limit_s
        if self._frames:
            frame_s = min(frame_s, leave * max(_PACES * self.frame_s, self._least_limit_s))
        if probe_s is not None:
            open_s = min(open_s, leave * _PACES * probe_s)
        return Limits((frames + _START_FRAMES) * frame_s + open_s, _STEP_FRAMES * frame_s, open_s)
