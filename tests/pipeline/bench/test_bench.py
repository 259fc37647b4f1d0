"""What `depthmill bench` counts and measures, on random weights."""

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path
from unittest.mock import Mock

import diffusers
import pytest
import torch
from PIL import Image

from depthmill.pipeline.bench import feed, peers
from depthmill.pipeline.bench.bench import BATCHED, DOCUMENTED, MATMUL, OURS, bench, machine
from depthmill.pipeline.bench.flops import label_flops, network_flops
from depthmill.pipeline.config import DEMO, LabelConfig
from depthmill.pipeline.errors import SourceError
from depthmill.pipeline.model.checkpoint import open_checkpoint
from depthmill.pipeline.model.labeler import Labeler
from depthmill.pipeline.worker import Worker
from depthmill.tests import media

ROOT = Path(__file__).resolve().parents[3]


def load(name):
    """A benchmark as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True, scope="module")
def _little():
    """Operations are counted once for each network and size; the matrices of the peak are small."""
    known = {}

    def counted(*given, **options):
        key = repr((given, options))
        if key not in known:
            known[key] = network_flops(*given, **options)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("depthmill.pipeline.bench.flops.network_flops", counted)
        patch.setattr("depthmill.pipeline.bench.flops._MATRIX", {"cpu": 256})
        yield


@pytest.fixture
def config(checkpoints):
    return LabelConfig(
        checkpoint=str(checkpoints / "depth"),
        normals_checkpoint=str(checkpoints / "normals"),
        device="cpu",
        batch_size=2,
        threads=1,
    )


def test_operations_of_stable_diffusion_2_are_those_that_were_counted_by_hand():
    parts = load("speed").STABLE_DIFFUSION_2
    from depthmill.pipeline.model import scratch

    with torch.device("meta"):
        vae, unet = scratch.build_vae(parts), scratch.build_unet(parts)
    weights = [sum(weight.numel() for weight in module.parameters()) for module in (vae, unet)]
    assert weights == pytest.approx([84e6, 866e6], rel=0.01)
    counted = network_flops(dict(vae.config), dict(unet.config), 576, 768)
    assert dataclasses.astuple(counted) == pytest.approx((1.92e12, 1.50e12, 4.28e12), rel=0.01)


def test_an_encoder_that_two_labels_share_is_counted_once(checkpoints):
    depth, normals = (open_checkpoint(str(checkpoints / name), name) for name in ("depth", "normals"))
    configs = [
        kind.load_config(depth.directory / part)
        for kind, part in ((diffusers.AutoencoderKL, "vae"), (diffusers.UNet2DConditionModel, "unet"))
    ]
    one = network_flops(*configs, 32, 48)
    assert label_flops([depth], 32, 48) == one.encode + one.unet + one.decode
    assert label_flops([depth, normals], 32, 48) == one.encode + 2 * (one.unet + one.decode)


def test_bench_measures_the_labeler_its_peers_and_the_feed(config, tmp_path):
    clip = media.write_video(tmp_path / "clip.mp4", frames=6)
    report = bench(config, str(clip), frames=4, rounds=2, folder=tmp_path)
    assert set(report.speed.spent) == {OURS, DOCUMENTED, BATCHED, MATMUL}
    assert all(one.wall_s > 0 and one.cpu_s > 0 for times in report.speed.spent.values() for one in times)
    assert report.batch == (2, 36, 48)
    assert 0 < report.speed.share.low <= report.speed.share.high
    measured, verdict = report.feed
    assert min(measured.decode.wall_s, measured.label.wall_s, measured.write.wall_s) > 0
    assert measured.fill == 1
    assert f"{measured.share:.3f} of the labeler's alone, batches 100% full" in str(report)
    assert measured.bytes > 0
    assert verdict.bound in str(report)
    assert list(tmp_path.iterdir()) == [clip], "temporary stores were left behind"


def test_what_is_measured_is_what_a_run_does(config, tmp_path, monkeypatch):
    """A corpus, of which few pictures are read: at rounded aspect ratios, in its own segments, in full batches."""
    sizes = [(51, 40)] + [(40, 51)] * 3 + [(30, 51)] * 2
    for index, size in enumerate(sizes):
        Image.new("RGB", size, (index, 0, 0)).save(tmp_path / f"{index}.png")
    monkeypatch.setattr("depthmill.pipeline.types.CORPUS_PICTURES", len(sizes))
    monkeypatch.setattr(LabelConfig, "segment_lengths", (64, 2048))  # which is a GPU's
    asked, layouts = [], []
    submit, create = Labeler.submit, feed.create

    def asking(labeler, frames, keys=None, **options):
        if keys is None:  # not the whole run, the batches of which are as they come
            asked.append((len(frames), options))
        return submit(labeler, frames, keys, **options)

    monkeypatch.setattr(Labeler, "submit", asking)
    monkeypatch.setattr(
        feed, "create", lambda folder, layout, *rest: layouts.append(layout) or create(folder, layout, *rest)
    )
    bench(config.model_copy(update={"batch_size": 3}), str(tmp_path), frames=2, rounds=1, folder=tmp_path.parent)
    assert {frames for frames, _ in asked} == {3}
    assert {options["rounded"] for _, options in asked if options} == {True}
    assert {layout.segment_frames for layout in layouts} == {2048}


def test_without_an_input_there_is_no_feed(config):
    report = bench(config.model_copy(update={"labels": ("depth",)}), rounds=1)
    assert report.feed is None
    assert "give --input" in str(report)
    assert "what helps: a faster device" in str(report)
    assert "compiled" not in str(report)


def test_float32_on_cuda_says_what_it_is_of_all_alternatives(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "H100")
    assert "cuda (H100), float32 without TF32, diffusers too, torch" in machine(torch.device("cuda"), torch.float32)
    assert "cuda (H100), bfloat16, torch" in machine(torch.device("cuda"), torch.bfloat16)


def test_diffusers_has_smaller_batches_where_the_labeler_leaves_it_no_memory(config):
    labeler = Labeler([open_checkpoint(config.checkpoint, "depth")], config)
    tried = []

    def small_gpu(images, batch_size, **options):
        tried.append((len(images), batch_size))
        if batch_size > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    run = peers.batched([small_gpu], labeler, media.noise(5, 16, 24, 3))
    assert [run(), run()] == [5, 5]
    assert tried == [(5, 5), (5, 2), (5, 1), (5, 1)]


def test_diffusers_at_its_best_is_compiled_and_who_runs_so_is_told(config, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # where it notes what was compiled
    modules = []
    monkeypatch.setattr("torch.compile", lambda module, **options: modules.append(module) or module)
    report = bench(config.model_copy(update={"labels": ("depth",), "compile": "on"}), rounds=1, compiled=True)
    assert len(modules) == 4, "the labeler's network; UNet, encoder, decoder"
    assert "seen at 48x36, compiled; with --compile auto a run's first 5,000" in str(report)
    assert "called in batches, compiled" in str(report)


def test_a_whole_run_goes_through_all_segments_and_begins_the_next_before_a_commit(config, tmp_path, monkeypatch):
    asked = []
    label = Worker.label
    monkeypatch.setattr(
        Worker,
        "label",
        lambda worker, *tasks: asked.append([task.segment.start for task in tasks]) or label(worker, *tasks),
    )
    clip = media.write_video(tmp_path / "clip.mp4", frames=9)
    small = config.model_copy(update={"shard_frames": 4, "segment_frames": 4, "labels": ("depth",)})
    bench(small, str(clip), frames=12, rounds=1)
    assert asked == [[0, 0], [0, 4], [4, 8], [8, 0]]


@pytest.mark.parametrize("given", ["", "*.mp4", "{clip,other}.mp4"])
def test_of_several_inputs_the_first_is_used(given, config, tmp_path, monkeypatch):
    """A folder of videos is what `label` is given as well."""
    media.write_video(tmp_path / "clip.mp4", frames=4)
    opened = []
    monkeypatch.setattr("depthmill.pipeline.bench.bench.open_source", lambda uri, **_: opened.append(uri) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench(config, str(tmp_path / given), rounds=1)
    assert opened == [str(tmp_path / "clip.mp4")]


def test_an_input_without_frames_is_refused(config, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(SourceError, match=r"broken\.png"):
        bench(config, str(tmp_path / "broken.png"), rounds=1)


def test_checkpoints_that_diffusers_cannot_use_say_why(tmp_path):
    from depthmill.pipeline.model import scratch

    architecture = scratch.Architecture(vae_channels=(8, 16), unet_channels=(16, 32), head_channels=8)
    scratch.create(tmp_path / "depth", architecture, "depth", seed=0, in_channels=4, processing_resolution=48)
    config = LabelConfig(checkpoint=str(tmp_path / "depth"), labels=("depth",), device="cpu", batch_size=1, threads=1)
    report = bench(config, rounds=1)
    assert "takes no noise" in report.speed.why_not
    assert report.speed.why_not in str(report)
    assert set(report.speed.spent) == {OURS, MATMUL}
    joint = dataclasses.replace(open_checkpoint(str(tmp_path / "depth"), "depth"), domain="indoor")
    assert "joint" in peers.why_not(joint)


def test_the_benchmark_writes_its_section_and_leaves_the_others(tmp_path, monkeypatch):
    out, module = tmp_path / "speed.md", load("speed")
    out.write_text("\n## sd2, cpu\n\nas it was\n")
    monkeypatch.setattr(module, "cores", lambda: 1)  # more would wait for each other
    module.main(["--sizes", "small", "--labels", "depth", "--quick", "--device", "cpu", "--out", str(out)])
    text = out.read_text()
    assert "as it was" in text
    assert "| depth | float32 |" in text
    assert "steps, 3 members, diffusers" in text


def test_without_depth_no_ensembles_of_it_are_timed():
    assert not load("speed").many_steps({"normals": DEMO}, [], torch.device("cpu"), "float32", True)


def test_what_the_papers_benchmark_keeps_is_whole(tmp_path, monkeypatch):
    """A run that is begun again takes it for done."""
    module = load("paper/paper")
    paper = module.Paper({"threads": 1}, tmp_path)
    monkeypatch.setattr(paper, "_score", lambda *asked: {"angle": [1.0]})
    monkeypatch.setattr("os.fsync", Mock(side_effect=OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        paper.figures(module.Way("few", "few", {}), "normals")
    assert not list((tmp_path / "results").iterdir())


@pytest.mark.slow
def test_the_startup_benchmark_writes_its_table(tmp_path):
    out = tmp_path / "startup.md"
    load("startup").main(["--quick", "--out", str(out)])
    assert "| rerun of a finished job | " in out.read_text()


def test_the_feed_benchmark_makes_its_tables(capsys):
    load("feed").main(["--quick"])
    costs, busy, *paths = (
        [float(value) for value in re.findall(r"(?<=\| )\d+\.\d+", line)]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("| 128x96 |")
    )
    assert len(paths) == 2, "decoded by one thread, and by one a core"
    assert all(value > 0 for row in (costs, busy, *paths) for value in row)
    assert busy[1] <= 1, "one segment at a time, no run is faster than its device"


@pytest.mark.slow
def test_the_length_benchmark_writes_its_table(tmp_path):
    out = tmp_path / "length.md"
    load("length").main(["--quick", "--out", str(out)])
    assert "for 2,560 frames" in out.read_text()
    assert "frames a second of CPU time" in out.read_text()
