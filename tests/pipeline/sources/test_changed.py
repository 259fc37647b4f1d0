"""Inputs that are replaced between being probed and being read: nothing of the others is taken for theirs."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from email.utils import formatdate
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest

from depthmill.pipeline.errors import SourceChangedError, SourceError
from depthmill.pipeline.sources import open_source
from depthmill.pipeline.sources.opened import OpenSources
from depthmill.tests import media as make
from depthmill.tests.pipeline.sources.contract import content
from depthmill.tests.pipeline.sources.web import Handler

COUNT = 6
KINDS = ["photos", "shard.tar", "shard.tar.gz", "rows.parquet", "clip.mp4", "raw.avi"]
OLD, NEW = "Mon, 02 Nov 2026 10:00:00 GMT", "Mon, 30 Nov 2026 10:00:00 GMT"


def write(folder: Path, kind: str, first: int, count: int = COUNT) -> dict[str, bytes]:
    """Name -> bytes of an input of painted pictures from number `first` on: others differ in those alone."""
    pictures = [make.encode(first + index, ".bmp") for index in range(count)]
    if kind == "photos":
        return {f"{kind}/{index}.bmp": picture for index, picture in enumerate(pictures)}
    path = folder / kind
    if ".tar" in kind:
        make.write_tar(path, [(f"{index}.bmp", picture) for index, picture in enumerate(pictures)])
    elif kind == "rows.parquet":
        make.write_parquet(path, {"image": pictures, "id": list(range(count))})
    else:
        painted = [make.paint(first + index) for index in range(count)]
        raw = {"codec": "rawvideo", "gop": 1, "bframes": 0} if kind == "raw.avi" else {"gop": 4}
        make.write_video(path, pictures=painted, **raw)
    return {kind: path.read_bytes()}


def local(folder: Path) -> SimpleNamespace:
    def put(files: dict[str, bytes]) -> None:
        for name, data in files.items():
            (folder / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "in" / name).write_bytes(data)

    return SimpleNamespace(url=f"{folder}/in", put=put)


def bucket(url: str) -> SimpleNamespace:
    def put(files: dict[str, bytes]) -> None:
        for name, data in files.items():
            fsspec.filesystem("s3").pipe_file(f"{url}/{name}", data)

    return SimpleNamespace(url=url, put=put)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["disk", "bucket"])
def test_an_input_that_is_replaced_is_another_one(
    request: pytest.FixtureRequest, tmp_path: Path, where: str, kind: str
) -> None:
    place = local(tmp_path) if where == "disk" else bucket(request.getfixturevalue("s3").url)
    before = write(tmp_path, kind, 0)
    place.put(before)
    with closing(open_source(f"{place.url}/{kind}")) as source:
        source.probe()
        place.put(write(tmp_path, kind, 100))
        with pytest.raises(SourceChangedError, match=rf"{kind}.* changed since it was labelled, or was to be"):
            list(source.read(0, COUNT))
        place.put(before)  # and nothing of the others is kept
        assert [make.read_index(frame.image) for frame in source.read(2, COUNT)] == list(range(2, COUNT))


@pytest.mark.parametrize("kept", [0.5, 0.0])
@pytest.mark.parametrize("kind", ["shard.tar.gz", "rows.parquet", "clip.mp4"])
def test_an_input_of_which_less_is_there_is_another_one(tmp_path: Path, kind: str, kept: float) -> None:
    """Its frames do not fail: they would be committed under the name of what they are not of."""
    place = local(tmp_path)
    place.put(write(tmp_path, kind, 0))
    source = open_source(f"{place.url}/{kind}")
    source.probe()
    make.truncate(tmp_path / "in" / kind, kept)
    with pytest.raises(SourceChangedError, match="changed since"):
        list(source.read(0, COUNT))


class _Objects(Handler):
    """A server of objects with what it says of them; of a URL that it redirects, another each time."""

    protocol_version = "HTTP/1.1"

    def answer(self, body: bool) -> None:
        name = self.path.partition("?")[0].lstrip("/")
        self.server.requests.append(self.command)
        if name in self.server.moved:
            self._say(302, {"Location": f"/{self.server.moved[name]}?Signature={len(self.server.requests)}"}, b"")
            return
        data, said = self.server.objects[name]
        headers, first, size = {"Accept-Ranges": "bytes", **said()}, 0, len(data)
        wanted = self.headers.get("Range")
        if wanted:
            first, last = map(int, wanted.removeprefix("bytes=").split("-"))
            data = data[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{first + len(data) - 1}/{size}" if data else f"bytes */{size}"
        self._say((206 if data else 416) if wanted else 200, headers, data, body)

    def _say(self, status: int, headers: dict[str, str], data: bytes, body: bool = True) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def web():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Objects)
    server.objects, server.moved, server.requests = {}, {}, []
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}"

    def put(files: dict[str, bytes], said: Callable[[], dict[str, str]] | dict[str, str]) -> None:
        server.objects.update({name: (data, said if callable(said) else lambda: said) for name, data in files.items()})

    server.put = put
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


SAID = {
    "strong tags": ({"ETag": '"a"'}, {"ETag": '"b"'}),
    "weak tags": ({"ETag": 'W/"a"'}, {"ETag": 'W/"b"'}),
    "times": ({"Last-Modified": OLD}, {"Last-Modified": NEW}),
    "weak tags and times": ({"ETag": 'W/"a"', "Last-Modified": OLD}, {"ETag": 'W/"a"', "Last-Modified": NEW}),
}


@pytest.mark.parametrize("how", [*SAID, "nothing"])
@pytest.mark.parametrize("kind", ["photos/0.bmp", "shard.tar", "rows.parquet", "raw.avi"])
def test_an_object_on_the_web_that_is_replaced_is_another_one(tmp_path: Path, web, kind: str, how: str) -> None:
    if (kind, how) == ("raw.avi", "nothing"):
        pytest.skip("of a video of the same size, with packets of the same sizes and times, nothing tells")
    before, after = SAID.get(how, ({}, {}))
    files, others = (write(tmp_path, kind.partition("/")[0], first) for first in (0, 100))
    web.put(files, before)
    source = open_source(f"{web.url}/{kind}")
    frames = source.probe().frames
    web.put(others, after)
    with pytest.raises(SourceChangedError, match=rf"{kind}.* changed since it was labelled, or was to be"):
        list(source.read(0, frames))
    web.put(files, before)
    assert [make.read_index(frame.image) for frame in source.read(0, frames)] == list(range(frames))
    source.close()


def test_a_url_that_is_redirected_elsewhere_each_time_is_one_object(tmp_path: Path, web) -> None:
    web.moved["resolve/raw.avi"] = "raw.avi"
    for first, says in ((0, '"a"'), (100, '"b"')):
        web.put(write(tmp_path, "raw.avi", first), {"ETag": says})
        if not first:
            source = open_source(f"{web.url}/resolve/raw.avi")
            source.probe()
            assert [make.read_index(frame.image) for frame in source.read(2, 5)] == [2, 3, 4]
    source.close()
    with pytest.raises(SourceChangedError):
        list(source.read(2, 5))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "." in kind])
def test_a_server_whose_words_are_others_each_time_is_no_change(tmp_path: Path, web, kind: str) -> None:
    times = count()
    web.put(write(tmp_path, kind, 0), lambda: {"Last-Modified": formatdate(1.79e9 + next(times), usegmt=True)})
    with closing(open_source(f"{web.url}/{kind}")) as source:
        assert source.probe().frames == COUNT
        assert [make.read_index(frame.image) for frame in source.read(0, COUNT)] == list(range(COUNT))


def test_machines_of_one_name_with_tags_of_their_own_have_one_object(tmp_path: Path, web) -> None:
    web.put(write(tmp_path, "raw.avi", 0), lambda: {"ETag": f'"{len(web.requests) % 3}"', "Last-Modified": OLD})
    source = open_source(f"{web.url}/raw.avi")
    source.probe()
    for start in range(0, COUNT, 2):
        assert [make.read_index(frame.image) for frame in source.read(start, start + 2)] == [start, start + 1]
    source.close()


@pytest.mark.parametrize("where", ["bucket", "web"])
def test_an_archive_that_is_replaced_while_it_is_read_is_no_outage(
    request: pytest.FixtureRequest, tmp_path: Path, where: str
) -> None:
    """It is told as such at once, by the part of it that cannot be had any more, and can be read when it is back."""

    def shard(first: int, count: int) -> dict[str, bytes]:
        pictures = [make.encode(first + index, ".bmp", height=400, width=600) for index in range(count)]
        path = make.write_tar(tmp_path / "big.tar", [(f"{index}.bmp", data) for index, data in enumerate(pictures)])
        return {"big.tar": path.read_bytes()}

    place, before = request.getfixturevalue("s3" if where == "bucket" else "web"), shard(0, 14)
    put = bucket(place.url).put if where == "bucket" else lambda files: place.put(files, {})
    put(before)
    source = open_source(f"{place.url}/big.tar")
    source.probe()
    frames = source.read(0, 14)
    next(frames)
    frames.close()
    put(shard(100, 1))
    with pytest.raises(SourceChangedError, match="changed since"):
        list(source.read(13, 14))
    put(before)
    assert [make.read_index(frame.image) for frame in source.read(13, 14)] == [13]
    source.close()


@pytest.mark.parametrize("kind", ["shard.tar", "rows.parquet", "raw.avi"])
def test_an_input_that_is_replaced_while_it_is_probed_is_not_described(
    tmp_path: Path, web, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A fingerprint of both would be no file's: with it in the store, neither could be labelled."""
    files, others = (write(tmp_path, kind, first) for first in (0, 100))
    source = open_source(f"{web.url}/{kind}")

    def replaced() -> dict[str, str]:
        if web.requests.count("GET"):
            web.put(others, {"ETag": '"b"'})
        return {"ETag": '"a"'}

    web.put(files, replaced)
    with suppress(SourceChangedError):  # of a raw video all that the first probe kept may be of the other
        source.probe()
    assert source.probe().fingerprint == open_source(f"{web.url}/{kind}").probe().fingerprint
    assert [make.read_index(frame.image) for frame in source.read(0, COUNT)] == list(range(100, 100 + COUNT))
    source.close()


def test_what_is_said_to_have_changed_is_probed_anew_and_gone_on_with_if_it_is_the_same(tmp_path: Path, web) -> None:
    files, sources = write(tmp_path, "raw.avi", 0), OpenSources(1 << 20, 100)
    web.put(files, {"ETag": '"a"'})
    uri = f"{web.url}/raw.avi"
    probed = open_source(uri).probe()

    def read() -> list[int]:
        with sources.dropping(uri):
            return [make.read_index(frame.image) for frame in sources.open(uri, probed.fingerprint).read(0, 3)]

    assert read() == [0, 1, 2]
    web.put(files, {"ETag": '"b"'})
    with pytest.raises(SourceChangedError):
        read()
    assert read() == [0, 1, 2]
    web.put(write(tmp_path, "raw.avi", 100), {"ETag": '"c"'})
    for _ in range(2):
        with pytest.raises(SourceChangedError, match=r"raw\.avi changed since it was labelled, or was to be"):
            read()
    sources.close()


def test_touching_files_changes_nothing(tmp_path: Path) -> None:
    for kind in KINDS:
        place = local(tmp_path)
        place.put(write(tmp_path, kind, 0))
        source = open_source(f"{place.url}/{kind}")
        source.probe()
        place.put(write(tmp_path, kind, 0))
        assert len(content(list(source.read(0, COUNT)))) == COUNT
        source.close()


def test_a_picture_of_a_bucket_takes_no_more_requests(s3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket(s3.url).put(write(tmp_path, "photos", 0))
    source = open_source(f"{s3.url}/photos")
    source.probe()
    files, methods = type(fsspec.filesystem("s3")), []
    original = files._call_s3

    async def note(self, method, *args, **options):
        methods.append(method)
        return await original(self, method, *args, **options)

    monkeypatch.setattr(files, "_call_s3", note)
    assert len(list(source.read(0, COUNT))) == COUNT
    assert (methods.count("head_object"), methods.count("get_object"), len(methods)) == (COUNT, COUNT, 2 * COUNT)


def test_a_server_that_cannot_be_asked_is_no_change(tmp_path: Path, web) -> None:
    web.put(write(tmp_path, "raw.avi", 0), {"ETag": '"a"'})
    source = open_source(f"{web.url}/raw.avi")
    source.probe()
    web.objects.clear()
    with pytest.raises(SourceError) as raised:
        list(source.read(0, 3))
    assert not isinstance(raised.value, SourceChangedError)
