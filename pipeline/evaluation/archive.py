"""A data set as it was downloaded: a tar that is read where it lies, or the folder that it unpacks to."""

from __future__ import annotations

import os
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

from depthmill.pipeline.errors import EvaluationError


class Archive:
    """Files by their path in the set. Threads may read at once.

    Attributes:
        path: The tar or the folder.
        names: Every file in it, with forward slashes.
    """

    def __init__(self, path: Path):
        """Open and list it.

        Raises:
            EvaluationError: If it is neither a folder nor an uncompressed tar, or is cut short.
        """
        self.path = path
        self._lock = threading.Lock()
        self._tar: tarfile.TarFile | None = None
        self._members: dict[str, tarfile.TarInfo] = {}
        if os.path.isdir(path):  # noqa: PTH112 (a refused Path raises)
            self.names = frozenset(file.relative_to(path).as_posix() for file in _files(path))
            return
        try:
            self._tar = tarfile.open(path, "r:")  # noqa: SIM115 (closed by `close`)
            self._members = {
                member.name.removeprefix("./"): member for member in self._tar.getmembers() if member.isfile()
            }
        except FileNotFoundError as error:
            raise EvaluationError(f"{path}: no such file or folder; expected a data set: check the path") from error
        except (tarfile.TarError, OSError, EOFError) as error:
            self.close()
            raise EvaluationError(
                f"{path} cannot be read as a tar ({error}); expected an uncompressed tar, whole, or a folder: "
                "download it again if it was cut short, unpack it if it is compressed or a zip"
            ) from error
        self.names = frozenset(self._members)

    def read(self, name: str) -> bytes:
        """The bytes of one file of `names`.

        Raises:
            EvaluationError: If they cannot be read.
        """
        try:
            if self._tar is None:
                return (self.path / name).read_bytes()
            with self._lock:
                file = self._tar.extractfile(self._members[name])
                assert file is not None, "only regular files are listed"
                return file.read()
        except (tarfile.TarError, OSError) as error:
            raise EvaluationError(
                f"{name} of {self.path} cannot be read: {error}; expected it whole: get the data anew"
            ) from error

    def close(self) -> None:
        """Close the tar."""
        if self._tar is not None:
            self._tar.close()


def _files(path: Path) -> Iterator[Path]:
    """All files below a folder, linked folders included, but for links to a folder that they lie in themselves."""
    for folder, below, names in os.walk(path, followlinks=True):
        below[:] = [name for name in below if not _leads_back(Path(folder, name))]
        yield from (Path(folder, name) for name in names)


def _leads_back(folder: Path) -> bool:
    return folder.is_symlink() and folder.resolve() in {above.resolve() for above in folder.absolute().parents}
