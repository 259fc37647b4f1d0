"""`python -m depthmill`, and the command: what signals do is settled before anything is imported that takes time."""

import os
from contextlib import suppress
from typing import NoReturn

from depthmill.workers.stopping import end_with, stoppable


def main() -> NoReturn:
    """Run a command: see `cli.main`."""
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
        raise


if __name__ == "__main__":
    main()
