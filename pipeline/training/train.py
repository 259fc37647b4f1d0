"""The training loop: stages of steps, each step's batch and learning rate functions of its number alone.

So a run that was stopped goes on from its last saved state, by the same call, to the same losses as if it had never
been stopped: weights and the optimizer's moments are all there is to remember.
"""

from __future__ import annotations

import csv
import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from depthmill.pipeline.errors import TrainingError
from depthmill.pipeline.training import config as config_module
from depthmill.pipeline.training import data, losses, network, scenes
from depthmill.pipeline.training.config import Stage, TrainConfig
from depthmill.pipeline.training.network import Network
from depthmill.pipeline.training.pool import Pool, open_pool
from depthmill.pipeline.training.raycast import Views

logger = logging.getLogger(__name__)

# Scenes from this seed on are never trained on: pools count up from 0.
HELD_OUT_SEED = 1_000_000_000
_HELD_OUT = 16
_LOG_STEPS = 50
_COLUMNS = ("stage", "step", "learning_rate", "loss", "depth", "anchor", "normals", "reconstruction", "gradient_norm")


def train(config: TrainConfig | Path, output: Path, *, overwrite: bool = False, device: str | None = None) -> Path:
    """Train, or go on where the same call was stopped.

    Args:
        config: The run, or the YAML file that describes it.
        output: Folder for the run: `checkpoint/depth` and `checkpoint/normals` (half precision, what `depthmill label`
            takes), `state.pt` (to resume), `losses.csv`, `pictures/` of held-out scenes, `config.json`.
        overwrite: Start over, whatever `output` holds.
        device: Where to train; a GPU if there is one.

    Returns:
        The folder of the checkpoints.

    Raises:
        TrainingError: If `output` holds a run of another configuration, or the loss is no longer a number.
    """
    if isinstance(config, Path):
        config = config_module.load(config)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    output.mkdir(parents=True, exist_ok=True)
    net = network.build(config.architecture, config.seed, where)
    state = {"stage": 0, "step": 0}
    optimizer_state = None
    state_path = output / "state.pt"
    if state_path.exists() and not overwrite:
        saved = torch.load(state_path, map_location=where, weights_only=True)
        state = {"stage": saved["stage"], "step": saved["step"]}
        _refuse_another_run(config, output, state["stage"])
        net.modules.load_state_dict(saved["modules"])
        optimizer_state = saved["optimizer"]
    (output / "config.json").write_text(config.model_dump_json(indent=2) + "\n")
    table = _open_table(output / "losses.csv", config, state)

    d = config.data
    held_out = _held_out(config)
    for index in range(state["stage"], len(config.stages)):
        stage = config.stages[index]
        first = state["step"] if index == state["stage"] else 0
        optimizer = torch.optim.AdamW(_trained(net, stage), lr=stage.learning_rate, fused=True)
        if first:
            optimizer.load_state_dict(optimizer_state)
        pool = open_pool(d.pool, stage.scenes, d.height, d.width, processes=d.render_processes)
        logger.info("stage %s: %d steps from step %d, %d scenes", stage.name, stage.steps, first, len(pool))
        mark = time.monotonic(), first
        for step in range(first, stage.steps):
            row = _step(net, optimizer, pool, stage, config, index, step)
            table.writerow([stage.name, step, *row.values()])
            done = step + 1
            if done % _LOG_STEPS == 0 or done == stage.steps:
                pace = (done - mark[1]) * stage.batch_size / (time.monotonic() - mark[0])
                mark = time.monotonic(), done
                shown = "  ".join(f"{name} {value:.4f}" for name, value in row.items() if value == value)
                logger.info("%s %d/%d  %s  %.1f pictures/s", stage.name, done, stage.steps, shown, pace)
            if stage.objective == "end_to_end" and (done % config.picture_steps == 0 or done == stage.steps):
                figures = draw(net, held_out, output / "pictures" / f"{index}-{stage.name}-{done:06d}.png")
                logger.info("%s %d/%d  held out: %s", stage.name, done, stage.steps, figures)
            if done % config.save_steps == 0 or done == stage.steps:
                finished = done == stage.steps
                position = {"stage": index + finished, "step": 0 if finished else done}
                _save(net, optimizer, position, config, output)
                table.flush()
    table.close()
    return output / "checkpoint"


def _step(
    net: Network,
    optimizer: torch.optim.Optimizer,
    pool: Pool,
    stage: Stage,
    config: TrainConfig,
    index: int,
    step: int,
) -> dict[str, float]:
    """One optimizer step; the row of the loss table, less the stage's name and the step."""
    rate = learning_rate(stage, step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    views = data.batch(pool, stage, config.seed * 1000 + index, step)
    views = Views(*(getattr(views, name).to(net.prompt.device) for name in ("rgb", "depth", "normals", "mask")))
    terms = _autoencoder(net, views) if stage.objective == "autoencoder" else _end_to_end(net, views, stage)
    loss = terms["loss"]
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.clip_grad_norm_(_trained(net, stage), config.gradient_clip)
    if not bool(torch.isfinite(norm)):
        raise TrainingError(
            f"stage {stage.name!r}, step {step}: the loss is {float(loss.detach())} and its gradient's norm {float(norm)}; "
            "lower learning_rate, then run again to go on from the last saved state"
        )
    optimizer.step()
    values = {
        "learning_rate": rate,
        **{name: float(term.detach()) for name, term in terms.items()},
        "gradient_norm": float(norm),
    }
    return {name: values.get(name, float("nan")) for name in _COLUMNS[2:]}


def learning_rate(stage: Stage, step: int) -> float:
    """Linear warm-up, then exponential decay to a share of the peak at the stage's last step."""
    decay = stage.final_learning_rate ** (step / max(stage.steps - 1, 1))
    return stage.learning_rate * min((step + 1) / stage.warmup_steps, 1.0) * decay


def _trained(net: Network, stage: Stage) -> list[torch.nn.Parameter]:
    # The paper freezes the VAE, which it was given; one trained for minutes has to go on learning with the UNets.
    modules = net.modules["vae"] if stage.objective == "autoencoder" else net.modules
    return list(modules.parameters())


def _autoencoder(net: Network, views: Views) -> dict[str, Tensor]:
    """The VAE gives back a third of the scenes as pictures, a third as depth, a third as normals.

    Latents are held, weakly, to unit size for the UNet's sake.
    """
    depth = data.normalised_depth(views.depth, views.mask)[:, None].expand_as(views.normals)
    pictures = torch.cat([views.rgb[0::3] * 2 - 1, depth[1::3], views.normals[2::3]])
    latent = net.encode(pictures)
    reconstruction = (net.decode(latent) - pictures).abs().mean()
    size = latent.square().mean()
    return {"loss": reconstruction + 1e-2 * (size - 1).clamp(min=0), "reconstruction": reconstruction}


def _end_to_end(net: Network, views: Views, stage: Stage) -> dict[str, Tensor]:
    """The paper's losses on the decoded single step, and the anchor."""
    depth, normals = net.predict(views.rgb)
    target = data.normalised_depth(views.depth, views.mask)
    # The affine-invariant loss is proportional to its target's unit. Metres would weigh a street a hundred times a
    # table top, so each scene is measured in its own range of depth: two units wide, as the anchor's is.
    affine = losses.depth_loss(depth, target, views.mask)
    anchor = (depth - target).abs().mean()
    angle = losses.normals_loss(normals, views.normals, views.mask)
    loss = affine + stage.anchor * anchor + angle
    return {"loss": loss, "depth": affine, "anchor": anchor, "normals": angle}


def _held_out(config: TrainConfig) -> Views:
    d = config.data
    width = config.processing_resolution
    seeds = range(HELD_OUT_SEED, HELD_OUT_SEED + _HELD_OUT)
    return scenes.view(seeds, width * d.height // d.width, width)


@torch.no_grad()
def draw(net: Network, views: Views, path: Path) -> str:
    """Draw what the network makes of scenes; the figures to be read beside it.

    A column a scene: the picture; depth, true then predicted, near bright; normals, true then predicted.
    """
    net.modules.eval()
    depth, normals = (part.cpu() for part in net.predict(views.rgb.to(net.prompt.device)))
    net.modules.train()
    relative = losses.abs_rel(depth, views.depth, views.mask).nanmean()
    angle = losses.angles_deg(normals, views.normals)[views.mask].mean()
    truth = data.normalised_depth(views.depth, views.mask)
    unit = torch.nn.functional.normalize(normals, dim=1)
    rows = [
        views.rgb,
        *(((1 - values.clamp(-1, 1)) / 2)[:, None].expand_as(views.rgb) for values in (truth, depth)),
        *((values + 1) / 2 for values in (views.normals, unit)),
    ]
    sheet = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((sheet * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(path)
    return f"AbsRel {relative:.3f}, normals {angle:.1f} deg over {len(views.rgb)} scenes, drawn in {path}"


def _save(
    net: Network, optimizer: torch.optim.Optimizer, position: dict[str, int], config: TrainConfig, output: Path
) -> None:
    net.save(output / "checkpoint", processing_resolution=config.processing_resolution, dtype=torch.float16)
    partial = output / "state.pt.partial"
    torch.save({**position, "modules": net.modules.state_dict(), "optimizer": optimizer.state_dict()}, partial)
    partial.replace(output / "state.pt")


def _refuse_another_run(config: TrainConfig, output: Path, stage: int) -> None:
    """Stages that have not begun, paths and intervals may change between two calls; nothing else may."""

    def begun(run: dict[str, Any]) -> dict[str, Any]:
        size = run["data"]["height"], run["data"]["width"]
        kept = {name: run[name] for name in ("seed", "architecture", "gradient_clip")}
        return json.loads(json.dumps({**kept, "size": size, "stages": run["stages"][: stage + 1]}))  # type: ignore[no-any-return]

    path = output / "config.json"
    old, new = begun(json.loads(path.read_text())), begun(config.model_dump(mode="json"))
    if different := [name for name in new if new[name] != old[name]]:
        raise TrainingError(
            f"{output} holds a run with another {', '.join(different)} (see {path}): train into another folder, or start "
            "over with overwrite"
        )


class _Table:
    """The loss table, cut back to where the run resumes."""

    def __init__(self, path: Path, rows: list[list[str]]) -> None:
        self._file = path.open("w", newline="")
        self._writer = csv.writer(self._file)
        self._writer.writerow(_COLUMNS)
        self._writer.writerows(rows)
        self.writerow = self._writer.writerow
        self.flush = self._file.flush
        self.close = self._file.close


def _open_table(path: Path, config: TrainConfig, state: dict[str, int]) -> _Table:
    finished = {stage.name for stage in config.stages[: state["stage"]]}
    current = config.stages[state["stage"]].name if state["stage"] < len(config.stages) else ""
    rows: list[list[str]] = []
    if path.exists() and (finished or state["step"]):
        with path.open(newline="") as file:
            for row in list(csv.reader(file))[1:]:
                if row[0] in finished or (row[0] == current and int(row[1]) < state["step"]):
                    rows.append(row)
    return _Table(path, rows)
