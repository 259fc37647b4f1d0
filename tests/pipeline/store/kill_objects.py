"""Kill a process that writes a store to object storage before every `stride`-th request that writes, then run again.

Run by test_objects.py in a process of its own, as kill_store.py is. Each store is left at `<url>/<request>`.
"""

import os
import signal
import sys

from depthmill.pipeline.store.objects import ObjectDirectory
from depthmill.tests.pipeline.store import kill_store


def killed_before(request, work):
    def work_until_killed():
        seen = 0

        def counted(method):
            def call(self, *args):
                nonlocal seen
                seen += 1
                if seen > request:
                    os.kill(os.getpid(), signal.SIGKILL)
                return method(self, *args)

            return call

        for name in ("write", "write_all", "delete", "remove"):
            setattr(ObjectDirectory, name, counted(getattr(ObjectDirectory, name)))
        work()

    return work_until_killed


def main(url, stride):
    for request in range(1, 1000, stride):
        uri = f"{url}/{request}"
        finished = kill_store.in_child(killed_before(request, lambda uri=uri: kill_store.run(uri)))
        assert kill_store.in_child(lambda uri=uri: kill_store.run(uri))
        print(request)
        if finished:
            break


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
