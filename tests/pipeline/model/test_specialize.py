"""The folded network against the plain one: small random networks of every shape that Stable Diffusion has come in."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from depthmill.pipeline.model.checkpoint import Description
from depthmill.pipeline.model.single_step import Head, SingleStep
from depthmill.pipeline.model.specialize import Specialized, can_specialize

CPU = torch.device("cpu")
DOWN, CROSS_DOWN, UP, CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"


def unet(**options):
    settings = {
        "in_channels": 8,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": (CROSS_DOWN, DOWN),
        "up_block_types": (UP, CROSS_UP),
        "attention_head_dim": (2, 4),
        "cross_attention_dim": 24,
        "norm_num_groups": 8,
        "use_linear_projection": True,
    }
    return UNet2DConditionModel(**settings | options)


def vae(**options):
    settings = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "scaling_factor": 0.3,
    }
    return AutoencoderKL(**settings | options)


def head(modality="depth", *, unet_options=None, vae_options=None, tokens=2, x0_factor=-0.9, x0_clip=None, seed=0):
    """A head whose every weight is random: diffusers starts some at 0 or 1, where a fold could be wrong unseen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules = unet(**unet_options or {}).eval(), vae(**vae_options or {}).eval()
        for module in modules:
            for name, parameter in module.named_parameters():
                noise = torch.randn_like(parameter) * 0.1
                parameter.data = parameter.data + noise if parameter.ndim > 1 or "norm" in name else noise
        prompt = torch.randn(1, tokens, modules[0].config.cross_attention_dim)
    # Vectors around zero have no direction: real normals face the camera, and so do these.
    modules[1].decoder.conv_out.bias.data = torch.tensor([0.5, 1.0, 3.0] if modality == "normals" else [0.1, -0.2, 0.3])
    return Head(modality, modules[1], modules[0], prompt, None, 999, x0_factor, x0_clip, Description())


def pictures(batch=2, height=20, width=28):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def errors(heads, batch, dtype=torch.float32):
    plain = SingleStep(heads, CPU, torch.float32)(batch)
    folded = Specialized(deepcopy(heads), CPU, dtype)(batch)
    assert plain.keys() == folded.keys()
    for modality, labels in plain.items():
        assert labels.std() > 1e-3, "a constant answer would agree with anything"
        assert folded[modality].shape == labels.shape
    return [(folded[modality] - labels).abs().max().item() for modality, labels in plain.items()]


SHAPES = {
    "stable diffusion 2": {},
    "1.5: convolutions around attention, heads by their number": {
        "use_linear_projection": False,
        "attention_head_dim": 4,
    },
    "the picture alone": {"in_channels": 4},
    "two transformers a block, three layers": {"transformer_layers_per_block": 2, "layers_per_block": 3},
    "attention below": {"down_block_types": (DOWN, CROSS_DOWN), "up_block_types": (CROSS_UP, UP)},
    "three levels": {
        "block_out_channels": (16, 32, 32),
        "down_block_types": (CROSS_DOWN, CROSS_DOWN, DOWN),
        "up_block_types": (UP, CROSS_UP, CROSS_UP),
        "attention_head_dim": (2, 4, 4),
    },
    "time that scales": {"resnet_time_scale_shift": "scale_shift"},
    "time without activation": {"resnet_skip_time_act": True, "time_embedding_act_fn": "silu"},
    "scaled blocks": {"mid_block_scale_factor": 1.4},
}


@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_plain_network(name):
    one = head(unet_options=SHAPES[name])
    assert can_specialize(one)
    assert max(errors([one], pictures())) < 1e-4


@pytest.mark.parametrize(
    "options",
    [{}, {"mid_block_add_attention": False}, {"use_quant_conv": False, "use_post_quant_conv": False}],
    ids=["as it is", "no attention", "no quantisation"],
)
def test_autoencoders(options):
    assert max(errors([head(vae_options=options)], pictures())) < 1e-4


@pytest.mark.parametrize("tokens", [1, 2, 3, 77])
def test_prompts_of_any_length(tokens):
    assert max(errors([head(tokens=tokens)], pictures())) < 1e-4


def test_a_scheduler_that_clips_x0():
    clipped, free = head(x0_clip=0.05), head()
    assert max(errors([clipped], pictures())) < 1e-4
    one, other = (SingleStep([kind], CPU, torch.float32)(pictures()) for kind in (clipped, free))
    assert (one["depth"] - other["depth"]).abs().max() > 1e-2, "the clipping must show"


@pytest.mark.parametrize("size", [(2, 2), (22, 30), (36, 20)])
def test_sizes_that_the_unet_does_not_halve_evenly(size):
    assert max(errors([head(unet_options=SHAPES["three levels"])], pictures(1, *size))) < 1e-4


@pytest.mark.parametrize("network", [SingleStep, Specialized])
@pytest.mark.parametrize("width", [2, 4, 8])
def test_bfloat16_of_pictures_so_tall_that_one_column_is_left_of_them(network, width):
    """There oneDNN's convolutions of stride 2 are wrong on CPUs with AMX."""
    one, batch = head(unet_options=SHAPES["three levels"]), pictures(2, 192, width)
    exact = SingleStep([deepcopy(one)], CPU, torch.float32)(batch)["depth"]
    assert (network([one], CPU, torch.bfloat16)(batch)["depth"] - exact).abs().mean() < 0.02


@pytest.mark.parametrize("shared", [True, False])
def test_two_modalities(shared):
    depth, normals = head(), head("normals", seed=1)
    if shared:
        depth = Head("depth", normals.vae, *list(depth.__dict__.values())[2:])
    network = Specialized(deepcopy([depth, normals]), CPU, torch.float32)
    assert len(network.folded.encoders) == len(network.folded.decoders) == (1 if shared else 2)
    assert max(errors([depth, normals], pictures())) < 1e-4


@pytest.mark.parametrize("x0_clip", [None, 0.05])
def test_two_modalities_of_one_unet_but_for_its_last_convolution(x0_clip):
    normals = head("normals", x0_clip=x0_clip)
    other = deepcopy(normals.unet)
    other.conv_out = head(seed=1).unet.conv_out
    depth = replace(normals, modality="depth", unet=other, x0_factor=-0.8)

    def unets(*heads):
        return len(Specialized(deepcopy(list(heads)), CPU, torch.float32).folded.denoisers)

    assert unets(depth, normals) == 1
    assert max(errors([depth, normals], pictures())) < 1e-4
    assert unets(depth, replace(normals, prompt=normals.prompt + 1)) == 2
    assert unets(depth, replace(normals, timestep=0)) == 2
    assert unets(depth, replace(normals, x0_clip=0.1)) == 2
    assert unets(depth, replace(normals, vae=deepcopy(depth.vae))) == 2
    other.conv_norm_out.bias.data[0] += 1
    assert unets(depth, normals) == 2
    assert max(errors([depth, normals], pictures())) < 1e-4


def test_it_has_less_to_compute():
    """Nothing is left of the time step, the prompt and the quantisation, and no second copy of anything."""
    plain, folded = SingleStep([head()], CPU, torch.float32), Specialized([head()], CPU, torch.float32)

    def flops(network):
        with FlopCounterMode(display=False) as counter:
            network(pictures())
        return counter.get_total_flops()

    weights = [sum(one.numel() for one in network.parameters()) for network in (plain, folded)]
    assert weights[1] < weights[0]
    assert flops(folded) < 0.95 * flops(plain)
    names = [name for name, _ in folded.folded.denoisers.named_parameters()]
    assert not [name for name in names if "time" in name or "to_k" in name or "quant" in name]


@pytest.mark.parametrize(
    "options",
    [
        {"only_cross_attention": True},
        {"dual_cross_attention": True},
        {"center_input_sample": True},
        {"cross_attention_norm": "layer_norm"},
        {"mid_block_type": "UNetMidBlock2D"},
        {"down_block_types": (CROSS_DOWN, "AttnDownBlock2D")},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_networks_are_left_alone(options):
    assert not can_specialize(head(unet_options=options))


def test_torch_s_generator_is_left_alone():
    one = head()
    state = torch.get_rng_state()
    Specialized([one], CPU, torch.float32)
    assert torch.equal(state, torch.get_rng_state())


def test_float16_that_overflows_is_done_again_in_float32(caplog):
    one = head()
    one.vae.decoder.conv_in.weight.data *= 1e5  # finite in float16 themselves; what follows is normalised
    batch = pictures()
    network = Specialized([deepcopy(one)], CPU, torch.float16)
    assert not network.folded(batch)[0].isfinite().all()
    assert network(batch)["depth"].isfinite().all()
    assert "float16 overflows" in caplog.text
    assert max(errors([one], batch, torch.float16)) < 1e-2
    some = network.folded(batch)[0].detach()
    some[0] = 0.5
    finite, again = network._without_overflow(batch, [some])[0]
    assert (finite == 0.5).all()
    assert again.isfinite().all(), "whatever the pictures beside it do"


@pytest.mark.parametrize("modality", ["depth", "normals"])
@pytest.mark.parametrize(
    ("dtype", "networks"), [(torch.bfloat16, 6), pytest.param(torch.float16, 24, marks=pytest.mark.slow)], ids=str
)
def test_half_precision_errs_no_more_than_the_plain_network(modality, dtype, networks):
    """Over several networks, since which of two roundings is the luckier one is chance in each."""
    found = {Specialized: 0.0, SingleStep: 0.0}
    for seed in range(networks):
        one = head(modality, seed=seed)
        exact = SingleStep([one], CPU, torch.float32)(pictures())[modality]
        for kind in found:
            error = (kind([deepcopy(one)], CPU, dtype)(pictures())[modality] - exact).norm(dim=1)
            if modality == "depth":
                found[kind] += (error / exact[:, 0])[exact[:, 0] >= 0.01].mean().item()
            else:
                found[kind] += torch.rad2deg(2 * torch.asin((error / 2).clip(max=1))).mean().item()
    ours, theirs = (one / networks for one in found.values())
    print(f"{dtype}, {'AbsRel of depth' if modality == 'depth' else 'degrees'}: {ours:.2e}, plain {theirs:.2e}")
    assert 0 < ours <= theirs
