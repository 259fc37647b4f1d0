"""What probing makes of an input."""

import pytest

from depthmill.pipeline import store as stores
from depthmill.pipeline.errors import SourceError
from depthmill.pipeline.plan import Prober
from depthmill.pipeline.store import Layout
from depthmill.tests import media


def test_limits_are_those_that_were_given(tmp_path):
    media.write_image_folder(tmp_path / "photos", count=3, sizes=[(30, 40), (40, 30), (60, 80)])
    for name, max_pixels, size in (("some", 2000, [40, 40]), ("all", 4800, [60, 80])):
        store = stores.create(tmp_path / name, Layout(), {})
        prober = Prober(store.uri, max_pixels, 3, False)
        prober.load()
        planned = prober.probe(str(tmp_path / "photos"))
        assert (planned.frames, store.attributes(planned.id)["size"]) == (3, size)
    few = Prober(store.uri, 4800, 2, False)
    few.load()
    with pytest.raises(SourceError, match="more than 2 frames"):
        few.probe(str(tmp_path / "photos"))
