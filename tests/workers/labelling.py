"""Labelling in this process, in silence; and what xarray reads of it."""

import io

import xarray
from rich.console import Console

from depthmill.workers.label import label


def run(inputs, store, config, **options):
    console = Console(file=io.StringIO(), highlight=False, width=200)
    return label([str(path) for path in inputs], store, config, console=console, **options)


def only_source(store):
    (group,) = [path.name for path in store.iterdir() if path.is_dir()]
    return xarray.open_zarr(store, group=group)
