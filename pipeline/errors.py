"""Everything that depthmill raises on purpose, under one root.

A message says what value was met, what was expected, and what to do about it.
"""

import re

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabs and ends of lines


def printable(message: object) -> str:
    """A message as text that no terminal obeys: the name of a file in it can be anything."""
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", str(message))


class DepthmillError(Exception):
    """Root of the tree: catch this to catch whatever depthmill raises on purpose."""


class ConfigError(DepthmillError):
    """An option or a configuration file that cannot be used as it stands."""


class SourceError(DepthmillError):
    """An input that cannot be opened or probed at all; other inputs go on."""


class MissingError(SourceError):
    """A file that is not there: asking again will not change that."""


class SourceChangedError(SourceError):
    """An input that is another one than it was when it was probed."""


class CheckpointError(DepthmillError):
    """A checkpoint that is missing, incomplete, unsafe, or of another architecture."""


class StoreError(DepthmillError):
    """A store that cannot be created, written or read."""


class StoreMismatchError(StoreError):
    """A store that was made by another configuration, checkpoint or version of an input."""


class StoreDamagedError(StoreError):
    """A source in a store that is gone, or a file of it that cannot be decoded; other sources can be read."""


class StoreClosedError(StoreError):
    """A store that takes nothing more until somebody sees to it: waiting is in vain. What is committed in it stays."""


class StoreFullError(StoreClosedError):
    """No space is left for a store, or for a file of its size."""


class StoreForbiddenError(StoreClosedError):
    """A store in which this user may not write, or nobody."""


class StoreReplacedError(StoreClosedError):
    """A store, or what is smoothed of a source, that another run has made anew since this one opened it."""


class VoidError(DepthmillError):
    """A model whose answers for all pictures of a segment are no numbers: hardly the fault of each."""


class TrainingError(DepthmillError):
    """A training run that cannot start or go on."""


class SampleError(TrainingError):
    """One picture of a training set that cannot be used; the others can."""


class EvaluationError(DepthmillError):
    """An evaluation that cannot start, or has nothing to say."""


class UnscorableError(EvaluationError):
    """One picture of an evaluation that cannot be scored; the others can."""


class RunStoppedError(DepthmillError):
    """A run was stopped from outside, or can make no progress; what was committed stays."""


def short_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, or threads, do not suffice: many libraries have errors of their own for it."""
    words = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or isinstance(error.__cause__, MemoryError)
        or "out of memory" in words
        or "can't allocate memory" in words
        or "can't start new thread" in words
    )


def check_memory(error: Exception) -> None:
    """See that it is not for lack of memory that something cannot be decoded: then it may be as whole as any.

    Raises:
        MemoryError: If it is.
    """
    if short_of_memory(error):
        raise MemoryError(f"no memory is left ({str(error) or type(error).__name__})") from error
