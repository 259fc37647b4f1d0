import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from depthmill.workers.stopping import stoppable


def test_a_signal_that_comes_before_both_are_handled_stops_as_any(monkeypatch):
    before, set_handler, sent = signal.getsignal(signal.SIGINT), signal.signal, []

    def send(number, handler):
        set_handler(number, handler)
        if not sent:
            sent.append(number)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(signal, "signal", send)
    with pytest.raises(KeyboardInterrupt), stoppable():
        pass
    assert signal.getsignal(signal.SIGINT) is before


HANGS = """
import time
from depthmill.workers.stopping import stoppable
with stoppable():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("stopping", flush=True)
        time.sleep(60)  # as for a disk that does not answer
"""


def test_a_second_signal_ends_at_once_what_the_first_could_not():
    process = subprocess.Popen([sys.executable, "-c", HANGS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "stopping\n"
    time.sleep(1.2)
    assert process.poll() is None, "signals that come together are one"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "what is committed stays" in said


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_a_run_unless_it_is_ignored(number):
    """A run under nohup outlives its terminal, one behind a script's `&` the Ctrl-C that is meant for another."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with stoppable():
            os.kill(os.getpid(), number)
        assert signal.getsignal(number) == signal.SIG_IGN
        signal.signal(number, signal.SIG_DFL)
        with pytest.raises(KeyboardInterrupt), stoppable() as stopped:
            os.kill(os.getpid(), number)
        assert stopped.is_set()
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_a_stop_that_was_lost_within_ends_what_would_follow():
    """As while `evaluate`'s labelling ends its Ray: it would score all, and end as if nobody had stopped it."""

    def label():
        with stoppable(), suppress(KeyboardInterrupt):  # as a callback of Ray's does
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), stoppable():
        label()
