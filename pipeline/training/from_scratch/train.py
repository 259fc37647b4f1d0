"""The loop of a run with `stages`, which makes the embedded checkpoint.

A run that was stopped goes on as those of `training/train.py` do: weights and the optimizer's moments are all there is
to remember.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from depthmill.pipeline.config import make_folder
from depthmill.pipeline.config_files import validated
from depthmill.pipeline.errors import ConfigError, TrainingError
from depthmill.pipeline.model.backend import pick_device
from depthmill.pipeline.room import room_in
from depthmill.pipeline.sources.prefetch import prefetch
from depthmill.pipeline.training import losses, scenes
from depthmill.pipeline.training.folder import read_config, refuse_other_kind, write_config
from depthmill.pipeline.training.from_scratch import data, network
from depthmill.pipeline.training.from_scratch.config import Stage, StagedConfig
from depthmill.pipeline.training.from_scratch.network import MODALITIES, Network
from depthmill.pipeline.training.from_scratch.optimizer import Optimizer
from depthmill.pipeline.training.pool import open_pool
from depthmill.pipeline.training.raycast import DEPTH_RANGE_M, Views
from depthmill.pipeline.training.record import LossTable, abs_rel, draw_sheet, mean_angle_deg
from depthmill.pipeline.training.schedule import learning_rate

logger = logging.getLogger(__name__)

# A stage's losses of a batch, by name, `loss` being what is trained on, and its gradients.
Differentiated = Callable[[Views], tuple[dict[str, Tensor], Sequence[Tensor | None]]]

# Scenes from this seed on are never trained on: pools count up from 0.
HELD_OUT_SEED = 1_000_000_000
_HELD_OUT = 16
_LOG_STEPS = 50
_BATCHES_AHEAD = 2
_COLUMNS = (
    "learning_rate",
    "loss",
    "depth",
    "anchor",
    "slopes",
    "normals",
    "reconstruction",
    "gradient_norm",
    "relative",
)


def train(config: StagedConfig, output: Path, *, overwrite: bool = False, device: str | None = None) -> Path:
    """Train, or go on where the same call was stopped.

    Args:
        config: The run.
        output: Folder for the run: `checkpoint/depth` and `checkpoint/normals` (half precision, what `depthmill label`
            takes), `state.pt` (to resume), `losses.csv`, `pictures/` of held-out scenes, `config.json`.
        overwrite: Start over, whatever `output` holds.
        device: Where to train; a GPU if there is one.

    Returns:
        The folder of the checkpoints.

    Raises:
        CheckpointError: If the start cannot be loaded.
        ConfigError: If `device` cannot be trained on, scenes cannot be rendered into the pool, or this is one of
            several processes.
        TrainingError: If `output` holds a run of another configuration or optimizer, the start does not fit, the loss
            is no longer a number, or torch has no Muon.
        RunStoppedError: If the disk is full, or a process that renders was killed.
    """
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ConfigError(
            f"a run with stages trains in one process, and this is one of {processes}: call depthmill train itself, "
            "without accelerate launch or torchrun"
        )
    where = pick_device(device or "auto")
    make_folder(output)
    with room_in(output):
        return _train(config, output, overwrite, where)


def _train(config: StagedConfig, output: Path, overwrite: bool, where: torch.device) -> Path:
    if not overwrite:
        refuse_other_kind(output, stages=True)
    net = network.build(config.architecture, config.seed, where)
    if config.start is not None:
        net.load(config.start)
    begin, first, moments = 0, 0, {}
    if overwrite:  # now: a run that is stopped before its first save must not go on from the old one's
        for name in ("state.pt", "losses.csv"):
            (output / name).unlink(missing_ok=True)
        for name in ("checkpoint", "pictures", "states", "tensorboard"):
            shutil.rmtree(output / name, ignore_errors=True)
    if (output / "state.pt").exists():
        saved = torch.load(output / "state.pt", map_location=where, weights_only=True)
        begin, first, moments = saved["stage"], saved["step"], saved["optimizer"]
        _refuse_another_run(config, output, begin, first)
        net.modules.load_state_dict(saved["modules"])
    write_config(output, config.model_dump(mode="json"))
    held_out = _held_out(config, where)
    order = {stage.name: index for index, stage in enumerate(config.stages)}

    def stays(row: Mapping[str, str]) -> bool:
        return row["stage"] in order and (order[row["stage"]], int(row["step"])) < (begin, first)

    with LossTable(output / "losses.csv", stays) as table:
        for index in range(begin, len(config.stages)):
            optimizer = Optimizer(net, _trained(net, config.stages[index]))
            if index == begin and first:
                optimizer.load_state_dict(moments)
            steps = _stage(net, optimizer, config, index, first if index == begin else 0)
            for done, row in steps:
                stage = config.stages[index]
                last = done == stage.steps
                table.write({"stage": stage.name, "step": done - 1, **row})
                if stage.objective == "end_to_end" and (last or done % config.picture_steps == 0):
                    figures = draw(net, held_out, output / "pictures" / f"{index}-{stage.name}-{done:06d}.png")
                    logger.info("%s %d/%d  held out: %s", stage.name, done, stage.steps, figures)
                if last or done % config.save_steps == 0:
                    _save(net, optimizer, (index + 1, 0) if last else (index, done), config, output)
    return output / "checkpoint"


def _stage(
    net: Network, optimizer: Optimizer, config: StagedConfig, index: int, first: int
) -> Iterator[tuple[int, dict[str, float]]]:
    """Train through one stage from step `first`; after each step, yield how many are done and the table's row."""
    stage, d = config.stages[index], config.data
    device = net.prompt.device
    pool = open_pool(d.pool, stage.scenes, d.height, d.width, processes=d.render_processes, device=str(device))
    pool = pool.to(device)
    logger.info("stage %s: %d steps from step %d, %d scenes", stage.name, stage.steps, first, len(pool))
    seed = config.seed * 1000 + index
    batches = (data.batch(pool, stage, seed, step) for step in range(first, stage.steps))
    run = _differentiated(net, stage, config)
    if device.type == "cuda":
        run = _captured(run, data.batch(pool, stage, seed, first))
    started, begun = time.monotonic(), first
    for step, views in enumerate(prefetch(batches, _BATCHES_AHEAD), first):
        row = _step(net, optimizer, views, stage, config, step, run)
        done = step + 1
        if done % _LOG_STEPS == 0 or done == stage.steps:
            pace = (done - begun) * stage.batch_size / (time.monotonic() - started)
            shown = "  ".join(f"{name} {value:.4g}" for name, value in row.items() if isfinite(value))
            logger.info("%s %d/%d  %s  %.1f pictures/s", stage.name, done, stage.steps, shown, pace)
        yield done, row
        if done % _LOG_STEPS == 0:
            started, begun = time.monotonic(), done


def _step(
    net: Network,
    optimizer: Optimizer,
    views: Views,
    stage: Stage,
    config: StagedConfig,
    step: int,
    run: Differentiated,
) -> dict[str, float]:
    """One optimizer step; the row of the loss table, less the stage's name and the step."""
    rate = learning_rate(stage, step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    terms = _gradients(run, _trained(net, stage), views, config.cpu_threads)
    terms["gradient_norm"] = torch.nn.utils.clip_grad_norm_(_trained(net, stage), config.gradient_clip)
    optimizer.step()
    net.hold_attention()
    # All at once, after all that a GPU was asked for: it is waited for here alone.
    values = dict(zip(terms, torch.stack(list(terms.values())).tolist(), strict=True))
    if not isfinite(values["gradient_norm"]):
        raise TrainingError(
            f"stage {stage.name!r}, step {step}: the loss is {values['loss']}, "
            f"its gradient's norm {values['gradient_norm']}; "
            "lower this stage's learning_rate, then run again to go on from the last saved state"
        )
    values["learning_rate"] = rate
    return {name: values.get(name, float("nan")) for name in _COLUMNS}


def _differentiated(net: Network, stage: Stage, config: StagedConfig) -> Differentiated:
    """What a stage asks of the network, which is run in the configured precision."""
    objective = _autoencoder if stage.objective == "autoencoder" else partial(_end_to_end, stage=stage)
    parameters, device = _trained(net, stage), net.prompt.device.type

    def run(views: Views) -> tuple[dict[str, Tensor], Sequence[Tensor | None]]:
        with torch.autocast(device, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
            terms = objective(net, views)
        # Not backward(): a CPU's threads would add to the same gradients at once.
        gradients = torch.autograd.grad(terms["loss"], parameters, allow_unused=True)
        return {name: term.detach().float() for name, term in terms.items()}, gradients

    return run


def _captured(run: Differentiated, example: Views) -> Differentiated:
    """The same as one CUDA graph: thousands of kernels, each done sooner than a host asks for the next."""
    with torch.cuda.device(example.rgb.device):  # or it is another's stream that is recorded, on which nothing is done
        ours, others = torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
        ours.wait_stream(others)
        with torch.cuda.stream(ours):
            for _ in range(3):  # what libraries set up at first cannot be recorded
                run(example)
        others.wait_stream(ours)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as that which makes batches, may go on meanwhile.
        with torch.cuda.graph(graph, stream=ours, capture_error_mode="thread_local"):
            results = run(example)

    def replay(views: Views) -> tuple[dict[str, Tensor], Sequence[Tensor | None]]:
        for field in fields(Views):
            getattr(example, field.name).copy_(getattr(views, field.name))
        graph.replay()
        return results

    return replay


def _gradients(
    run: Differentiated, parameters: Sequence[torch.nn.Parameter], views: Views, cpu_threads: int
) -> dict[str, Tensor]:
    """Leave the batch's mean gradient in the parameters; the losses, by name.

    On a CPU the batch is split among threads that meet once a step. OpenMP's own threads meet in every operation, which
    on a busy machine leaves most of them waiting most of the time.
    """
    threads = cpu_threads if views.rgb.device.type == "cpu" else 1
    pieces = [views[slice(i * len(views.rgb) // threads, (i + 1) * len(views.rgb) // threads)] for i in range(threads)]
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as executor:
        results = list(executor.map(run, pieces)) if threads > 1 else [run(views)]
    for i, parameter in enumerate(parameters):
        shares = [share for _, gradients in results if (share := gradients[i]) is not None]
        # Laid out as the parameter is: torch's fused optimizers pair what lies at the same place in memory.
        parameter.grad = torch.empty_like(parameter).copy_(torch.stack(shares).mean(0)) if shares else None
    return {name: torch.stack([terms[name] for terms, _ in results]).mean(0) for name in results[0][0]}


def _trained(net: Network, stage: Stage) -> list[torch.nn.Parameter]:
    # The paper freezes the VAE, which it was given; one trained for minutes has to go on learning with the UNets.
    modules = net.modules["vae"] if stage.objective == "autoencoder" else net.modules
    return list(modules.parameters())


def _autoencoder(net: Network, views: Views) -> dict[str, Tensor]:
    """The VAE gives back a third of the scenes as pictures, a third as depth, a third as normals.

    Latents are held, weakly, to unit size for the UNet's sake.
    """
    depth = losses.normalised_depth(views.depth, views.mask)[:, None].expand_as(views.normals)
    pictures = torch.cat([views.rgb[0::3] * 2 - 1, depth[1::3], views.normals[2::3]])
    latent = net.encode(pictures)
    reconstruction = (net.decode(latent) - pictures).abs().mean()
    size = latent.square().mean()
    return {"loss": reconstruction + 1e-2 * (size - 1).clamp(min=0), "reconstruction": reconstruction}


def _end_to_end(net: Network, views: Views, stage: Stage) -> dict[str, Tensor]:
    """The paper's losses on the decoded single step, and the anchor."""
    latents = net.step(net.encode(views.rgb * 2 - 1))
    latents.register_hook(_held)  # type: ignore[no-untyped-call]
    depth, normals = net.answers(latents)
    target = losses.normalised_depth(views.depth, views.mask)
    # The affine-invariant loss is proportional to its target's unit. Metres would weigh a street a hundred times a
    # table top, so each scene is measured in its own range of depth: two units wide, as the anchor's is.
    affine = losses.depth_loss(depth, target, views.mask)
    anchor = (depth - target).abs().mean()
    angle = losses.normals_loss(normals, views.normals, views.mask)
    slopes = losses.slope_loss(depth, target)
    relative = losses.depth_loss(depth, views.depth, views.mask, relative=True)
    loss = affine + stage.anchor * anchor + stage.slopes * slopes + stage.relative * relative + angle
    terms = {"depth": affine, "anchor": anchor, "slopes": slopes, "relative": relative, "normals": angle}
    return {"loss": loss, **terms}


def _held(gradient: Tensor) -> Tensor:
    """The gradient of answers' latents (modalities x B, C, h, w), no picture's longer than the median one's of them.

    A dark or ambiguous picture, or one with something near in front of a far background, has a gradient many times as
    long as others', and would drown what these agree on.
    """
    of_picture = torch.cat([part.flatten(1) for part in gradient.float().chunk(len(MODALITIES))], dim=1)
    length = of_picture.norm(dim=1)
    median = length.sort().values[(len(length) - 1) // 2]
    share = (median / length.clamp(min=1e-12)).clamp(max=1)
    held: Tensor = gradient * share.repeat(len(MODALITIES))[:, None, None, None].to(gradient.dtype)
    return held


def _held_out(config: StagedConfig, device: torch.device) -> Views:
    """Scenes as wide as pictures are labelled, but for what the network cannot divide."""
    d, factor = config.data, config.architecture.vae_factor
    wanted = config.processing_resolution
    height, width = (max(size // factor, 1) * factor for size in (wanted * d.height // d.width, wanted))
    seeds = range(HELD_OUT_SEED, HELD_OUT_SEED + _HELD_OUT)
    views = scenes.view(seeds, height, width, device=device)
    return Views(*(getattr(views, field.name).cpu() for field in fields(Views)))


@torch.no_grad()
def draw(net: Network, views: Views, path: Path) -> str:
    """Draw what the network makes of scenes; the figures to be read beside it.

    A column a scene: the picture; depth, true then predicted, near bright; normals, true then predicted.
    """
    net.modules.eval()
    rgb = views.rgb.to(net.prompt.device)
    depth, normals = (part.cpu() for part in net.answers(net.step(net.encode(rgb * 2 - 1))))
    net.modules.train()
    relative = abs_rel(depth, views.depth, views.mask, DEPTH_RANGE_M)
    angle = mean_angle_deg(normals, views.normals, views.mask)
    truth = losses.normalised_depth(views.depth, views.mask)
    unit = torch.nn.functional.normalize(normals, dim=1)
    rows = [
        views.rgb,
        *(((1 - values.clamp(-1, 1)) / 2)[:, None].expand_as(views.rgb) for values in (truth, depth)),
        *((values + 1) / 2 for values in (views.normals, unit)),
    ]
    draw_sheet(rows, path)
    return f"AbsRel {relative:.3f}, normals {angle:.1f} deg over {len(views.rgb)} scenes, drawn in {path}"


def _save(net: Network, optimizer: Optimizer, position: tuple[int, int], config: StagedConfig, output: Path) -> None:
    """Write the checkpoints, then the state to resume from, whose `position` is the next stage and step."""
    net.save(output / "checkpoint", processing_resolution=config.processing_resolution, dtype=torch.float16)
    state = {"stage": position[0], "step": position[1], "modules": net.modules.state_dict()}
    unfinished = output / "state.pt.partial"
    with unfinished.open("wb") as file:
        torch.save({**state, "optimizer": optimizer.state_dict()}, file)
        file.flush()
        os.fsync(file.fileno())  # or a power cut takes it, and the one before it
    unfinished.replace(output / "state.pt")


def _refuse_another_run(config: StagedConfig, output: Path, stage: int, step: int) -> None:
    """See that the steps so far were this run's, and that of the stage begun only the learning rate has changed."""

    def begun(config: StagedConfig) -> dict[str, Any]:
        run = config.model_dump(mode="json")
        size = run["data"]["height"], run["data"]["width"]
        same = ("seed", "architecture", "start", "mixed_precision", "gradient_clip", "cpu_threads")
        kept = {name: run[name] for name in same}
        going = [
            {**one, "learning_rate": None, "final_learning_rate": None} for one in run["stages"][stage:][: step > 0]
        ]
        return {**kept, "size": size, "stages": [*run["stages"][:stage], *going]}

    told = validated(StagedConfig, read_config(output), where=str(output / "config.json"))
    old, new = begun(told), begun(config)
    if different := [name for name in new if new[name] != old[name]]:
        raise TrainingError(
            f"{output} holds a run with another {', '.join(different)} (see its config.json): train into another "
            "folder, or start over with overwrite"
        )
