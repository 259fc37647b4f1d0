import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from depthmill.pipeline import store as stores
from depthmill.pipeline.colours import GREY, SPECTRAL, depth_rgb, normals_rgb
from depthmill.pipeline.errors import ConfigError, RunStoppedError, StoreError
from depthmill.pipeline.mp4 import write_mp4
from depthmill.pipeline.preview import preview
from depthmill.pipeline.sources import expand_inputs, open_source
from depthmill.pipeline.sources.naming import preview_name
from depthmill.pipeline.store.temporal import Temporal
from depthmill.tests import media

H, W, FRAMES = 48, 64, 10
TOWARDS = np.broadcast_to(np.float32([0, 0, 1]), (H, W, 3))


def ramp(index: int, height: int = H, width: int = W) -> np.ndarray:
    """Far at the left, near at the right, and the whole scene nearer from frame to frame."""
    return np.broadcast_to(np.linspace(0.9, 0.5, width, dtype=np.float32) - 0.04 * index, (height, width))


def colour(index: int) -> tuple[int, int, int]:
    return (20 * index, 100, 255 - 20 * index)


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Plain frames, one colour each, at uneven times."""
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "4"})
        stream.width, stream.height, stream.pix_fmt = W, H, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(np.full((H, W, 3), colour(index), np.uint8), format="rgb24")
            frame.pts, frame.time_base = 100 * index + (300 if index > 6 else 0), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def labelled(path: Path, store_path: Path, failed: tuple[int, ...] = (), stop: int | None = None) -> stores.Store:
    store = stores.create(store_path, stores.Layout(shard_frames=2, segment_frames=2), {})
    reader = open_source(path)
    source = reader.probe()
    store.add(source)
    for segment in store.segments(source.id)[:stop]:
        writer = store.writer(segment)
        for frame in reader.read(segment.start, segment.stop):
            if frame.index in failed:
                writer.fail(frame.index, "broken")
                continue
            assert frame.image is not None, frame.error
            height, width, _ = frame.image.shape
            writer.put(frame.index, ramp(frame.index, height, width), TOWARDS[:height, :width])
        writer.commit()
    reader.close()
    return store


def drawn(*given: object, **options: object) -> list[Path]:
    """The files of a preview that leaves nothing out."""
    done = preview(*given, **options)
    assert not done.left_out
    return done.files


def decoded(path: Path) -> tuple[np.ndarray, list[float]]:
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames]), [float(frame.time) for frame in frames]


def opened(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def near(a: np.ndarray, b: tuple[int, int, int], tolerance: int = 14) -> bool:
    return bool(np.abs(a.astype(int) - np.array(b)).max() <= tolerance)


def test_a_video_gets_a_sheet_and_a_video_of_its_own_frames(video, tmp_path):
    store = labelled(video, tmp_path / "s", failed=(3,))
    (source_id,) = store.sources()
    sheet_path, video_path = drawn(store.uri, tmp_path / "out", frames=4)
    assert (sheet_path.name, video_path.name) == (preview_name(source_id, ".png"), preview_name(source_id, ".mp4"))
    assert sorted((tmp_path / "out").iterdir()) == [video_path, sheet_path]

    frames, times = decoded(video_path)
    assert frames.shape == (FRAMES, H, 3 * W, 3)
    np.testing.assert_allclose(times, store.array(source_id, "time")[:], atol=1e-3)
    for index, frame in enumerate(frames):
        assert near(frame[H // 2, W // 2], colour(index)), "the picture is the left panel"
        depth, normals = frame[H // 2, W : 2 * W], frame[H // 2, 2 * W :]
        if index == 3:
            assert near(depth, (GREY,) * 3)
            assert near(normals, (GREY,) * 3)
        else:
            assert near(normals[4:], (128, 128, 255))
    # The first frame's left is the clip's farthest, the last one's right its nearest; one range for the whole clip.
    assert near(frames[0, H // 2, W + 1], SPECTRAL[-1], 30)
    assert near(frames[-1, H // 2, 2 * W - 3], SPECTRAL[0], 30)
    assert not near(frames[0, H // 2, 2 * W - 3], SPECTRAL[0], 60), "not stretched for each frame"

    sheet = opened(sheet_path)
    columns, rows = [72 + i * (W + 4) for i in range(4)], [40 + i * (H + 4) for i in range(3)]
    assert sheet.shape == (rows[-1] + H + 4, columns[-1] + W + 4, 3)
    for x, index in zip(columns, (0, 3, 6, 9), strict=True):
        assert near(sheet[rows[0] + 5, x + 5], colour(index))
        assert (sheet[rows[0] - 1, x : x + W] == 255).all(), "a gap above"
        expected = (GREY,) * 3 if index == 3 else (128, 128, 255)
        assert (sheet[rows[2] : rows[2] + H, x : x + W] == expected).all()
        assert (sheet[18:36, x : x + W] < 100).any(), "a caption"


def test_a_pause_is_cut_and_what_cannot_be_drawn_keeps_no_other_from_it(tmp_path):
    """A day between two frames is more than an MP4 can say."""
    media.write_video(tmp_path / "a.mkv", frames=5, bframes=0, times_ms=[0, 40, 80, 86_400_000, 86_400_040])
    shutil.copy(tmp_path / "a.mkv", tmp_path / "b.mkv")
    store = labelled(tmp_path / "a.mkv", tmp_path / "s")
    labelled(tmp_path / "b.mkv", tmp_path / "b")
    store.add(open_source(tmp_path / "b.mkv").probe())
    broken, whole = sorted(store.sources())
    shutil.copytree(tmp_path / "b" / whole, tmp_path / "s" / whole, dirs_exist_ok=True)
    shard = next(file for file in sorted((tmp_path / "s" / broken / "depth" / "c").rglob("*")) if file.is_file())
    shard.write_bytes(shard.read_bytes()[:50])
    done = preview(store.uri, tmp_path / "out")
    assert [path.name for path in done.files] == [preview_name(whole, ".png"), preview_name(whole, ".mp4")]
    np.testing.assert_allclose(decoded(done.files[1])[1], [0, 0.04, 0.08, 5.08, 5.12], atol=1e-3)
    assert list(done.left_out) == [broken]
    assert "depthmill verify" in done.left_out[broken]


@pytest.mark.parametrize("name", ["depth", "normals"])
def test_labels_that_are_gone_are_not_drawn_as_blanks(video, tmp_path, name):
    store = labelled(video, tmp_path / "s")
    (source,) = store.sources()
    shutil.rmtree(tmp_path / "s" / source / name / "c")
    done = preview(store.uri, tmp_path / "out")
    assert done.files == []
    assert f"frame 0 is labelled, but its {name} is missing; `depthmill verify" in done.left_out[source]


def test_a_video_whose_times_are_gone_is_not_said_to_be_drawn(video, tmp_path):
    store = labelled(video, tmp_path / "s")
    (name,) = store.sources()
    shutil.rmtree(tmp_path / "s" / name / "time" / "c")
    done = preview(store.uri, tmp_path / "out")
    assert [path.name for path in done.files] == [preview_name(name, ".png")]
    assert "is damaged (times are missing): run `depthmill verify" in done.left_out[name]


def test_wide_videos_are_scaled_to_even_sides(video, tmp_path):
    store = labelled(video, tmp_path / "s", stop=2)
    _, video_path = drawn(store.uri, tmp_path / "out", max_width=100)
    frames, _ = decoded(video_path)
    assert frames.shape == (FRAMES, 24, 96, 3)
    assert near(frames[3, 12, 70:], (128, 128, 255))
    assert near(frames[4, 12, 40:], (GREY,) * 3), "what is not labelled yet is grey"


def test_a_part_of_a_video_or_none(video, tmp_path):
    store = labelled(video, tmp_path / "s")
    out = tmp_path / "out"
    _, video_path = drawn(store.uri, out, start_s=0.25, stop_s=1.15)  # frames 7 to 9 are 0.3 s late
    frames, times = decoded(video_path)
    np.testing.assert_allclose(times, np.array([0.3, 0.4, 0.5, 0.6, 1.0, 1.1]) - 0.25, atol=1e-3)
    assert near(frames[0, H // 2, W // 2], colour(3))
    assert near(frames[-1, H // 2, W // 2], colour(8))
    assert [path.suffix for path in drawn(store.uri, out, start_s=9)] == [".png"]
    assert [path.suffix for path in drawn(store.uri, out, video=False)] == [".png"]
    with pytest.raises(ConfigError, match="a preview from 2 to 1 s"):
        drawn(store.uri, out, start_s=2, stop_s=1)


def test_a_stopped_preview_leaves_no_half_video(video, tmp_path, monkeypatch):
    store = labelled(video, tmp_path / "s")

    def stopped(*_):
        yield 0, Image.new("RGB", (3 * W, H))
        raise KeyboardInterrupt

    monkeypatch.setattr("depthmill.pipeline.preview._strips", stopped)
    with pytest.raises(KeyboardInterrupt):
        drawn(store.uri, tmp_path / "out")
    assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".png"]


def test_a_stopped_preview_leaves_the_sheet_that_was_there(video, tmp_path, monkeypatch):
    labelled(video, tmp_path / "store.zarr")
    (sheet,) = drawn(tmp_path / "store.zarr", tmp_path / "out", video=False)
    before, save = sheet.read_bytes(), Image.Image.save

    def stop(*given):
        save(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        preview(tmp_path / "store.zarr", tmp_path / "out", frames=2, video=False)
    assert [path.read_bytes() for path in (tmp_path / "out").iterdir()] == [before]


def test_a_folder_that_cannot_be_written_is_named(video, tmp_path):
    store = labelled(video, tmp_path / "s")
    with pytest.raises(ConfigError, match=r"clip\.mp4/out cannot be written"):
        drawn(store.uri, video / "out")


def test_anamorphic_videos_stay_so(tmp_path):
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = W, H, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(64, 45)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((H, W, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    store = labelled(path, tmp_path / "s")
    _, video_path = drawn(store.uri, tmp_path / "out")
    with av.open(str(video_path)) as container:
        assert container.streams.video[0].sample_aspect_ratio == Fraction(64, 45)


def test_tall_videos_are_no_higher_than_wide(video, tmp_path):
    store = stores.create(tmp_path / "s", stores.Layout(shard_frames=2, segment_frames=2), {})
    store.add(replace(open_source(video).probe(), height=20_000))
    _, video_path = drawn(store.uri, tmp_path / "out", stop_s=0.1)
    assert decoded(video_path)[0].shape[1] == 1920


@pytest.mark.parametrize("change", ["gone", "changed"])
def test_labels_are_drawn_alone_where_the_source_is_gone(video, tmp_path, caplog, change):
    store = labelled(video, tmp_path / "s")
    video.unlink()
    if change == "changed":
        with av.open(str(video), "w") as container:
            stream = container.add_stream("libx264", rate=5)
            stream.width, stream.height, stream.pix_fmt = W, H, "yuv420p"
            container.mux(stream.encode(av.VideoFrame(W, H, "yuv420p")))
            container.mux(stream.encode())
    sheet_path, video_path = drawn(store.uri, tmp_path / "out")
    assert decoded(video_path)[0].shape == (FRAMES, H, 2 * W, 3)
    assert opened(sheet_path).shape[0] == 40 + 2 * (H + 4)
    (record,) = caplog.records
    assert "labels alone" in record.message
    assert ("changed since" in record.message) == (change == "changed")


def test_a_folder_gets_a_sheet_with_pictures_in_their_own_size(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (W, H), (200, 0, 0)).save(folder / "a-picture-with-a-long-name.png")
    Image.new("RGB", (W // 2, H), (0, 200, 0)).save(folder / "b.png")
    (folder / "c.png").write_bytes(b"")
    store = labelled(folder, tmp_path / "s", failed=(2,))
    (sheet_path,) = drawn(store.uri, tmp_path / "out")
    sheet = opened(sheet_path)
    assert sheet.shape == (40 + 3 * (H + 4), 72 + 3 * (W + 4), 3)
    b = 72 + W + 4
    assert (sheet[40 : 40 + H, 72 : 72 + W] == (200, 0, 0)).all()
    assert (sheet[40 : 40 + H, b : b + W // 2] == (0, 200, 0)).all()
    assert (sheet[40:, b + W // 2 : b + W] == 255).all(), "beyond the picture there is nothing, on any row"
    assert (sheet[40 : 40 + H, b + W + 4 : b + 2 * W + 4] == GREY).all()


def test_one_source_of_several(video, tmp_path):
    store = labelled(video, tmp_path / "s")
    (tmp_path / "other").mkdir()
    Image.new("RGB", (W, H)).save(tmp_path / "other" / "a.png")
    other = open_source(tmp_path / "other").probe()
    store.add(other)
    out = tmp_path / "out"
    assert drawn(store.uri, out, source_id=other.id) == [out / preview_name(other.id, ".png")]
    with pytest.raises(StoreError, match="no source 'nobody'"):
        drawn(store.uri, tmp_path / "out", source_id="nobody")
    with pytest.raises(ConfigError, match="0 frames"):
        drawn(store.uri, tmp_path / "out", frames=0)


def test_what_is_added_or_removed_meanwhile_is_not_damaged(video, tmp_path, monkeypatch):
    labelled(video, tmp_path / "labels.zarr")
    copies = [Path(shutil.copy(video, tmp_path / name)) for name in ("removed.mp4", "added.mp4")]
    removed = labelled(copies[0], tmp_path / "labels.zarr")
    gone = next(one for one in removed.sources() if one.startswith("removed"))

    def opened(*given, **options):
        shutil.rmtree(tmp_path / "labels.zarr" / gone)
        found = stores.open_datasets(*given, **options)
        labelled(copies[1], tmp_path / "labels.zarr")
        return found

    monkeypatch.setattr("depthmill.pipeline.preview.open_datasets", opened)
    drawn = preview(tmp_path / "labels.zarr", tmp_path / "out", video=False)
    assert (len(drawn.files), drawn.left_out) == (1, {})


def test_a_video_of_one_frame_has_no_rate_and_needs_none(video, tmp_path):
    store = stores.create(tmp_path / "s", stores.Layout(shard_frames=2, segment_frames=2), {})
    source = open_source(video).probe()
    store.add(replace(source, frames=1, fps=None, time_s=source.time_s[:1]))
    assert drawn(store.uri, tmp_path / "out")


def test_smoothing_of_others_that_is_not_finished_is_no_hindrance(video, tmp_path):
    shutil.copy(video, tmp_path / "other.mp4")
    store = labelled(video, tmp_path / "s")
    store.add(open_source(tmp_path / "other.mp4").probe())
    done, begun = sorted(store.sources(), key=lambda name: not name.startswith("clip"))
    for name in (done, begun):
        Temporal(store, name).prepare(max_edge=1, flow="fast", leak=0.1, shape=(1, 5))
    ones = np.ones(FRAMES, np.float32)
    Temporal(store, done).write_solution(ones, 0 * ones, ones.astype(np.int32))
    assert drawn(store.uri, tmp_path / "one", source_id=done, smooth=True)
    assert len(drawn(store.uri, tmp_path / "both", smooth=True)) >= 3
    with pytest.raises(StoreError, match="not smoothed"):
        drawn(store.uri, tmp_path / "out", source_id=begun, smooth=True)
    (tmp_path / "s" / begun / "temporal" / "zarr.json").write_bytes(b"damaged")
    assert len(drawn(store.uri, tmp_path / "both", smooth=True)) >= 3


def test_colours():
    depth = np.float32([[0.2, 0.6, 1.0, np.nan, 0.0]])
    assert depth_rgb(depth, 0.2, 1.0)[0].tolist() == [
        list(SPECTRAL[0]),
        pytest.approx(SPECTRAL[5], abs=2),
        list(SPECTRAL[-1]),
        [GREY] * 3,
        list(SPECTRAL[0]),
    ]
    normals = np.float32([[[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [-1, 0, 0]]])
    assert normals_rgb(normals)[0].tolist() == [
        [255, 128, 128],
        [128, 255, 128],
        [128, 128, 255],
        [GREY] * 3,
        [0, 128, 128],
    ]


@pytest.mark.parametrize("written", ["_write_contact_sheet", "_write_video"])
def test_a_full_disk_ends_a_preview_and_is_not_put_down_to_labels(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    asked = []

    def full(*_: object) -> None:
        asked.append(written)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    labelled(video, tmp_path / "store.zarr").add(open_source(shutil.copy(video, tmp_path / "more.mp4")).probe())
    monkeypatch.setattr(f"depthmill.pipeline.preview.{written}", full)
    with pytest.raises(RunStoppedError, match=rf"^{tmp_path / 'out'} cannot be written: the disk is full"):
        preview(tmp_path / "store.zarr", tmp_path / "out")
    assert len(asked) == 1


def test_a_video_that_was_being_drawn_is_no_input(tmp_path: Path) -> None:
    """What is there while it is, is there if it is killed."""
    there: list[Path] = []

    def frames() -> Iterator[tuple[float, np.ndarray]]:
        for index in range(100):  # the encoder looks ahead before it writes any
            yield index / 25, np.zeros((H, W, 3), np.uint8)
            there.extend(tmp_path.iterdir())

    write_mp4(tmp_path / preview_name("clip", ".mp4"), frames(), (W, H), Fraction(25), Fraction(1))
    assert there
    for path in (*there, tmp_path / "real.mp4"):
        path.touch()
    for one in (tmp_path, f"{tmp_path}/*.mp4", f"{tmp_path}/**"):
        assert list(expand_inputs([str(one)])) == [str(tmp_path / "real.mp4")]
    assert list(expand_inputs([f"{tmp_path}/.*.mp4"])) == [f"{tmp_path}/.*.mp4"], "nothing"
