"""The network with its constants folded in: the same function as `single_step.py`, with less to compute.

Time step, prompt and noise never change, and of two convolutions without anything between them one can be made. So:

- the VAE encoder's last convolution answers the scaled mean alone (`quant_conv` and the scaling factor are in it);
- the UNet's first has no weights for the noise, which is zero, and its last answers what the decoder's first takes
  (x0's factor, the scaling factor and `post_quant_conv` are in it; a scheduler that clips x0 keeps the two apart);
- the time step's projections are in the biases of the residual blocks;
- attention to the prompt, whose keys and values are constants, is two small matrices (`PromptAttention`);
- the decoder's enlargements, each pixel made four and convolved, are transposed convolutions of 4/9 of the work;
- on CPUs, in float32, the VAE's wide convolutions have a quarter of the products, its wide enlargements 2/5 of what
  was left (`winograd.py`); in bfloat16 all weights lie as they are multiplied (`packed.py`);
- two UNets that differ in their last convolution alone, as those that learnt together do, are one with both's;
- depth's last convolution has one channel, the mean of three.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from depthmill.pipeline.model.blocks import (
    PictureAttention,
    PromptAttention,
    Residual,
    SelfAttention,
    Upsampling,
    empty,
    filled,
    replace,
    use_channels_last_norms,
    use_shrinking,
)
from depthmill.pipeline.model.modules import same, vae_factor, vae_width
from depthmill.pipeline.model.packed import can_pack, packed
from depthmill.pipeline.model.single_step import Head, decode_depth, decode_normals
from depthmill.pipeline.model.winograd import use_winograd
from depthmill.pipeline.types import Modality

log = logging.getLogger(__name__)

# What the configuration of a UNet that `load_heads` accepts must say for `Denoiser` to be the same function; Stable
# Diffusion 1, 2 and kin have it so.
_SIMPLE = {
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "cross_attention_norm": (None,),
    "dual_cross_attention": (False,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "only_cross_attention": (False,),
}
_BLOCKS = {
    "DownBlock2D",
    "CrossAttnDownBlock2D",
    "UpBlock2D",
    "CrossAttnUpBlock2D",
    "DownEncoderBlock2D",
    "UpDecoderBlock2D",
}


def can_specialize(head: Head) -> bool:
    """Whether a head is made of what this file knows how to fold; `SingleStep` runs the others as they are."""
    unet, vae = head.unet.config, head.vae.config
    blocks = {*unet.down_block_types, *unet.up_block_types, *vae.down_block_types, *vae.up_block_types}
    return blocks <= _BLOCKS and all(unet.get(key) in values for key, values in _SIMPLE.items())


class Specialized(nn.Module):
    """Depth, normals or both of a batch of pictures, as `SingleStep` has them.

    Args:
        heads: What `load_heads` loaded, float32, on the CPU; their modules are taken apart.
        device: Where the weights live.
        dtype: Of the network; labels are finished in float32 whatever it is.
    """

    def __init__(self, heads: Sequence[Head], device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.factor = vae_factor(heads[0].vae)
        self.width = max(vae_width(head.vae) for head in heads)
        self.dtype = dtype
        self._kinds = [(head.modality, head.description) for head in heads]
        with torch.no_grad():
            folded = Folded(heads)
        folded.requires_grad_(False).eval().to(device, dtype)
        # Half precision has 256 values between near and far, or 2048: what it rounds to last would show as bands.
        folded.last.float()
        if device.type == "cuda" and dtype != torch.float32:
            use_channels_last_norms(folded)
        # Convolutions want it: tensor cores everywhere; on a CPU it measured 1.0 to 1.4 times as fast.
        folded.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        if device.type == "cpu" and dtype == torch.float32:
            # Not in the UNet, the weights of which are most of the memory already.
            use_winograd(folded.encoders)
            use_winograd(folded.decoders)
        use_shrinking(folded, device, dtype)
        if device.type == "cpu" and dtype == torch.bfloat16 and can_pack():
            replace(folded, (nn.Conv2d, nn.Linear), packed)
        self.folded = folded
        self.compiled: Callable[[torch.Tensor], list[torch.Tensor]] | None = None  # the same, for full batches
        self.compile_after = 0  # pictures of a shape
        self._wide: Folded | None = None

    @torch.inference_mode()
    def forward(self, pictures: torch.Tensor, *, full: bool = False) -> dict[Modality, torch.Tensor]:
        """Label a batch.

        Where float16 overflows, as it does in some VAEs, the pictures that it happens to are done again in float32.

        Args:
            pictures: (B, 3, h, w) float32 in [-1, 1], both sides multiples of `factor`.
            full: Whether this is a full batch, for which the network runs compiled if and when it is to.

        Returns:
            For each modality (B, C, h, w) float32: depth C = 1 in [0, 1]; normals C = 3, unit, in the stored axes.
        """
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        run = self.compiled if full and self.compiled is not None else self.folded
        decoded: list[torch.Tensor] = run(pictures)
        if self.dtype == torch.float16:
            decoded = self._without_overflow(pictures, decoded)
        return {
            modality: decode_depth(one) if modality == "depth" else decode_normals(one, description)
            for (modality, description), one in zip(self._kinds, decoded, strict=True)
        }

    def _without_overflow(self, pictures: torch.Tensor, decoded: list[torch.Tensor]) -> list[torch.Tensor]:
        finite = torch.stack([one.isfinite().flatten(1).all(dim=1) for one in decoded]).all(dim=0)  # (B,)
        if finite.all():
            return decoded
        if self._wide is None:
            log.warning("float16 overflows in this checkpoint: such frames are done again in float32, more slowly")
            self._wide = deepcopy(self.folded).float()
        where = (~finite).nonzero()[:, 0]
        again = self._wide(pictures[where])
        return [one.index_copy(0, where, wide) for one, wide in zip(decoded, again, strict=True)]


class Folded(nn.Module):
    """Pictures to what each head's decoder answers, each VAE's encoder run once, and a UNet that both share."""

    def __init__(self, heads: Sequence[Head]):
        super().__init__()
        vaes = list({id(head.vae): head.vae for head in heads}.values())
        self._vaes = [next(i for i, vae in enumerate(vaes) if vae is head.vae) for head in heads]
        groups = [heads] if len(heads) == 2 and _share_unet(*heads) else [[head] for head in heads]
        self.denoisers = nn.ModuleList(map(Denoiser, groups))
        self.last = nn.ModuleList(_finish(head) for head in heads)
        self.encoders = nn.ModuleList(_encoder(vae) for vae in vaes)
        self.decoders = nn.ModuleList(_decoder(vae) for vae in vaes)

    def forward(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        """(B, 3, h, w) in [-1, 1] to one (B, C, h, w) float32 a head: C = 1 of depth, 3 of normals."""
        pictures = pictures.to(next(self.parameters()).dtype)
        latents = [encoder(pictures) for encoder in self.encoders]
        # As many denoisers as heads, or a single one, whose heads share their VAE, too.
        asked = zip(self.denoisers, self._vaes, strict=False)
        answers = [answer for denoiser, vae in asked for answer in denoiser(latents[vae])]
        return [
            last(self.decoders[vae](answer).float())
            for vae, answer, last in zip(self._vaes, answers, self.last, strict=True)
        ]


class Denoiser(nn.Module):
    """A UNet at its one time step and prompt: the picture's scaled latents to what the VAE's decoder takes.

    Args:
        heads: One, or two that share all of it but the last convolution.
    """

    def __init__(self, heads: Sequence[Head]):
        super().__init__()
        head = heads[0]
        unet, vae = head.unet, head.vae
        _fold_time(unet, head.timestep)
        _simplify(unet, head.prompt)
        replace(unet, Upsample2D, Upsampling)
        latent = vae.config.latent_channels
        self.first = _convolution(unet.conv_in, unet.conv_in.weight[:, :latent], unet.conv_in.bias)
        self.down, self.mid, self.up = unet.down_blocks, unet.mid_block, unet.up_blocks
        self.norm, self.act = unet.conv_norm_out, unet.conv_act
        lasts = [_scaled(one.unet.conv_out, one.x0_factor / vae.config.scaling_factor) for one in heads]
        self.clip = None if head.x0_clip is None else head.x0_clip / vae.config.scaling_factor
        self.after = vae.post_quant_conv or nn.Identity()
        if self.clip is None:
            lasts, self.after = [_composed(one, vae.post_quant_conv) for one in lasts], nn.Identity()
        weight, bias = (torch.cat([getattr(one, name) for one in lasts]) for name in ("weight", "bias"))
        self.last, self.answers = _convolution(lasts[0], weight, bias), len(heads)

    def forward(self, latent: torch.Tensor) -> list[torch.Tensor]:
        """(B, latent, h, w) to one of the same shape for each head."""
        x = self.first(latent)
        skips = [x]
        for block in self.down:
            x, more = block(x)
            skips += more
        x = self.mid(x)
        for block in self.up:
            taken = tuple(skips[-len(block.resnets) :])
            del skips[-len(block.resnets) :]
            size = tuple(skips[-1].shape[2:]) if skips else None
            x = block(hidden_states=x, res_hidden_states_tuple=taken, upsample_size=size)
        if self.norm is not None:
            x = self.act(self.norm(x))
        x = self.last(x)
        if self.clip is not None:
            x = x.clip(-self.clip, self.clip)
        return [self.after(one) for one in x.chunk(self.answers, dim=1)]


def _share_unet(one: Head, other: Head) -> bool:
    """Whether two heads' UNets are the same but for the last convolution, and are asked the same."""
    return (
        one.vae is other.vae
        and (one.timestep, one.x0_clip) == (other.timestep, other.x0_clip)
        and one.prompt.equal(other.prompt)
        and same(one.unet, other.unet, but=("conv_out.",))
    )


def _encoder(vae: Any) -> nn.Module:
    """Pictures to scaled latents, the distribution's mean."""
    encoder: nn.Module = vae.encoder
    _simplify(encoder)
    last: Any = _composed(encoder.conv_out, vae.quant_conv)
    mean = slice(vae.config.latent_channels)
    encoder.conv_out = _scaled(_convolution(last, last.weight[mean], last.bias[mean]), vae.config.scaling_factor)
    return encoder


def _decoder(vae: Any) -> nn.Module:
    """What `Denoiser` answers to the features of which `_finish` makes a head's label."""
    decoder: nn.Module = vae.decoder
    _simplify(decoder)
    replace(decoder, Upsample2D, lambda upsample: _doubling(upsample.conv))
    decoder.conv_norm_out = decoder.conv_act = decoder.conv_out = nn.Identity()
    return decoder


def _finish(head: Head) -> nn.Sequential:
    """The decoder's last norm, activation and convolution; of depth the convolution has the mean of its channels."""
    decoder = head.vae.decoder
    last = decoder.conv_out
    if head.modality == "depth":
        last = _convolution(last, last.weight.mean(dim=0, keepdim=True), last.bias.mean(dim=0, keepdim=True))
    return nn.Sequential(deepcopy(decoder.conv_norm_out), nn.SiLU(inplace=True), deepcopy(last))


def _simplify(network: nn.Module, prompt: torch.Tensor | None = None) -> None:
    """Replace, within `network`, the blocks for which there is a leaner one."""
    for block in network.modules():
        if isinstance(block, BasicTransformerBlock):
            assert prompt is not None
            block.attn1, block.attn2 = SelfAttention(block.attn1), PromptAttention(block.attn2, prompt)
    replace(network, ResnetBlock2D, lambda old: Residual(old) if isinstance(old.nonlinearity, nn.SiLU) else old)
    replace(network, Attention, lambda old: PictureAttention(old) if old.group_norm is not None else old)


def _fold_time(unet: Any, timestep: int) -> None:
    """Put what the time step adds to each residual block into its biases."""
    embedding = unet.time_embedding(unet.time_proj(torch.tensor([timestep])))
    if unet.time_embed_act is not None:
        embedding = unet.time_embed_act(embedding)
    for block in unet.modules():
        if isinstance(block, ResnetBlock2D) and block.time_emb_proj is not None:
            added = block.time_emb_proj(embedding if block.skip_time_act else block.nonlinearity(embedding))[0]
            if block.time_embedding_norm == "scale_shift":
                scale, shift = added.chunk(2)
                block.norm2.bias.copy_(block.norm2.bias * (1 + scale) + shift)
                block.norm2.weight.mul_(1 + scale)
            else:
                block.conv1.bias.add_(added)
            block.time_embedding_norm, block.time_emb_proj = "default", None


def _doubling(convolution: Any) -> nn.ConvTranspose2d:
    """Nearest-neighbour enlargement to twice the size and a 3x3 convolution, as one transposed convolution.

    Of an enlarged row's three taps two fall on one row of the input, the second and third for even rows, the first and
    second for odd ones: their weights are added, and 4 of 9 products are left. Scattered instead of gathered, the taps
    of an input row go to the output rows 2i - 1 … 2i + 2 with the weights w2, w1 + w2, w0 + w1, w0.
    """
    spread = torch.tensor([[0.0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.float64)
    weight = torch.einsum("oiyx,ky,lx->iokl", convolution.weight.double(), spread, spread)
    inputs, outputs = convolution.in_channels, convolution.out_channels
    return filled(empty(nn.ConvTranspose2d, inputs, outputs, 4, stride=2, padding=1), weight, convolution.bias)


def _composed(first: Any, pointwise: Any) -> nn.Conv2d:
    """A convolution and a 1x1 convolution of what it answers, as one."""
    if pointwise is None:
        return first  # type: ignore[no-any-return]
    mix = pointwise.weight.double()[:, :, 0, 0]
    weight = torch.einsum("po,oiyx->piyx", mix, first.weight.double())
    return _convolution(first, weight, mix @ first.bias.double() + pointwise.bias)


def _scaled(convolution: Any, factor: float) -> nn.Conv2d:
    return _convolution(convolution, convolution.weight * factor, convolution.bias * factor)


def _convolution(like: Any, weight: torch.Tensor, bias: torch.Tensor) -> nn.Conv2d:
    """With `like`'s stride and padding."""
    outputs, inputs, *kernel = weight.shape
    made = empty(nn.Conv2d, inputs, outputs, tuple(kernel), stride=like.stride, padding=like.padding)
    return filled(made, weight, bias)
