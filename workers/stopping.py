"""How a run is stopped from outside."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_SAME_SIGNAL_S = 1.0
_entered: list[threading.Event] = []  # of the one that handles signals now, if there is one


@contextmanager
def stoppable() -> Iterator[threading.Event]:
    """Let SIGINT (Ctrl-C), SIGTERM and SIGHUP (a terminal that closes) end the run alike.

    Those that are ignored stay so, as SIGHUP is under nohup, and SIGINT behind a script's `&`. A no-op outside the main
    thread, where no signal arrives; inside another, that one's event, and at the end KeyboardInterrupt if it is set.

    The first raises KeyboardInterrupt, and sets the event for the driver: one raised inside a callback of Ray's is lost
    there. Others are ignored for a second, since some come in pairs, while workers are being ended; then one ends the
    process at once, which may wait for a disk that never answers. No instant is a bad one for that.
    """
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    if _entered:
        yield _entered[0]
        if _entered[0].is_set():  # and was lost, as while Ray is ended: what would follow knows nothing of it
            raise KeyboardInterrupt
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        first_s = time.monotonic()

        def again(signum: int, frame: FrameType | None) -> None:
            if time.monotonic() - first_s > _SAME_SIGNAL_S:
                with suppress(OSError):
                    cursor = b"\x1b[?25h" if os.isatty(2) else b""  # which a live display hides
                    os.write(2, cursor + b"depthmill: stopped at once; what is committed stays\n")
                os._exit(130)

        for number in before:
            signal.signal(number, again)
        stopped.set()
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    try:
        _entered.append(stopped)
        for number in before:
            signal.signal(number, stop)
        yield stopped
    finally:
        _entered.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with(status: int) -> None:
    """Have a signal that comes when all is done, while threads and libraries end, end the process with this status.

    Python would make a traceback of Ctrl-C.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda signum, frame: os._exit(status))
