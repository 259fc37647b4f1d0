"""The metrics as Prometheus would scrape them, from a real Ray node."""

import socket
import subprocess
import sys

import pytest

SCRIPT = """
import sys, time, urllib.request
import ray
from depthmill.workers.metrics import Metrics
from depthmill.workers.standing import Counts, Standing
from collections import Counter

port = int(sys.argv[1])
ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, _metrics_export_port=port)
metrics = Metrics()
standing = Standing(counts=Counts(100, 20, 50, 3), slots=64, filled=60, label_s=8.0, ready_s=10.0)
standing.reasons = Counter({"broken": 2, "odd": 1})
metrics.update(standing, 12.5)
standing.counts = Counts(100, 20, 60, 3)
metrics.update(standing, 12.5)
for _ in range(60):
    time.sleep(1)
    try:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    except OSError:
        continue
    if "ray_depthmill_frames_total" in text:
        print("\\n".join(line for line in text.splitlines() if line.startswith("ray_depthmill")))
        break
"""


@pytest.mark.slow  # Ray's exporter takes its time
def test_prometheus_reads_them():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(port)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    values = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in done.stdout.splitlines()}
    assert values["ray_depthmill_frames_total"] == 60
    assert values["ray_depthmill_frames_per_second"] == 12.5
    assert values["ray_depthmill_batch_fill"] == 60 / 64
    assert values["ray_depthmill_gpu_busy_share"] == 0.8
    failed = {line.split('reason="')[1].split('"')[0]: line for line in done.stdout.splitlines() if "reason=" in line}
    assert failed["broken"].endswith(" 2.0")
    assert failed["odd"].endswith(" 1.0")
