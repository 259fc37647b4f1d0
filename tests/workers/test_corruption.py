"""A whole run over every kind of damage, on real Ray workers."""

import json
import time

import pytest

from depthmill.tests import corruption, runs


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_worker_is_lost_to_broken_inputs(tmp_path, checkpoints):
    root, store = tmp_path / "corpus", tmp_path / "labels.zarr"
    items = corruption.write(root)
    options = ("--workers", "2", "--max-pixels", str(corruption.MAX_PIXELS), "--segment-frames", "16")
    workers, peak_bytes = set(), 0
    with (tmp_path / "log").open("w+") as log:
        process = runs.start(corruption.inputs(root), store, checkpoints, *options, log=log)
        try:
            while process.poll() is None:
                running = [one for one in runs.family(process) if runs.is_worker(one)]
                workers |= {one.pid for one in running}
                peak_bytes = max([peak_bytes, *(runs.memory(one) for one in running)])
                time.sleep(0.2)
        finally:
            runs.kill(runs.family(process))
        log.seek(0)
        assert process.returncode == 1, log.read()
    assert len(workers) == 2, "none was lost, none replaced"
    assert peak_bytes < 2 << 30
    failures = [json.loads(line) for line in (store / "failures.jsonl").read_text().splitlines()]
    assert not [failure for failure in failures if "was tried" in failure["reason"]]
    pictures = sorted(item.name for item in items if item.name.startswith(corruption.PICTURES))
    listed = {
        str(root / pictures[failure["frame"]]) if failure["uri"] == str(root / corruption.PICTURES) else failure["uri"]
        for failure in failures
    }
    for item in items:
        if item.listed is not None:
            assert (str(root / item.name) in listed) == item.listed, item
