"""What is left to smooth, looked up: outages and signals meanwhile, and how many sources are looked at at once."""

import threading
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from depthmill.pipeline.config import SmoothConfig
from depthmill.pipeline.errors import StoreError
from depthmill.pipeline.store.store import READERS
from depthmill.workers.looks import Looks
from depthmill.workers.smooth import _Run


def test_all_looks_that_met_one_outage_are_one_outage(monkeypatch):
    """Sixteen are under way, and eight failures in a row would end the run."""
    away = threading.Event()
    looked = []

    def look(self, source_id, phases):
        looked.append(source_id)
        if away.is_set():
            raise StoreError("503")
        return "", []

    monkeypatch.setattr(Looks, "_look", look)
    going = _Run(SimpleNamespace(), SmoothConfig(), [str(i) for i in range(100)])
    away.set()
    with pytest.raises(StoreError, match="503") as caught:
        going.plan(wait=True)
    going._rest(caught.value, 0.0)
    going.looks._readers.submit(lambda: None).result()
    away.clear()
    assert not going.plan(wait=True)
    assert set(looked) == {str(i) for i in range(100)}
    assert going._rests.times == 0
    going.looks.close()


def test_few_sources_are_looked_at_at_once(monkeypatch):
    may, looked = threading.Event(), []

    def look(self, source_id, phases):
        looked.append(source_id)
        assert may.wait(30)
        return "", [SimpleNamespace(phase="solve", frames=1)]

    monkeypatch.setattr(Looks, "_look", look)
    going = _Run(SimpleNamespace(), SmoothConfig(), [str(i) for i in range(100)])
    assert not going.plan()
    assert len(looked) <= READERS
    may.set()
    while len(going.queue) < 100:
        assert going.plan(wait=True)
    assert sorted(looked, key=int) == [str(i) for i in range(100)]
    going.looks.close()


def test_a_signal_while_a_look_is_waited_for_is_none_of_its_failures():
    asked = [Future(), Future()]
    asked[1].set_result(("", []))
    waiting = iter(asked)
    looks = Looks(None, None, ["a"])
    looks._readers = SimpleNamespace(submit=lambda *_: next(waiting))
    assert looks.take(0, wait=False) is None
    asked[0].set_exception(KeyboardInterrupt())  # as `result` raises it, if it comes meanwhile
    with pytest.raises(KeyboardInterrupt):
        looks.take(1, wait=True)
