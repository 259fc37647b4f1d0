"""A checkpoint's modules, loaded strictly: every weight there is, once, or a clear error."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, ModelMixin, UNet2DConditionModel
from safetensors import safe_open
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from depthmill.pipeline.errors import CheckpointError
from depthmill.pipeline.model.checkpoint import Checkpoint, read_json, weight_shapes

_MAX_TIMESTEPS = 100_000  # of a schedule, which has an array of them; they are 1000 as a rule

# What a configuration has of layers, and of widths, each of which some weight has as a dimension.
_LAYERS = ("layers_per_block", "num_hidden_layers", "transformer_layers_per_block")
_WIDTHS = (
    *("in_channels", "out_channels", "latent_channels", "block_out_channels", "cross_attention_dim"),
    *("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings", "num_class_embeds"),
)

# What a UNet's configuration has where it is conditioned on more than a time step and a prompt.
_MORE_CONDITIONING = ("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim_type")
# What a VAE's configuration has where its latents are more than scaled: Stable Diffusion 3's and later ones'.
_MOVES_LATENTS = ("shift_factor", "latents_mean", "latents_std")


def load_vae(checkpoint: Checkpoint) -> AutoencoderKL:
    """The autoencoder, float32, on the CPU, frozen.

    Raises:
        CheckpointError: Also if it is not of colours, or its latents are more than scaled.
    """
    vae = load_part(checkpoint, AutoencoderKL, "vae", low_cpu_mem_usage=False, torch_dtype=torch.float32)
    channels = vae.config.in_channels, vae.config.out_channels
    if channels != (3, 3):
        raise CheckpointError(
            f"{checkpoint.name}: the VAE takes {channels[0]} channels and answers {channels[1]}; expected 3 and 3 "
            "(red, green, blue): it was made for another task"
        )
    if moved := [f"{key} {vae.config[key]}" for key in _MOVES_LATENTS if vae.config.get(key)]:
        raise CheckpointError(
            f"{checkpoint.name}: the VAE has {', '.join(moved)}; expected Stable Diffusion 1's or 2's kind, of which "
            "latents are scaled alone: use a checkpoint that was fine-tuned from one of those"
        )
    try:
        _check_number("scaling_factor", vae.config.scaling_factor)
    except ValueError as error:
        raise _unloadable(checkpoint, "vae", error) from error
    return vae


def vae_factor(vae: AutoencoderKL) -> int:
    """How many times smaller than the picture a latent is."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def vae_width(vae: AutoencoderKL) -> int:
    """Channels of the largest tensor within it: what the decoder's last block but one hands on, at full size."""
    return int(max(vae.config.block_out_channels[:2]))


def load_unet(checkpoint: Checkpoint) -> UNet2DConditionModel:
    """The UNet, float32, on the CPU, frozen.

    Raises:
        CheckpointError: Also if its input is neither the picture's latent alone nor that and the noisy latent.
    """
    unet = load_part(checkpoint, UNet2DConditionModel, "unet", low_cpu_mem_usage=False, torch_dtype=torch.float32)
    channels, latent = unet.config.in_channels, unet.config.out_channels
    if channels not in (latent, 2 * latent):
        raise CheckpointError(
            f"{checkpoint.name}: the UNet takes {channels} channels; expected {latent} (picture) or {2 * latent} "
            "(picture, noisy label): it was made for another task, inpainting perhaps"
        )
    return unet


def load_scheduler(checkpoint: Checkpoint) -> DDIMScheduler:
    """The noise schedule.

    Raises:
        CheckpointError: If it is no DDIM-type schedule, or its prediction type is unknown or gives no x0, or DDIM does
            not take its values.
    """
    config = read_json(checkpoint.directory / "scheduler" / "scheduler_config.json")
    kind, prediction = config.get("_class_name", ""), config.get("prediction_type", "epsilon")
    if kind not in ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler"):
        remedy = (
            "save DDIMScheduler.from_config(...) of it in its place, if it was trained as diffusion (no flow matching)"
        )
        if kind == "LCMScheduler":
            remedy = "use the checkpoint that it was distilled from"
        raise CheckpointError(
            f"{checkpoint.name}: its scheduler is {kind or 'unnamed'}; expected a DDIM-type one (DDIM, DDPM or PNDM), "
            f"whose single step from zero noise is x0: {remedy}"
        )
    if prediction not in ("v_prediction", "epsilon", "sample"):
        raise CheckpointError(
            f"{checkpoint.name}: its scheduler's prediction_type is {prediction!r}; expected v_prediction, epsilon or "
            "sample: correct scheduler/scheduler_config.json"
        )
    if config.get("thresholding"):
        raise CheckpointError(
            f"{checkpoint.name}: its scheduler asks for dynamic thresholding, which is for pixel-space models; "
            "set thresholding to false in scheduler/scheduler_config.json"
        )
    if kind == "PNDMScheduler":  # which never clips x0, and has no word for it
        config.setdefault("clip_sample", False)
    # Fields of other schedulers (PNDM's `skip_prk_steps`) are no concern of ours and would only be warned about.
    fields = set(DDIMScheduler().config) - {"_class_name", "_diffusers_version"}
    try:
        _check_number("num_train_timesteps", config.get("num_train_timesteps", 1000), _MAX_TIMESTEPS)
        if config.get("clip_sample", True):
            _check_number("clip_sample_range", config.get("clip_sample_range", 1.0))
        scheduler = DDIMScheduler.from_config({key: config[key] for key in config if key in fields})
        if not ((alphas := scheduler.alphas_cumprod) >= 0).logical_and(alphas <= 1).all():
            raise ValueError(f"its betas leave {alphas.min():g} to {alphas.max():g} of the signal; expected 0 to 1")
    except Exception as error:
        raise _unloadable(checkpoint, "scheduler", error) from error
    if prediction == "epsilon" and scheduler.alphas_cumprod[-1] == 0:
        raise CheckpointError(
            f"{checkpoint.name}: its scheduler predicts epsilon and ends at pure noise (rescale_betas_zero_snr), of "
            "which no x0 follows; expected v_prediction or sample there: correct scheduler/scheduler_config.json"
        )
    return scheduler


def load_text(checkpoint: Checkpoint) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """The tokenizer, and the text encoder, float32, on the CPU, frozen."""
    try:
        tokenizer = CLIPTokenizer.from_pretrained(checkpoint.directory / "tokenizer", local_files_only=True)
    except Exception as error:
        raise _unloadable(checkpoint, "tokenizer", error) from error
    return tokenizer, load_part(checkpoint, CLIPTextModel, "text_encoder", dtype=torch.float32)


def empty_prompt(checkpoint: Checkpoint) -> torch.Tensor:
    """Embed the empty prompt, once; the text encoder is not kept.

    Returns:
        (1, tokens, width) float32: 2 tokens (begin, end), or 77 where the checkpoint's description says so.
    """
    tokenizer, encoder = load_text(checkpoint)
    tokens = tokenizer(
        "",
        padding=checkpoint.description.prompt_padding,
        max_length=encoder.config.max_position_embeddings,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    try:
        with torch.inference_mode():
            embedding: torch.Tensor = encoder(tokens)[0]
    except IndexError as error:  # of the tokens that it has, these are none
        raise _unloadable(checkpoint, "tokenizer", error) from error
    return embedding.clone()


def check_fit(checkpoint: Checkpoint, unet: UNet2DConditionModel, vae: AutoencoderKL, prompt: torch.Tensor) -> None:
    """See that a UNet wants no more than there is.

    Args:
        checkpoint: Theirs.
        unet: As it was loaded.
        vae: Whose latents it denoises.
        prompt: (1, tokens, width) what it attends to.

    Raises:
        CheckpointError: If it wants more than a time step and a prompt, or the parts are of different widths.
    """
    if more := [f"{key} {unet.config[key]!r}" for key in _MORE_CONDITIONING if unet.config.get(key) is not None]:
        raise CheckpointError(
            f"{checkpoint.name}: its UNet wants {', '.join(more)}; expected Stable Diffusion 1's or 2's kind, which is "
            "told of a time step and a prompt alone (Lotus and SDXL are of other kinds): use a checkpoint that was "
            "fine-tuned from one of those"
        )
    if vae.config.latent_channels != unet.config.out_channels:
        raise CheckpointError(
            f"{checkpoint.name}: the UNet answers {unet.config.out_channels} channels and the VAE's latents have "
            f"{vae.config.latent_channels}; expected one number: the parts are of different checkpoints"
        )
    if prompt.shape[-1] != unet.config.cross_attention_dim:
        raise CheckpointError(
            f"{checkpoint.name}: the UNet attends to prompts of width {unet.config.cross_attention_dim} and the "
            f"text encoder's are {prompt.shape[-1]} wide: the parts are of different checkpoints"
        )


def same(one: ModelMixin, other: ModelMixin, but: tuple[str, ...] = ()) -> bool:
    """Whether two models are the same, bit for bit, so that one can serve for both.

    Args:
        one: A model.
        other: Another.
        but: What the names of weights begin with that may differ.
    """

    def settings(model: ModelMixin) -> dict[str, Any]:
        return {key: value for key, value in model.config.items() if not key.startswith("_")}

    mine, its = one.state_dict(), other.state_dict()
    return (
        settings(one) == settings(other)
        and mine.keys() == its.keys()
        and all(mine[key].equal(its[key]) for key in mine if not key.startswith(but))
    )


def load_part(checkpoint: Checkpoint, kind: type[Any], part: str, **options: Any) -> Any:
    """A module of a checkpoint, on the CPU, frozen, in eval mode.

    Args:
        checkpoint: Whose.
        kind: The class, of diffusers or transformers.
        part: The directory of its config and weights.
        options: What its `from_pretrained` is given besides.

    Raises:
        CheckpointError: If it cannot be loaded, or a weight is missing, left over or of another shape.
    """
    try:
        _check_sizes(checkpoint.directory / part)
        with _without_bars():
            module, info = kind.from_pretrained(
                checkpoint.directory / part,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
        missing, unexpected = _misplaced(checkpoint.directory / part)
    except Exception as error:
        raise _unloadable(checkpoint, part, error) from error
    for what, keys in (("missing_keys", missing), ("unexpected_keys", unexpected)):
        info[what] = {*info[what], *keys}
    _check_strict(checkpoint, part, info)
    return module.eval().requires_grad_(False)


def _check_number(key: str, value: object, most: float = 1e9) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most:
        raise ValueError(f"{key} is {value!r}; expected a number above 0, {most:g} at most")


def _check_sizes(folder: Path) -> None:
    """Refuse more or wider layers than there are weights of: to make them could take hours, or all memory."""
    config, shapes = read_json(folder / "config.json"), weight_shapes(folder)
    layers = 1 + max((int(number) for name in shapes for number in re.findall(r"\d+", name)), default=0)
    widest = max((side for shape in shapes.values() for side in shape), default=0)
    for key, most in [*((key, layers) for key in _LAYERS), *((key, widest) for key in _WIDTHS)]:
        values = config.get(key)
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, int) and value > most:
                raise ValueError(f"{key} is {value} in its config.json, and its weights are of {most} at most")


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers from showing a bar for each part that it loads; its user's own loading shows them as before."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _misplaced(folder: Path) -> tuple[set[str], set[str]]:
    """Weights that the index of shards lists and no shard has, and the other way about: diffusers reads the index."""
    listed, there = set[str](), set[str]()
    for index in folder.glob("*model.safetensors.index.json"):
        shard_of = read_json(index)["weight_map"]
        listed |= shard_of.keys()
        for shard in set(shard_of.values()):
            with safe_open(folder / shard, "pt") as file:
                there |= set(file.keys())
    return listed - there, there - listed


def _check_strict(checkpoint: Checkpoint, part: str, info: dict[str, Any]) -> None:
    """Refuse what the libraries let pass with a warning at most: weights left random, or left over."""
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    if wrong := {kind: sorted(map(str, info[kind])) for kind in kinds if info.get(kind)}:
        shown = "; ".join(
            f"{kind.replace('_', ' ')}: {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
            for kind, keys in wrong.items()
        )
        raise CheckpointError(
            f"checkpoint {checkpoint.name}: {part}/ does not fit its own config.json ({shown}); "
            "expected every weight, once: the files are damaged or of different checkpoints; fetch it again"
        )


def _unloadable(checkpoint: Checkpoint, part: str, error: Exception) -> CheckpointError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return CheckpointError(
        f"checkpoint {checkpoint.name}: {part}/ cannot be loaded ({reason}); expected a Stable-Diffusion {part} in "
        f"diffusers layout: check {checkpoint.directory / part}, or fetch it again"
    )
