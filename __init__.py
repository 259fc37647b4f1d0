"""depthmill: depth and surface-normal labels from videos and image corpora, in batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from depthmill.pipeline.model.labeler import Labeler
    from depthmill.pipeline.store import open_datasets as open

__version__ = "0.1.0"
__all__ = ["Labeler", "__version__", "open"]

# torch and zarr load on first use: `import depthmill` and `depthmill --help` stay quick.
_LAZY = {
    "Labeler": ("depthmill.pipeline.model.labeler", "Labeler"),
    "open": ("depthmill.pipeline.store", "open_datasets"),
}


if not TYPE_CHECKING:  # or any misspelled name would pass

    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        module, attribute = _LAZY[name]
        return getattr(import_module(module), attribute)
