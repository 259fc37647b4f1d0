"""A pool of actors on Ray."""

from __future__ import annotations

import platform
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Literal

import ray
from ray import exceptions
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from depthmill.pipeline.types import WorkerState
from depthmill.workers.cluster import see_that_it_runs
from depthmill.workers.pool import Event, Kind

Machines = Sequence[Mapping[str, float]]  # what each has of CPU, GPU and memory, which Ray gives in bytes

_ASK_CAPACITY_EVERY_S = 2.0
# What stands for an exception that cannot be unpickled here; Ray 2.40 has none.
_UNPICKLED: tuple[type[Exception], ...] = tuple(filter(None, [getattr(exceptions, "UnserializableException", None)]))


class RayPool:
    """Workers on a Ray cluster that is connected.

    Ray must not restart an actor by itself: the driver counts the attempts at a segment, and replaces dead workers. An
    actor that there is no room for yet is what makes an autoscaling cluster grow; one starts wherever room appears.
    """

    def __init__(self, make: Mapping[Kind, Callable[[], Any]], fit: Callable[[Machines], int]) -> None:
        """Nothing is started yet.

        Args:
            make: Asks the cluster for an actor of each kind.
            fit: How many labelers there is room for on the cluster's machines.
        """
        self._make, self._fit = make, fit
        self._actors: dict[int, Any] = {}
        self._calls: dict[int, Any] = {}  # a call's reference is held until it has ended
        self._ended: queue.SimpleQueue[tuple[int, Future[Any]]] = queue.SimpleQueue()
        self._states: dict[int, WorkerState] = {}
        self._asked: dict[int, Any] = {}
        self._nodes: dict[int, tuple[str, str]] = {}  # id and name of the machine of each that has said so
        self._started = 0
        self._capacity, self._capacity_s = 0, float("-inf")

    def capacity(self) -> int:
        """Labelers that the cluster has room for."""
        if self.now() - self._capacity_s > _ASK_CAPACITY_EVERY_S:
            see_that_it_runs()  # without a GCS, no answer comes
            self._capacity_s = self.now()
            self._capacity = self._fit([node["Resources"] for node in _alive()])
        return self._capacity

    def start(self, kind: Kind) -> int:
        """Ask the cluster for an actor; returns at once, before there is one."""
        worker = self._started
        self._started += 1
        self._actors[worker] = self._make[kind]()
        self.call(worker, "load")
        self._ask(worker, "node", self._nodes)
        return worker

    def call(self, worker: int, method: str, *arguments: Any) -> None:
        """Call an actor's method."""
        self._calls[worker] = getattr(self._actors[worker], method).remote(*arguments)
        self._calls[worker].future().add_done_callback(lambda future: self._ended.put((worker, future)))

    def wait(self, timeout_s: float) -> list[Event]:
        """What has ended; callbacks fill a queue, so this costs the same however many workers there are.

        Raises:
            RunStoppedError: If the cluster was started for the run, and has ended.
        """
        ended = []
        try:
            ended.append(self._ended.get(timeout=timeout_s))
            while True:
                ended.append(self._ended.get_nowait())
        except queue.Empty:
            pass
        see_that_it_runs()
        return [self._event(worker, future) for worker, future in ended if worker in self._actors]

    def state(self, worker: int) -> WorkerState:
        """The last answer; it is asked again, and nobody waits for that."""
        if worker in self._actors:
            self._ask(worker, "state", self._states)
        return self._states.get(worker, WorkerState("starting"))

    def name(self, worker: int) -> str:
        """Its number and, if there are several, its machine's name; also of one that is gone."""
        _, host = self._nodes.get(worker, ("", ""))
        return f"worker {worker} on {host}" if host and len(set(self._nodes.values())) > 1 else f"worker {worker}"

    def stop(self, worker: int) -> None:
        """Kill an actor."""
        actor = self._actors.pop(worker, None)
        for known in (self._calls, self._states, self._asked):
            known.pop(worker, None)
        if actor is not None:
            ray.kill(actor)

    def now(self) -> float:
        """A clock that only goes forward."""
        return time.perf_counter()

    def close(self) -> None:
        """Kill all actors."""
        for worker in list(self._actors):
            self.stop(worker)

    def _event(self, worker: int, future: Future[Any]) -> Event:
        self._calls.pop(worker, None)
        error = future.exception()
        if isinstance(error, _UNPICKLED):
            error = last_line(error)
        # An actor that was killed for its memory answers each call with an error that is no RayActorError.
        if not isinstance(error, RayError) or isinstance(error, RayTaskError):
            return Event(worker, error=error) if error else Event(worker, future.result())
        # A machine that is killed is out of reach long before the cluster notices that it is gone.
        lost = isinstance(error, ActorUnavailableError) or (
            worker in self._nodes and self._nodes[worker][0] not in {node["NodeID"] for node in _alive()}
        )
        self.stop(worker)  # one that is out of reach may be alive
        if getattr(error, "actor_init_failed", False):  # its machine could not import it, or what it was given
            error = last_line(error)
        return Event(worker, error=error, died=True, lost=lost)

    def _ask(self, worker: int, method: str, answers: dict[int, Any]) -> None:
        """Ask something whose answer is put into `answers` when it comes; nothing while one is awaited."""
        if worker in self._asked:
            return

        def answered(future: Future[Any]) -> None:
            self._asked.pop(worker, None)
            if future.exception() is None and worker in self._actors:
                answers[worker] = future.result()

        self._asked[worker] = getattr(self._actors[worker], method).remote()
        self._asked[worker].future().add_done_callback(answered)


def last_line(error: BaseException) -> RuntimeError:
    """What was raised, of an error in which Ray tells that in many lines."""
    return RuntimeError(str(error).strip().splitlines()[-1])


def total(resource: Literal["CPU", "GPU"]) -> Callable[[Machines], int]:
    """One labeler for each of the machines' cores, or GPUs."""
    return lambda machines: int(sum(machine.get(resource, 0) for machine in machines))


def remote(worker: type, **options: Any) -> Any:
    """An actor class; a second thread, where it has one, answers `state` while the first works."""
    return ray.remote(worker).options(max_restarts=0, max_task_retries=0, **options)


class OnRay:
    """What an actor has beside what it does."""

    def node(self) -> tuple[str, str]:
        """Id and name of the machine that it is on."""
        return ray.get_runtime_context().get_node_id(), platform.node()


def _alive() -> list[dict[str, Any]]:
    """The machines that are in the cluster now."""
    return [node for node in ray.nodes() if node["Alive"]]
