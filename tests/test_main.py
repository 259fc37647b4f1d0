"""How a command ends: by a signal, without its streams."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from unittest.mock import Mock

import pytest

import depthmill
from depthmill.cli import _label_config, main
from depthmill.pipeline.errors import RunStoppedError, StoreFullError


def test_a_run_that_is_stopped_waits_for_no_thread():
    """A signal may have cut off the making of one, of which Python's own exit then knows nothing."""
    code = """
        import threading
        from depthmill import cli
        from depthmill.pipeline.errors import RunStoppedError
        def stopped():
            threading.Thread(target=threading.Event().wait).start()
            raise RunStoppedError("10 of 20 frames are committed")
        cli.app = stopped
        cli.main()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (130, "depthmill: 10 of 20 frames are committed\n")


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        (errno.EPIPE, 0, ""),
        (errno.ENOSPC, 2, f"depthmill: standard output cannot be written ({os.strerror(errno.ENOSPC)}); "),
    ],
)
def test_a_reader_that_goes_away_changes_no_status_and_a_full_disk_is_said(
    cli, tmp_path, monkeypatch, code, status, message
):
    def fail(text):
        raise OSError(code, os.strerror(code))

    with (tmp_path / "stdout").open("w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(stdout, "write", fail, raising=False)
        done = cli("--version")
    assert (done.returncode, done.stderr[: len(message)], "Traceback" in done.stderr) == (status, message, False)


@pytest.mark.parametrize("code", [errno.EPIPE, errno.ENOSPC])
def test_an_error_output_that_cannot_be_written_stops_nothing(cli, tmp_path, monkeypatch, code):
    def fail(text):
        raise OSError(code, os.strerror(code))

    with (tmp_path / "stderr").open("w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        monkeypatch.setattr(stderr, "write", fail, raising=False)
        assert cli("inspect", tmp_path / "none.zarr").returncode == 2
        _label_config(None, {})
        assert os.path.samestat(os.fstat(stderr.fileno()), Path(os.devnull).stat())


@pytest.mark.skipif(not depthmill.__file__.isascii(), reason="Python itself finds no package there")
def test_a_locale_that_is_no_utf_8_is_refused(tmp_path):
    locale = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "depthmill", "inspect", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=locale)
    assert (done.returncode, "set PYTHONUTF8=1" in done.stderr) == (2, True)


@pytest.mark.parametrize("raised", [RunStoppedError, StoreFullError])
def test_how_a_stopped_run_ends_without_standard_output(raised, monkeypatch, capsys):
    def stopped():
        raise raised("a\x1b[2J.mp4")

    def ended(status):
        raise SystemExit(status)

    monkeypatch.setattr("depthmill.cli.app", stopped)
    monkeypatch.setattr("depthmill.cli.os._exit", ended)
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130
    assert capsys.readouterr().err == "depthmill: a\\x1b[2J.mp4\n"


@pytest.fixture
def stopped(cli, monkeypatch):
    """What a command says that a signal stops, and its exit status."""

    def ended(status):
        raise SystemExit(status)

    def call(number, where, *arguments):
        def interrupted(*_, **options):
            os.kill(os.getpid(), number)
            time.sleep(5)

        def unhandled(number, frame):
            pytest.fail("nobody handles the signal")

        monkeypatch.setattr("depthmill.cli.os._exit", ended)
        monkeypatch.setattr(where, interrupted)
        before = signal.signal(number, unhandled)
        try:
            done = cli(*arguments)
            assert signal.getsignal(number) is unhandled
        finally:
            signal.signal(number, before)
        return done.returncode, done.stderr

    return call


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_stops_any_command_in_a_line(stopped, tmp_path, number):
    said = stopped(number, "depthmill.pipeline.store.open_store", "inspect", tmp_path)
    assert said == (130, "depthmill: stopped; what is committed stays\n")


def test_what_a_library_makes_of_a_signal_is_no_bug(stopped, tmp_path, monkeypatch):
    monkeypatch.setattr("depthmill.workers.stopping.KeyboardInterrupt", ImportError, raising=False)
    said = stopped(signal.SIGTERM, "depthmill.pipeline.store.open_store", "inspect", tmp_path)
    assert said == (130, "depthmill: stopped; what is committed stays\n")


@pytest.mark.parametrize("error", [MemoryError("72 MiB"), RuntimeError("can't start new thread")], ids=repr)
def test_lack_of_memory_stops_any_command_in_a_line(cli, tmp_path, monkeypatch, error):
    def ended(status):
        raise SystemExit(status)

    monkeypatch.setattr("depthmill.cli.os._exit", ended)
    monkeypatch.setattr("depthmill.pipeline.store.open_store", Mock(side_effect=error))
    done = cli("verify", tmp_path)
    assert (done.returncode, done.stderr[:28]) == (130, "depthmill: no memory, or no ")


@pytest.mark.parametrize("stages", [True, False])
def test_training_that_is_stopped_says_what_stays_and_how_to_go_on(stopped, tmp_path, monkeypatch, stages):
    config, where = tmp_path / "a.yaml", "depthmill.pipeline.training.train.train"
    config.write_text("{start: demo, sets: [{kind: scenes, scenes: 100}]}")
    if stages:
        config.write_text((Path(depthmill.__file__).parent / "configs" / "train-demo.yaml").read_text())
        where = "depthmill.pipeline.training.from_scratch.train.train"
    over = ("--overwrite",)  # what is there is the run that is to be replaced, until another has begun
    for options, began, again in (((), (1, 2), ""), (over, (1, 1), ""), (over, (1, 2), ", without --overwrite,")):
        monkeypatch.setattr("depthmill.cli._began", Mock(side_effect=began))
        status, said = stopped(signal.SIGTERM, where, "train", config, "--out", tmp_path / "run", *options)
        assert status == 130
        assert said.splitlines()[-1] == (  # behind what libraries say
            f"depthmill: stopped: what is saved in {tmp_path / 'run'} stays, as do rendered scenes; run the same "
            f"command again{again} to go on from there"
        )


def test_one_process_of_many_that_train_can_be_killed_while_it_waits_for_others(cli, tmp_path, monkeypatch):
    handlers = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(
        "depthmill.cli._train", lambda *_: handlers.append(signal.getsignal(signal.SIGTERM)) or tmp_path
    )
    assert cli("train", "a.yaml").returncode == 0
    assert handlers == [signal.SIG_DFL]


def test_a_signal_before_the_command_line_is_there_stops_as_any():
    code = """
        import os, signal, sys, time
        class Finder:
            def find_spec(self, name, *more):
                if name == "typer":
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(5)
        sys.meta_path.insert(0, Finder())
        from depthmill.__main__ import main
        main()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "depthmill: stopped before it began\n")


@pytest.mark.parametrize(
    "sends",
    [
        "atexit.register(send)",
        "sys.modules['late'] = type('Late', (), {'__del__': lambda self, send=send: send()})()",
    ],
    ids=["in a callback", "as modules go"],
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_that_comes_when_all_is_done_changes_no_status(number, sends):
    code = f"""
        import atexit, functools, os, signal, sys
        from depthmill import __main__, cli
        signal.signal({number.value}, signal.default_int_handler)  # also where it is ignored
        send = functools.partial(os.kill, os.getpid(), {number.value})
        def done():
            {sends}
            raise SystemExit(cli.SOME_FAILED)
        cli.app = done
        __main__.main()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (1, "")
