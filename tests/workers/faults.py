"""Faults at the source: pictures that crash or hang the process that decodes them. The product has no hook for it."""

import textwrap

# Python runs `sitecustomize` at its start, in Ray's workers too if it is on PYTHONPATH; this one waits for the module
# that decodes pictures to be imported, and wraps its decoder.
_SITECUSTOMIZE = """
import ctypes, importlib.abc, importlib.util, sys, time

TARGET = "depthmill.pipeline.sources.pictures"

class Loader(importlib.abc.Loader):
    def __init__(self, loader):
        self.loader = loader
    def create_module(self, spec):
        return self.loader.create_module(spec)
    def exec_module(self, module):
        self.loader.exec_module(module)
        decode = module.decode_image
        def faulty(path, *arguments, **options):
            if "crash" in str(path):
                ctypes.string_at(0)
            if "hang" in str(path):
                time.sleep(10_000)
            return decode(path, *arguments, **options)
        module.decode_image = faulty

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        spec.loader = Loader(spec.loader)
        return spec

sys.meta_path.insert(0, Finder())
"""


def install(folder, monkeypatch):
    """Put the faults on PYTHONPATH, for the processes that this one starts from now on."""
    import os

    folder.mkdir()
    (folder / "sitecustomize.py").write_text(textwrap.dedent(_SITECUSTOMIZE))
    known = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{known}" if known else str(folder))
