"""Inputs in object storage and on the web: the same frames as on a disk, read in parts, and no secret left anywhere."""

from __future__ import annotations

import errno
import http.server
import threading
from contextlib import closing
from pathlib import Path

import fsspec
import pytest

from depthmill.pipeline.errors import MissingError, SourceError
from depthmill.pipeline.objects import said
from depthmill.pipeline.sources import expand_inputs, images, open_source, source_id
from depthmill.pipeline.types import Frame
from depthmill.tests import media as make
from depthmill.tests.pipeline.sources.contract import content, read_all
from depthmill.tests.pipeline.sources.web import Handler

SECRETS = (
    "X-Amz-Signature=0123456789abcdef&X-Amz-Credential=AKIDEXAMPLE%2F2026&X-Amz-Expires=60"
    "&X-Amz-Security-Token=tok9tok9"
)


@pytest.fixture
def local(tmp_path: Path) -> Path:
    make.write_video(tmp_path / "clip.mp4", frames=30)
    make.write_tar(tmp_path / "shard-00000.tar", make.samples(30))
    make.write_tar(tmp_path / "shard-00001.tar", make.samples(3))
    make.write_parquet(tmp_path / "rows.parquet", {"image": [make.encode(index) for index in range(30)]})
    make.write_image_folder(tmp_path / "photos", count=5)
    (tmp_path / "photos" / "003.png").write_bytes(b"broken")
    return tmp_path


@pytest.fixture
def remote(s3, local: Path) -> str:
    files = fsspec.filesystem("s3")
    for path in local.rglob("*"):
        if path.is_file():
            files.pipe_file(f"{s3.url}/in/{path.relative_to(local).as_posix()}", path.read_bytes())
    return f"{s3.url}/in"


def frames(uri: str) -> list[Frame]:
    with closing(open_source(uri)) as source:
        return list(source.read(0, source.probe().frames))


KINDS = ["clip.mp4", "shard-00000.tar", "rows.parquet", "photos", "photos/001.png"]


@pytest.mark.parametrize("name", KINDS)
def test_the_same_frames_as_on_a_disk(local: Path, remote: str, name: str) -> None:
    source, there = open_source(f"{remote}/{name}"), open_source(local / name)
    probed, expected = source.probe(), there.probe()
    assert (probed.frames, probed.height, probed.width, probed.kind) == (
        expected.frames,
        expected.height,
        expected.width,
        expected.kind,
    )
    assert probed.keys == expected.keys
    assert probed.uri == f"{remote}/{name}"
    assert probed.id == source_id(f"{remote}/{name}")
    whole = content(list(there.read(0, expected.frames)))
    assert content(list(source.read(0, probed.frames))) == whole
    middle = probed.frames // 2
    assert content(list(source.read(middle, probed.frames))) == whole[middle:]
    again = open_source(f"{remote}/{name}")
    assert again.probe().fingerprint == probed.fingerprint
    for one in (source, there, again):
        one.close()


@pytest.mark.parametrize("name", KINDS)
def test_another_file_has_another_fingerprint(remote: str, name: str, tmp_path: Path) -> None:
    before = open_source(f"{remote}/{name}").probe().fingerprint
    changed = {"clip.mp4": make.write_video(tmp_path / "other.mp4", frames=29).read_bytes()}.get(name)
    if changed is None and name.endswith(".tar"):
        changed = make.write_tar(tmp_path / "other.tar", make.samples(29)).read_bytes()
    if changed is None and name.endswith(".parquet"):
        path = make.write_parquet(tmp_path / "other.parquet", {"image": [make.encode(index) for index in range(1, 31)]})
        changed = path.read_bytes()
    key = "photos/001.png" if name == "photos" else name
    fsspec.filesystem("s3").pipe_file(f"{remote}/{key}", changed or make.encode(77))
    assert open_source(f"{remote}/{name}").probe().fingerprint != before


def test_prefixes_and_patterns(remote: str) -> None:
    def expand(given: str) -> list[str]:
        return [url.removeprefix(f"{remote}/") for url in expand_inputs([given])]

    assert expand(f"{remote}/shard-*.tar") == ["shard-00000.tar", "shard-00001.tar"]
    assert expand(f"{remote}/shard-{{00000..00001}}.tar") == ["shard-00000.tar", "shard-00001.tar"]
    assert expand(f"{remote}/photos") == ["photos"]
    whole = list(expand_inputs([f"{remote}/"]))
    names = ["clip.mp4", "rows.parquet", "shard-00000.tar", "shard-00001.tar"]
    assert whole == [f"{remote}/", *(f"{remote}/{name}" for name in names)]
    assert expand(f"{remote}/missing-*.tar") == ["missing-*.tar"]
    for name in ("rows/0.tar", "rows/0.PARQUET", "rows/1.pq", "rows/1.tar", "rows/2.parquet"):
        fsspec.filesystem("s3").pipe_file(f"{remote}/{name}", b"")
    assert expand(f"{remote}/rows") == ["rows/0.tar", "rows/1.tar", "rows/2.parquet"]  # without img2dataset's metadata


def test_a_pattern_matches_prefixes_as_it_does_folders(s3, tmp_path: Path) -> None:
    files = fsspec.filesystem("s3")
    names = ("a/1.png", "a/b/2.png", "b/clip.mp4", "b/notes.txt", "c/notes.txt", ".d/1.png", "top.mp4", "top.json")
    names += ("a/x.depthmill.png", "a/b/x.depthmill.mp4", "x.depthmill.png")
    for name in names:
        files.pipe_file(f"{s3.url}/scenes/{name}", b"")
        (tmp_path / "scenes" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "scenes" / name).write_bytes(b"")
    for pattern in ("*", "*/", "?", "**", "a/*", "[ab]/", "**/*.png", "*.json"):
        here = [path.removeprefix(str(tmp_path)) for path in expand_inputs([f"{tmp_path}/scenes/{pattern}"])]
        there = [url.removeprefix(s3.url).rstrip("/") for url in expand_inputs([f"{s3.url}/scenes/{pattern}"])]
        assert there == [path.rstrip("/") for path in here], pattern
        assert "depthmill" not in "".join(there), "previews are no inputs"


def test_keys_that_look_like_patterns(s3) -> None:
    def expand(given: str) -> list[str]:
        return [url.removeprefix(f"{s3.url}/") for url in expand_inputs([f"{s3.url}/{given}"])]

    def write(*names: str) -> None:
        for name in names:
            fsspec.filesystem("s3").pipe_file(f"{s3.url}/{name}", b"")

    write("photo1.png", "Show 2/e1.mp4")
    assert expand("photo[1].png") == ["photo1.png"]
    assert expand("{a,b}.mp4") == ["a.mp4", "b.mp4"]
    assert expand("Show [2]/") == ["Show 2/e1.mp4"]
    write("photo[1].png", "{a,b}.mp4", "Show [2]/still.png", "Show [2]/e1.mp4")
    assert expand("photo[1].png") == ["photo[1].png"]
    assert expand("{a,b}.mp4") == ["{a,b}.mp4"]
    assert expand("Show [2]/") == ["Show [2]/", "Show [2]/e1.mp4"]


def test_prefixes_with_dots_and_hidden_names(s3, tmp_path: Path) -> None:
    clip, files = make.write_video(tmp_path / "clip.mp4", frames=3).read_bytes(), fsspec.filesystem("s3")
    for folder in ("v1.0", "my.photos", "mis.tar"):
        for name, data in (("a.png", make.encode(3)), ("clip.mp4", clip), ("._clip.mp4", b"x"), (".b/c.mp4", b"x")):
            files.pipe_file(f"{s3.url}/{folder}/{name}", data)
    files.pipe_file(f"{s3.url}/clip.take2", clip)
    for given in ("v1.0/", "v1.0", "my.photos/", "my.photos", "mis.tar/"):
        folder, video = expand_inputs([f"{s3.url}/{given}"])
        assert (folder, video) == (f"{s3.url}/{given}", f"{s3.url}/{given.rstrip('/')}/clip.mp4")
        assert open_source(folder).probe().keys == ("a.png",)
    assert list(expand_inputs([f"{s3.url}/v1.0/*.mp4"])) == [f"{s3.url}/v1.0/clip.mp4"]
    assert list(expand_inputs([f"{s3.url}/v1.0/.b/*.mp4"])) == [f"{s3.url}/v1.0/.b/c.mp4"]
    assert list(expand_inputs([f"{s3.url}/clip.take2"])) == [f"{s3.url}/clip.take2"]
    assert open_source(f"{s3.url}/clip.take2").probe().kind == "video"
    with pytest.raises(SourceError, match=r"missing\.thing"):
        open_source(f"{s3.url}/missing.thing").probe()


def test_what_is_not_there_is_said(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("missing.mp4", "missing.tar", "missing.parquet", "missing.png", "missing"):
        with pytest.raises(SourceError, match="missing"):
            frames(f"{remote}/{name}")
    with pytest.raises(SourceError, match="no-such-bucket"):
        open_source("s3://no-such-bucket-here/clip.mp4").probe()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(SourceError, match="ftp:// is not known"):
        open_source("ftp://host/clip.mp4").probe()


def test_keys_may_have_hashes_and_question_marks(s3, tmp_path: Path) -> None:
    files, clip = fsspec.filesystem("s3"), make.write_video(tmp_path / "clip.mp4", frames=3).read_bytes()
    names = ["take#1.mp4", "take#2.mp4", "what?.mp4", "whats.mp4"]
    for name in names:
        files.pipe_file(f"{s3.url}/in/{name}", clip)
    for name in ("a#1.png", "a?2.png"):
        files.pipe_file(f"{s3.url}/in/ph#to?s/{name}", make.encode(5))
    whole = list(expand_inputs([f"{s3.url}/in"]))
    assert whole == [f"{s3.url}/in", *(f"{s3.url}/in/{name}" for name in names)]
    assert len({source_id(url) for url in whole}) == 5
    assert list(expand_inputs([f"{s3.url}/in/what?.mp4"])) == [f"{s3.url}/in/what?.mp4"]
    assert list(expand_inputs([f"{s3.url}/in/take#?.mp4"])) == whole[1:3]
    for url in whole[1:]:
        source = open_source(url)
        assert (source.probe().uri, source.probe().kind, source.probe().frames) == (url, "video", 3)
        source.close()
    folder = open_source(f"{s3.url}/in/ph#to?s")
    assert folder.probe().keys == ("a#1.png", "a?2.png")
    assert all(frame.image is not None for frame in folder.read(0, 2))


def test_a_service_that_fails_once_is_no_property_of_the_source(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_source(f"{remote}/photos").probe().fingerprint
    files = type(fsspec.filesystem("s3"))
    original = files._call_s3
    for request, error in (
        ("head_object", OSError(errno.EBUSY, "Slow Down")),
        ("head_object", PermissionError("The provided token has expired")),
        ("get_object", OSError(errno.EREMOTEIO, "Internal Error")),
    ):

        async def fail(self, method, *args, request=request, error=error, **options):
            if method == request and options["Key"].endswith("001.png"):
                raise error
            return await original(self, method, *args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(files, "_call_s3", fail)
            source = open_source(f"{remote}/photos")
            with pytest.raises(SourceError, match=r"photos/001\.png.*cannot be read"):
                source.probe()
        assert source.probe().fingerprint == before


def test_a_service_that_fails_while_pictures_are_decoded_fails_no_frame(
    remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(f"{remote}/photos")
    probed = source.probe()
    files = type(fsspec.filesystem("s3"))
    original = files._call_s3

    async def fail(self, method, *args, **options):
        if options.get("Key", "").endswith("001.png"):
            raise PermissionError("The provided token has expired")
        return await original(self, method, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_call_s3", fail)
        with pytest.raises(SourceError, match=r"photos/001\.png: cannot be read.*token has expired"):
            list(source.read(0, probed.frames))
    assert [frame.index for frame in source.read(0, probed.frames) if frame.image is None] == [3]


def test_a_picture_that_is_gone_since_it_was_listed_fails_alone(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "list_files", lambda uri: [f"{uri}/000.png", f"{uri}/gone.png"])
    source = open_source(f"{remote}/photos")
    assert source.probe().frames == 2
    assert [frame.image is None for frame in source.read(0, 2)] == [False, True]


def test_a_prefix_of_which_nothing_is_left_fails_no_frame(remote: str) -> None:
    source = open_source(f"{remote}/photos")
    frames = source.probe().frames
    files = fsspec.filesystem("s3")
    files.rm(f"{remote}/photos/000.png")
    assert [frame.index for frame in source.read(0, frames) if frame.image is None] == [0, 3]
    files.rm(f"{remote}/photos", recursive=True)
    with pytest.raises(SourceError, match=r"photos/001\.png: cannot be read \(no such object\).*same command again"):
        list(source.read(1, 2))


@pytest.fixture
def fetched(s3, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each request for a part of a file took."""
    counts: list[int] = []
    files = type(fsspec.filesystem("s3"))
    original = files._call_s3

    async def note(self, method, *args, **options):
        answer = await original(self, method, *args, **options)
        if method == "get_object":
            counts.append(answer["ContentLength"])
        return answer

    monkeypatch.setattr(files, "_call_s3", note)
    return counts


def test_a_segment_in_the_middle_does_not_fetch_the_shard(s3, tmp_path: Path, fetched: list[int]) -> None:
    big = [(f"{index:05}.bmp", make.encode(index, ".bmp", height=300, width=400)) for index in range(100)]
    shard = make.write_tar(tmp_path / "big.tar", big)
    fsspec.filesystem("s3").pipe_file(f"{s3.url}/big.tar", shard.read_bytes())
    source = open_source(f"{s3.url}/big.tar")
    source.probe()
    fetched.clear()
    assert all(frame.image is not None for frame in source.read(50, 54))
    source.close()
    assert 4 * len(big[0][1]) < sum(fetched) < shard.stat().st_size / 4, (fetched, shard.stat().st_size)


def test_the_headers_of_a_folder_do_not_fetch_its_pictures(s3, fetched: list[int]) -> None:
    picture = make.encode(1, ".bmp", height=400, width=300)
    for index in range(6):
        fsspec.filesystem("s3").pipe_file(f"{s3.url}/in/{index}.bmp", picture)
    probed = open_source(f"{s3.url}/in").probe()
    assert (probed.frames, probed.height, probed.width) == (6, 400, 300)
    assert 0 < sum(fetched) < 6 * len(picture) / 5


class _Ranges(Handler):
    """A file server that gives parts, and asks for the signature."""

    def answer(self, body: bool) -> None:
        path = Path(self.server.folder) / self.path.partition("?")[0].lstrip("/")
        if self.server.outage or "0123456789abcdef" not in self.path or not path.is_file():
            self.send_error(self.server.outage or 403)
            return
        data, first = path.read_bytes(), 0
        wanted = self.headers.get("Range")
        if wanted:
            low, high = wanted.removeprefix("bytes=").split("-")
            first, last = int(low), min(int(high or len(data) - 1), len(data) - 1)
            last = min(last, first + self.server.most - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            data = data[first : last + 1]
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def web(local: Path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Ranges)
    server.folder, server.outage, server.most = local, 0, 1 << 30
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("name", ["clip.mp4", "shard-00000.tar", "photos/001.png"])
def test_a_signed_url_opens_and_its_signature_is_nowhere(local: Path, web, name: str) -> None:
    url = f"{web.url}/{name}?{SECRETS}"
    assert list(expand_inputs([url])) == [url]
    source = open_source(url)
    probed = source.probe()
    assert content(list(source.read(0, probed.frames))) == content(read_all(local / name))
    source.close()
    assert probed.uri == f"{web.url}/{name}"
    assert probed.id == source_id(url) == source_id(url.replace("X-Amz-Expires=60", "X-Amz-Expires=61"))
    wrong = url.replace("0123456789abcdef", "fedcba9876543210")
    with pytest.raises(SourceError) as raised:
        frames(wrong)
    for secret in ("fedcba9876543210", "AKIDEXAMPLE", "tok9tok9"):
        assert secret not in str(raised.value)


@pytest.mark.parametrize("name", ["clip.mp4", "shard-00000.tar", "rows.parquet"])
def test_a_part_that_comes_short_shifts_no_other(local: Path, web, name: str) -> None:
    web.most = 1000
    with pytest.raises(SourceError, match=r"gave 1,000 bytes of [\d,]+ asked for"):
        frames(f"{web.url}/{name}?{SECRETS}")
    web.most = 1 << 30
    assert content(frames(f"{web.url}/{name}?{SECRETS}")) == content(read_all(local / name))


def test_an_error_tells_no_signature_however_its_url_is_written() -> None:
    text = said(
        OSError("403, url='https://a.b/s.tar?sv=1&sig=AbCd%2BEf/Gh%3D' by http://c.d/t?X-Amz-Signature=0f3e9b2c")
    )
    assert "https://a.b/s.tar" in text
    assert "http://c.d/t" in text
    assert not any(secret in text for secret in ("AbCd", "Ef/Gh", "0f3e9b2c"))


def test_a_picture_s_query_is_no_part_of_its_name(local: Path, web) -> None:
    url = f"{web.url}/photos/001.png?version=0123456789abcdef&of=a/b"
    source = open_source(url)
    assert source.probe().keys == ("001.png",)
    assert content(list(source.read(0, 1))) == content(read_all(local / "photos" / "001.png"))
    source.close()


@pytest.mark.parametrize("name", ["clip.mp4", "shard-00000.tar", "photos/001.png", "rows.parquet"])
def test_a_server_that_does_not_answer_is_no_missing_file(web, name: str) -> None:
    url = f"{web.url}/{name}?{SECRETS}"
    for status, words in ((404, "no such object"), (410, "no such object"), (403, "403 Forbidden"), (503, "503 Serv")):
        web.outage = status
        with pytest.raises(SourceError, match=f"{name}: .*{words}") as raised:
            open_source(url).probe()
        assert isinstance(raised.value, MissingError) == (status in (404, 410))
    web.outage = 0
    assert open_source(url).probe().frames
    with pytest.raises(SourceError, match="Cannot connect") as raised:
        open_source(f"http://127.0.0.1:9/{name}").probe()
    assert not isinstance(raised.value, MissingError)
