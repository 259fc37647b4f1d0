"""`python -m depthmill.pipeline.training.from_scratch CONFIG`: train, or go on where the same call was stopped."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from depthmill.pipeline.config import load_config
from depthmill.pipeline.training.from_scratch.config import TrainConfig
from depthmill.pipeline.training.from_scratch.train import train


def main() -> None:
    """Parse, load the configuration, call."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, help="folder of the run; by default runs/ and the name of CONFIG")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("depthmill").setLevel(logging.INFO)
    print(train(load_config(TrainConfig, arguments.config, {}), arguments.out or Path("runs") / arguments.config.stem))


if __name__ == "__main__":
    main()
