import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel
from transformers.utils import logging as transformers_logging

import depthmill
from depthmill.pipeline.config import LabelConfig
from depthmill.pipeline.errors import CheckpointError, ConfigError
from depthmill.pipeline.model import scratch
from depthmill.pipeline.model.backend import cpu_kind
from depthmill.pipeline.model.checkpoint import Description, open_checkpoint
from depthmill.pipeline.model.labeler import Labeler, open_checkpoints
from depthmill.pipeline.model.single_step import SingleStep, decode_normals, load_heads
from depthmill.pipeline.store import layout
from depthmill.pipeline.types import CORPUS_PICTURES, Source
from depthmill.tests.media import noise


def test_labels_of_a_batch(labeler):
    labels = labeler(noise(3, 40, 56, 3))
    assert labels.depth.shape == (3, 40, 56)
    assert labels.normals.shape == (3, 40, 56, 3)
    assert labels.depth.dtype == labels.normals.dtype == np.float32
    assert labels.depth.min() >= 0
    assert labels.depth.max() <= 1
    assert np.allclose(np.linalg.norm(labels.normals, axis=-1), 1, atol=1e-5)


def test_it_is_what_the_package_offers(checkpoints):
    assert depthmill.Labeler is Labeler
    assert Labeler.from_pretrained(checkpoints / "depth", device="cpu")(noise(1, 8, 8, 3)).normals is None


@pytest.mark.parametrize("labels", [("depth", "normals"), ("normals",)])
def test_normals_want_a_checkpoint_of_their_own(checkpoints, labels):
    with pytest.raises(ConfigError, match=r"only a depth checkpoint.*normals_checkpoint .*evaluate --checkpoint"):
        open_checkpoints(LabelConfig(checkpoint=str(checkpoints / "depth"), labels=labels))


def test_a_normals_checkpoint_alone_does_not_bring_in_the_demo_s_depth(checkpoints):
    normals = str(checkpoints / "normals")
    with pytest.raises(ConfigError, match=r"demonstration model.*--labels normals"):
        Labeler.from_pretrained(normals_checkpoint=normals)
    (opened,) = open_checkpoints(LabelConfig(normals_checkpoint=normals, labels=("normals",)))
    assert opened.name == normals
    assert len(open_checkpoints(LabelConfig(normals_checkpoint="demo"))) == 2


def test_a_frame_has_the_same_labels_in_any_company(labeler):
    frames = noise(5, 33, 48, 3)
    together = labeler(frames).depth
    alone = np.concatenate([labeler(frame[None]).depth for frame in frames])
    assert np.allclose(together, alone, atol=1e-4)
    assert not np.allclose(together[0], together[1], atol=1e-3)


def test_frames_of_several_sizes_share_a_batch(labeler):
    sizes = [(40, 60), (80, 120), (41, 60), (39, 60)]
    frames = [noise(*size, 3, seed=i) for i, size in enumerate(sizes)]
    assert len({labeler.processed_size(*size) for size in sizes}) == 2
    assert len({labeler.batch_shape(*size) for size in sizes}) == 1
    for frame, labels in zip(frames, labeler.label(frames), strict=True):
        assert labels.depth.shape == (1, *frame.shape[:2])
        assert np.allclose(labels.depth, labeler(frame[None]).depth, atol=1e-4)


def test_a_rounded_frame_is_labelled_as_if_it_were_resized(labeler):
    frame = noise(40, 51, 3)  # 37x48 for the network, 36x48 rounded
    assert labeler.batch_shape(40, 51, rounded=True) == labeler.processed_size(40, 51, rounded=True) == (36, 48)
    (rounded,) = labeler.label([frame], rounded=True)
    picture = torch.from_numpy(frame).permute(2, 0, 1)[None] / 127.5 - 1
    resized = torch.nn.functional.interpolate(picture, (36, 48), mode="bilinear", antialias=True)
    with torch.inference_mode():
        answer = labeler._network(resized)["depth"]
    expected = torch.nn.functional.interpolate(answer, (40, 51), mode="bilinear")[:, 0].numpy()
    assert np.allclose(rounded.depth, expected, atol=1e-4)
    (exact,) = labeler.label([frame])
    assert not np.allclose(rounded.depth, exact.depth, atol=1e-3)


@pytest.mark.parametrize(
    ("said", "kind", "frames", "rounds"),
    [
        (None, "images", CORPUS_PICTURES, True),
        (None, "images", CORPUS_PICTURES - 1, False),
        (None, "webdataset", 1, True),
        (None, "video", 10**6, False),
        (True, "images", 1, True),
        (True, "video", 10**6, False),
        (False, "webdataset", 10**6, False),
    ],
)
def test_what_is_rounded_is_the_source_s_and_the_config_s_to_say(labeler, monkeypatch, said, kind, frames, rounds):
    monkeypatch.setattr(labeler, "round_aspect", said)
    assert labeler.rounds(Source("s", "/s", kind, frames, 9, 9, None, "f")) is rounds


@pytest.mark.parametrize("shape", [(0, 8, 8), (1, 1, 1), (1, 1, 300), (1, 300, 1)])
def test_odd_sizes(labeler, shape):
    labels = labeler(noise(*shape, 3))
    assert labels.depth.shape == shape
    assert np.isfinite(labels.normals).all()


@pytest.mark.parametrize(
    "frames", [np.zeros((8, 8, 3), np.uint8), np.zeros((1, 8, 8, 3)), np.zeros((1, 3, 8, 8), np.uint8)]
)
def test_other_arrays_are_refused(labeler, frames):
    with pytest.raises(ValueError, match=r"expected uint8 \(B, H, W, 3\)"):
        labeler(frames)


@pytest.mark.parametrize("frames", [[noise(8, 8, 3)], Image.fromarray(noise(8, 8, 3)), torch.zeros(1, 8, 8, 3)])
def test_what_is_no_array_is_refused_by_name(labeler, frames):
    with pytest.raises(TypeError, match=rf"frames is of {type(frames)}; expected a NumPy array, uint8"):
        labeler(frames)


def test_loading_shows_no_bars_and_leaves_those_of_others(checkpoints, capfd):
    transformers_logging.enable_progress_bar()  # an earlier test may have run a command in this process
    Labeler.from_pretrained(checkpoints / "depth", device="cpu")
    assert capfd.readouterr().err == ""
    CLIPTextModel.from_pretrained(checkpoints / "depth" / "text_encoder")
    assert "Loading weights" in capfd.readouterr().err


def test_normals_come_out_in_the_stored_axes_whatever_the_checkpoint_answers(checkpoints, labeler):
    frames = noise(1, 32, 48, 3)
    stored = labeler(frames).normals
    for axes, signs in (("left-up-towards", (-1, 1, 1)), ("right-down-away", (1, -1, -1))):
        mirrored = Labeler.from_pretrained(
            checkpoints / "depth", checkpoints / "normals", device="cpu", normals_axes=axes
        )
        assert np.allclose(mirrored(frames).normals, stored * np.float32(signs), atol=1e-6)


def test_a_known_direction(tmp_path):
    """A decoder that says (1, 0, 0) everywhere, in E2E-FT's axes, means a surface that faces left."""
    parts = scratch.build(scratch.Architecture(vae_channels=(8, 16)), seed=0)
    parts.vae.decoder.conv_out.weight.data.zero_()
    parts.vae.decoder.conv_out.bias.data = torch.tensor([1.0, 0.0, 0.0])
    scratch.save(parts, tmp_path / "n", "normals", processing_resolution=32)
    scratch.save(parts, tmp_path / "d", "depth", processing_resolution=32)
    labeler = Labeler.from_pretrained(tmp_path / "d", tmp_path / "n", device="cpu", normals_axes="left-up-towards")
    labels = labeler(noise(1, 16, 24, 3))
    assert np.allclose(labels.normals, [-1, 0, 0])
    assert np.allclose(labels.depth, (1 / 3 + 1) / 2)  # the mean of the channels, from [-1, 1] to [0, 1]


@pytest.mark.parametrize(
    ("said", "decoded"),
    [
        ({}, (1, 0.5, -0.2)),
        ({"clip_normals": False}, (3, 0.5, -0.2)),
        ({"full_z_range": False}, (1, 0.5, 0.4)),
        ({"clip_normals": False, "full_z_range": False, "normals_axes": "left-up-away"}, (-3, 0.5, -0.4)),
    ],
)
def test_normals_are_decoded_as_the_checkpoint_says(said, decoded):
    answer = decode_normals(torch.tensor([3.0, 0.5, -0.2]).view(1, 3, 1, 1), Description(**said))[0, :, 0, 0]
    torch.testing.assert_close(answer, torch.nn.functional.normalize(torch.tensor(decoded), dim=0))


def test_a_labeler_has_all_options_of_a_run(checkpoints):
    names = {"checkpoint": str(checkpoints / "depth"), "labels": ("depth",), "device": "cpu", "dtype": "float32"}
    options = {"processing_resolution": 40, "batch_size": 3, "round_aspect": False, "noise": "gaussian", "seed": 5}
    config = LabelConfig(**names, **options)
    labeler = Labeler(open_checkpoints(config), config)
    found = (labeler.processing_resolution, labeler.batch_size, labeler.round_aspect, labeler.sampling)
    assert found == (40, 3, False, config.sampling)


def test_the_first_checkpoint_says_the_resolution(checkpoints):
    depth, normals = (open_checkpoint(str(checkpoints / name), name) for name in ("depth", "normals"))
    labeler = Labeler([depth, replace(normals, processing_resolution=64)], LabelConfig(device="cpu"))
    assert labeler.processing_resolution == 48


def test_no_picture_is_rescaled_by_its_own_range(labeler):
    depth = labeler(noise(2, 32, 48, 3)).depth
    assert depth.min() > 0
    assert depth.max() < 1


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon", "sample"])
def test_a_unet_that_takes_the_picture_alone(tmp_path, prediction):
    scratch.create(
        tmp_path,
        scratch.Architecture(),
        "depth",
        seed=0,
        in_channels=4,
        prediction_type=prediction,
        processing_resolution=32,
    )
    frames = noise(1, 32, 32, 3)
    labeler = Labeler.from_pretrained(tmp_path, device="cpu")
    with torch.inference_mode():
        (head,) = load_heads(labeler.checkpoints)
        vae, unet = head.vae, head.unet
        picture = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
        latent = vae.encode(picture).latent_dist.mean * vae.config.scaling_factor
        out = unet(latent, 999, encoder_hidden_states=head.prompt).sample
        alpha = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)[-1]
        factor = {"v_prediction": -((1 - alpha) ** 0.5), "epsilon": -(((1 - alpha) / alpha) ** 0.5), "sample": 1.0}
        decoded = vae.decode(out * factor[prediction] / vae.config.scaling_factor).sample
    assert np.allclose(labeler(frames).depth, (decoded.mean(1).clip(-1, 1) + 1) / 2, atol=1e-4)


def test_parts_of_different_checkpoints(checkpoints, tmp_path):
    path = shutil.copytree(checkpoints / "depth", tmp_path / "depth")
    scratch.create(tmp_path / "other", scratch.Architecture(cross_attention_dim=16), "depth", seed=0)
    shutil.rmtree(path / "text_encoder")
    shutil.copytree(tmp_path / "other" / "text_encoder", path / "text_encoder")
    with pytest.raises(CheckpointError, match=r"prompts of width 32.*16 wide"):
        Labeler.from_pretrained(path, device="cpu")


def test_a_damaged_weight_changes_the_labels(checkpoints, tmp_path, labeler):
    """That the labels depend on the decoder's last layer, so that the other tests can see a wrong one."""
    path = shutil.copytree(checkpoints / "depth", tmp_path / "depth")
    weights = load_file(path / "vae" / "diffusion_pytorch_model.safetensors")
    weights["decoder.conv_out.bias"] += 0.1
    save_file(weights, path / "vae" / "diffusion_pytorch_model.safetensors")
    frames = noise(1, 32, 48, 3)
    moved = Labeler.from_pretrained(path, device="cpu")(frames).depth - labeler(frames).depth
    assert np.allclose(moved, 0.05, atol=1e-5)


@pytest.mark.parametrize("packing", ["int8", "int16", "float16"])
def test_labels_packed_by_the_labeler_are_those_that_a_store_packs(labeler, packing):
    frames = [noise(40, 56, 3), noise(80, 112, 3, seed=1)]
    for plain, packed in zip(labeler.label(frames), labeler.label(frames, packing=packing), strict=True):
        assert np.array_equal(packed.depth, layout.pack_depth(plain.depth))
        assert np.array_equal(packed.normals, layout.pack_normals(plain.normals, packing))
        assert (packed.depth.dtype, packed.normals.dtype) == (np.uint16, packing)
        assert plain.normals.flags.c_contiguous
        assert np.moveaxis(packed.normals, 3, 1).flags.c_contiguous, "as it is compressed: without a copy"


def test_submitted_labels_are_those_of_label(labeler):
    batches = [list(noise(2, 40, 56, 3, seed=seed)) for seed in range(3)]
    pending = [labeler.submit(batch) for batch in batches]
    for batch, one in zip(batches, pending, strict=True):
        for labels, expected in zip(one.result(), labeler.label(batch), strict=True):
            assert np.array_equal(labels.depth, expected.depth)
            assert np.array_equal(labels.normals, expected.normals)


def test_nothing_submitted_is_nothing(labeler):
    assert labeler.submit([]).result() == []


def test_the_backend_in_words(labeler):
    assert labeler.backend == f"cpu ({cpu_kind()}), float32, batches of 8, not compiled"


def test_a_network_is_compiled_if_that_is_asked_for(checkpoints):
    one = Labeler.from_pretrained(checkpoints / "depth", device="cpu", dtype="float32", compile="on")
    assert one.backend == f"cpu ({cpu_kind()}), float32, batches of 8, compiled"


@pytest.mark.parametrize(("resolution", "frames"), [(64, 8), (1024, 4), (4096, 1)])
def test_a_cpu_s_batches_are_smaller_where_frames_are_large(checkpoints, resolution, frames):
    """The VAE's widest tensor at a frame's own size has 16 channels: 64 MiB of float32 at 1024x1024."""
    alone = Labeler.from_pretrained(
        checkpoints / "depth", device="cpu", dtype="float32", processing_resolution=resolution
    )
    assert alone.batch_size == frames


def test_a_network_of_parts_that_are_not_known_runs_as_it_is(checkpoints, labeler, monkeypatch):
    monkeypatch.setattr("depthmill.pipeline.model.labeler.can_specialize", lambda head: False)
    plain = Labeler.from_pretrained(checkpoints / "depth", device="cpu", dtype="float32")
    assert isinstance(plain._network, SingleStep)
    frames = noise(2, 40, 56, 3)
    assert np.abs(plain(frames).depth - labeler(frames).depth).max() < 1e-4


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((48, 64, 3), np.float32),
        np.zeros((48, 64, 3), np.uint16),
        np.zeros((48, 64), np.uint8),
        np.zeros((48, 64, 4), np.uint8),
        np.zeros((0, 64, 3), np.uint8),
        [[[0, 0, 0]]],
    ],
)
def test_what_is_no_frame_is_refused_among_frames(labeler, frame):
    with pytest.raises(ValueError, match=r"expected .*uint8 \(H, W, 3\)"):
        labeler.label([np.zeros((48, 64, 3), np.uint8), frame])


def test_frames_of_two_batch_shapes_are_refused(labeler):
    with pytest.raises(ValueError, match="batch shapes"):
        labeler.label([np.zeros((48, 64, 3), np.uint8), np.zeros((64, 48, 3), np.uint8)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_caller_s_autocast_rounds_no_labels(checkpoints, labeler, dtype):
    frames = np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), np.uint8)
    expected = labeler(frames)
    with torch.autocast("cpu", dtype=dtype):
        paths = checkpoints / "depth", checkpoints / "normals"
        loaded = Labeler.from_pretrained(*paths, device="cpu", dtype="float32")
        found = [labeler(frames), loaded(frames)]
    for labels in found:
        np.testing.assert_array_equal(labels.depth, expected.depth)
        np.testing.assert_array_equal(labels.normals, expected.normals)


@pytest.mark.parametrize(
    "options",
    [{}, {"steps": 2, "ensemble": 3, "noise": "gaussian"}, {"timestep_spacing": "leading", "noise": "pyramid"}],
)
def test_a_caller_s_default_dtype_changes_no_labels(checkpoints, options):
    def load():
        paths = checkpoints / "depth", checkpoints / "normals"
        return Labeler.from_pretrained(*paths, device="cpu", dtype="float32", **options)

    frames, labeler = noise(2, 40, 56, 3), load()
    expected = labeler(frames)
    torch.set_default_dtype(torch.float64)
    try:
        found = [labeler(frames), load()(frames)]
    finally:
        torch.set_default_dtype(torch.float32)
    for labels in found:
        for name in ("depth", "normals", "uncertainty"):
            np.testing.assert_array_equal(getattr(labels, name), getattr(expected, name))


@pytest.mark.parametrize(
    "options",
    [{}, {"steps": 2, "ensemble": 3, "noise": "gaussian"}, {"timestep_spacing": "leading", "noise": "pyramid"}],
)
def test_a_caller_s_default_device_changes_no_labels(checkpoints, options):
    def load():
        paths = checkpoints / "depth", checkpoints / "normals"
        return Labeler.from_pretrained(*paths, device="cpu", dtype="float32", **options)

    frames, labeler = noise(2, 40, 56, 3), load()
    expected = labeler(frames)
    torch.set_default_device("meta")
    try:
        found = [labeler(frames), load()(frames)]
    finally:
        torch.set_default_device(None)
    for labels in found:
        for name in ("depth", "normals", "uncertainty"):
            np.testing.assert_array_equal(getattr(labels, name), getattr(expected, name))
