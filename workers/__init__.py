"""Running segments on Ray: the only folder that imports it."""

import os

# Read when torch is imported, by commands and by each worker. Threads that turn round while they wait for others take
# the core of whoever they wait for, where there are more threads than cores: `benchmarks/waiting.md`.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Read when Ray is imported. Under `uv run` Ray would start workers by that command, in a copy of the working directory,
# which uv may find nothing to run in, or which is full of videos.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
