# `make demo` and `make test` set everything up by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: setup demo paper test test-all check format clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/depthmill label demo/pedestrians.mp4 demo/labels.zarr --config configs/demo.yaml --overwrite
	$(BIN)/depthmill preview demo/labels.zarr --out demo

paper: setup
	$(BIN)/python benchmarks/paper/paper.py

test: setup
	$(BIN)/pytest $(PARALLEL)

test-all: setup
	$(BIN)/pytest $(PARALLEL) -m ''

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info demo/labels.zarr demo/pedestrians-*
