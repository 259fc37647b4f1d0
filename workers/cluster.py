"""The Ray cluster of a run: an existing one, or one that lives as long as the run."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray._private import worker

from depthmill.pipeline.config import LabelConfig, SmoothConfig
from depthmill.pipeline.errors import ConfigError, RunStoppedError
from depthmill.pipeline.machine import cores
from depthmill.workers.causes import reason

_REACHABLE_S = 10.0
_STARTS = 3  # of a cluster on this machine: Ray grants its processes 30 s, which is little where cores are starved
_NEEDED = ("gcs_server", "raylet")  # processes of a cluster without which nothing works, as Ray calls them


@contextmanager
def connect(config: LabelConfig | SmoothConfig) -> Iterator[int]:
    """Connect to the run's Ray cluster, or start one; what was started is shut down at the end.

    Yields:
        The number of GPUs in it.

    Raises:
        ConfigError: If there is no cluster at the address, or none starts on this machine.
    """
    if ray.is_initialized():
        yield _gpus()
        return
    logging.getLogger("ray").setLevel(logging.ERROR)  # set up anew by `import ray`, above
    try:
        with _sigterm_kept():
            if config.address:
                _check_reachable(config.address)
                ray.init(config.address, log_to_driver=False, logging_level=logging.ERROR)
            else:
                # Actors ask for one CPU each; on this machine the run alone decides how many share the cores.
                _start(max(cores(), config.workers or _gpus_here(config)))
    except (OSError, RuntimeError, ValueError) as error:  # ConnectionError is an OSError
        if not config.address:
            raise ConfigError(
                f"Ray did not start on this machine ({reason(error)}); expected it to: see to that, or work without it "
                "(--workers 0)"
            ) from error
        raise ConfigError(
            f"no Ray cluster at {config.address} ({reason(error)}); expected a running one: start it (`ray start "
            "--head`), correct --address (or RAY_ADDRESS), or leave it out to work on this machine; to one that wants "
            "a token (Ray 2.60's do where a local one ran before) come with RAY_AUTH_MODE=token and its token"
        ) from error
    try:
        yield _gpus()
    finally:
        with _sigterm_kept():
            ray.shutdown()


def see_that_it_runs() -> None:
    """See that the cluster does, if this process started it; that takes some microseconds, and asks Ray for nothing.

    Ray itself waits for a raylet for ever, and ends this process a minute after the GCS has ended. Of a cluster at an
    address nothing is known here: its head and its machines may come back.

    Raises:
        RunStoppedError: If it has ended: nothing brings it back.
    """
    node = getattr(worker, "_global_node", None)  # private: a Ray that has it no more is not watched
    for name, process in getattr(node, "dead_processes", list)():
        if name in _NEEDED:
            raise RunStoppedError(
                f"Ray's {name} on this machine has ended (exit status {process.returncode}: killed? out of memory?), "
                "and the run with it; what is committed stays: see to that, then run the same command again to go on "
                "from there"
            )


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Keep what SIGTERM does: Ray makes it an exit of its own when it starts, and resets it, in C, when it ends."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:  # that one
        raise KeyboardInterrupt from None
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # also if Python knows of no other


def _start(cpus: int) -> None:
    """Start a cluster on this machine."""
    for left in reversed(range(_STARTS)):
        try:
            ray.init("local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            return
        except Exception as error:
            if "timed out during startup" not in str(error):  # Ray raises no class of its own
                raise
            ray.shutdown()
            if not left:
                raise ConfigError(
                    f"Ray did not start on this machine in {_STARTS} times 30 s; expected cores that are free for it: "
                    "stop other work, or label without it (--workers 0)"
                ) from error


def _gpus_here(config: LabelConfig | SmoothConfig) -> int:
    """GPUs of this machine that a run labels on: a container may grant it fewer cores than those."""
    if isinstance(config, SmoothConfig) or config.device == "cpu":
        return 0
    import torch  # labelling has done so already, and smoothing has no use for it

    return torch.cuda.device_count()


def _check_reachable(address: str) -> None:
    """Raise OSError if nobody listens at `host:port`: Ray itself would try for minutes before it says so."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACHABLE_S).close()


def _gpus() -> int:
    return int(ray.cluster_resources().get("GPU", 0))
