"""`python -m depthmill`, and the command: what signals do is settled before anything is imported that takes time."""

import atexit
import os
import sys
from contextlib import suppress
from typing import NoReturn

from depthmill.workers.stopping import end_with, stoppable


def main() -> NoReturn:
    """Run a command: see `cli.main`."""
    statuses: list[int] = []
    atexit.register(_end, statuses)  # the first, so that it is called when all others have been
    try:
        with stoppable() as stopped:
            try:
                from depthmill.cli import main as run
            except BaseException:  # what is imported may make anything of a signal
                if not stopped.is_set():
                    raise
                with suppress(OSError):
                    os.write(2, b"depthmill: stopped before it began\n")
                os._exit(130)
            run()
    except SystemExit as end:
        if isinstance(end.code, int):
            end_with(end.code)
            statuses.append(end.code)
        raise


def _end(statuses: list[int]) -> None:
    """End the process, if it has a status, without Python's giving up libraries one by one.

    Of torch that takes a second or more, in which Python handles no signal: one changed the status.
    """
    if statuses:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):  # nobody may be there to read it, or no stream at all
                stream.flush()
        os._exit(statuses[0])


if __name__ == "__main__":
    main()
