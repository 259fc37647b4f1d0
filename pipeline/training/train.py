"""The training loop, on accelerate: one process, many GPUs, many nodes.

What a step is trained on, and every random draw of it, is a function of the step's number. So a run that was stopped
goes on from its last saved state, by the same call, to the same losses as if it had never been stopped: weights, their
average and the optimizer's moments are all there is to remember.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from math import inf, isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from diffusers.training_utils import EMAModel

from depthmill.pipeline.config import make_folder
from depthmill.pipeline.config_files import validated
from depthmill.pipeline.errors import ConfigError, TrainingError
from depthmill.pipeline.model.backend import lacks_gpu_memory, pick_device
from depthmill.pipeline.room import room_in
from depthmill.pipeline.training import start
from depthmill.pipeline.training.batch import Batch, concatenate
from depthmill.pipeline.training.config import TrainConfig
from depthmill.pipeline.training.folder import read_config, refuse_other_kind, write_config
from depthmill.pipeline.training.loader import MicroBatches, augmented, load
from depthmill.pipeline.training.mixing import read_usable
from depthmill.pipeline.training.objectives import Objective
from depthmill.pipeline.training.raycast import DEPTH_RANGE_M
from depthmill.pipeline.training.record import LossTable, abs_rel, draw_sheet, mean_angle_deg
from depthmill.pipeline.training.schedule import learning_rate
from depthmill.pipeline.training.sets import open_set

log = logging.getLogger(__name__)

_LOG_STEPS = 50
_SCALE_BATCHES = 8
# That processes wait for one that downloads, or writes 14 GB to a slow disk: NCCL's own ten minutes end the run.
_WAIT = timedelta(hours=1)
_OVERFLOWS = 30  # in a row: float16's first scale, 2^16, is halved by each, and gradients fit within a few
# What may change when a run goes on: how long it takes and where, not what comes out;
_FREE = (
    *("save_steps", "picture_steps", "loader_workers", "gradient_checkpointing"),
    *("held_out", "held_out_pictures", "save_dtype"),
)
_FREE_OF_SETS = ("path", "render_processes")
# and what a loss that is no longer a number asks for.
_REMEDIES = ("learning_rate", "mixed_precision")


def train(config: TrainConfig, output: Path, *, overwrite: bool = False, device: str | None = None) -> Path:
    """Train, or go on where the same call was stopped.

    Args:
        config: The run.
        output: Folder for the run: `checkpoint/` at the end, `states/` to resume from, `losses.csv`, `tensorboard/`,
            `pictures/` of held-out pictures, `config.json`.
        overwrite: Start over, whatever `output` holds.
        device: `auto` or left out, accelerate picks; `cuda:1` only in one process, since a launch gives each its own.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: If the start cannot be loaded.
        ConfigError: If `device` cannot be trained on, or not in `mixed_precision`.
        TrainingError: If `output` holds a run of another configuration, a training set lacks files, a GPU's memory does
            not suffice, the loss is no longer a number, or float16's gradients keep overflowing.
        RunStoppedError: If the disk is full, or a process that reads pictures was killed.
    """
    make_folder(output)
    try:
        with room_in(output):
            return _train(config, output, overwrite, device)
    except RuntimeError as error:
        if not lacks_gpu_memory(error):
            raise
        raise TrainingError(
            f"batch_size is {config.batch_size}, for which the GPU's memory does not suffice ({error}): free what "
            "others hold of it, or set gradient_checkpointing: true or mixed_precision: bf16, and run again to go on "
            "from the last saved state; or start over with a smaller batch_size and as much more accumulation"
        ) from error


def _train(config: TrainConfig, output: Path, overwrite: bool, device: str | None) -> Path:
    accelerator = _accelerator(config, output, device)
    begun = start.load(config)
    objective = Objective(begun, config).train()
    optimizer = torch.optim.AdamW(
        objective.trained.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    wrapped, optimizer = accelerator.prepare(objective, optimizer)
    average = None
    if config.ema is not None:
        average = EMAModel(objective.trained.parameters(), decay=config.ema)
        accelerator.register_for_checkpointing(average)
    first = 0 if overwrite else _resume(accelerator, config, output)
    if average is not None:
        average.to(accelerator.device)  # what was loaded is on the CPU
    batches = MicroBatches(config)
    held_out = _held_out(config) if accelerator.is_main_process else None
    some = [augmented(read_usable(each, 0, {}), config.augment, np.random.default_rng(0)) for each in batches.sets]
    for batch in some if held_out is None else (*some, held_out):
        objective.check_size(batch.rgb)
    if overwrite:  # now that all there is to read was found
        _remove(accelerator, output)
    if accelerator.is_main_process:
        pictures = [len(each) for each in batches.sets]
        if first and (before := read_config(output).get("pictures", pictures)) != pictures:
            log.warning(
                "the sets have %s pictures, and had %s: from step %d on these come in another order, to other losses "
                "than an unbroken run's; if that matters, stop, put the files back and run again",
                *(pictures, before, first),
            )
        told = config.model_dump(mode="json")
        write_config(output, told | {"processes": accelerator.num_processes, "pictures": pictures})
    accelerator.init_trackers("train")
    if first and not _sheet(output, first).exists():  # a call that was killed had saved that state, and scored nothing
        _score_held_out(accelerator, objective, average, held_out, output, first)
    with LossTable(output / "losses.csv", lambda row: int(row["step"]) <= first) as table:
        for done, row in _steps(accelerator, wrapped, optimizer, batches, first):
            if average is not None:
                average.step(objective.trained.parameters())
            if accelerator.is_main_process:
                table.write({"step": done, **row})
            accelerator.log(row, step=done)
            if done == config.steps or done % config.save_steps == 0:
                _save_state(accelerator, output / "states", done)
            _score_held_out(accelerator, objective, average, held_out, output, done)
    with _averaged(average, objective):
        if accelerator.is_main_process:
            if config.objective == "autoencoder":
                _scale_latents(objective, batches, accelerator.device)
            start.save(begun, output / "checkpoint", config)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return output / "checkpoint"


def _accelerator(config: TrainConfig, output: Path, device: str | None) -> Accelerator:
    asked = pick_device(device) if device and device != "auto" else None
    if asked is not None and asked.type == "cuda" and asked.index is not None:
        torch.cuda.set_device(asked)  # which is what accelerate takes
    accelerator = Accelerator(
        gradient_accumulation_steps=config.accumulation,
        mixed_precision=config.mixed_precision,
        log_with="tensorboard",
        project_dir=output / "tensorboard",
        cpu=device == "cpu",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_WAIT)],
    )
    alone = accelerator.num_processes == 1
    if asked is not None and (accelerator.device.type != asked.type or (asked.index is not None and not alone)):
        raise ConfigError(
            f"device is {device!r}, but accelerate gives this process, one of {accelerator.num_processes}, "
            f"{accelerator.device}: leave out --device"
        )
    if config.mixed_precision == "fp16" and accelerator.scaler is None:  # it would train in float32, and not say so
        raise ConfigError(
            f"mixed_precision is fp16, which is not trained in on {accelerator.device}: give bf16 or no, or a GPU"
        )
    return accelerator


def _steps(
    accelerator: Accelerator, wrapped: torch.nn.Module, optimizer: Any, batches: MicroBatches, first: int
) -> Iterator[tuple[int, dict[str, float]]]:
    """Train from step `first`; after each step, yield how many are done and the table's row."""
    config, trained = batches.config, accelerator.unwrap_model(wrapped).trained
    processes, rank = accelerator.num_processes, accelerator.process_index
    every = config.accumulation * processes  # micro-batches of a step
    numbers = range(first * every + rank, config.steps * every, processes)
    loader = load(batches, numbers, workers=config.loader_workers, pin=accelerator.device.type == "cuda")
    stream = zip(numbers, loader, strict=True)
    started = time.monotonic()
    skipped: set[tuple[int, int]] = set()
    overflows = 0
    for step in range(first, config.steps):
        rate = learning_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        sums: dict[str, torch.Tensor] = {}
        for _ in range(config.accumulation):
            number, loaded = next(stream)
            skipped.update(loaded.skipped)
            with accelerator.accumulate(wrapped):
                terms = wrapped(loaded.batch.to(accelerator.device), _draws(config.seed, number))
                accelerator.backward(terms["loss"])
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(trained.parameters(), config.gradient_clip)
                optimizer.step()
                optimizer.zero_grad()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term.detach() / config.accumulation
        row = {name: float(accelerator.reduce(value, "mean")) for name, value in sums.items()}
        count = accelerator.reduce(torch.tensor(float(len(skipped)), device=accelerator.device), "sum")
        # In float16 a gradient may overflow: accelerate then leaves the step out, and scales less.
        if not isfinite(row["loss"]) or not (isfinite(norm) or config.mixed_precision == "fp16"):
            raise TrainingError(
                f"step {step}: the loss is {row['loss']}, its gradient's norm {float(norm)}; expected numbers: lower "
                "learning_rate, or train in more precision (mixed_precision), then run again to go on from the last "
                "saved state"
            )
        overflowed = int(accelerator.optimizer_step_was_skipped)
        overflows = (overflows + 1) * overflowed
        if overflows >= min(_OVERFLOWS, config.steps):
            raise TrainingError(
                f"step {step}: float16's gradients overflowed at {overflows} steps in a row, which taught nothing; "
                "expected a few, at the start: train with mixed_precision bf16 or no, then run again to go on from the "
                "last saved state"
            )
        done = step + 1
        if accelerator.is_main_process and (done % _LOG_STEPS == 0 or done == config.steps):
            pace = (done - first) / (time.monotonic() - started)
            shown = "  ".join(f"{name} {value:.4f}" for name, value in row.items())
            left = timedelta(seconds=round((config.steps - done) / pace))
            pictures = pace * every * config.batch_size
            log.info("step %d/%d  %s  %.1f pictures/s  %s left", done, config.steps, shown, pictures, left)
        counts = {"overflowed": overflowed, "skipped": float(count)}
        yield done, {"learning_rate": rate, **row, "gradient_norm": float(norm), **counts}


def _draws(seed: int, number: int) -> torch.Generator:
    """Random numbers of one micro-batch."""
    state = int(np.random.SeedSequence((seed, 1, number)).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state)


@torch.no_grad()
def _scale_latents(objective: Objective, batches: MicroBatches, device: torch.device) -> None:
    """Make the VAE's scaling factor one over the standard deviation of pictures' latents, as Stable Diffusion's is.

    Diffusion adds noise of unit variance, and takes it that latents are of the same size (Rombach et al., CVPR 2022,
    appendix G).
    """
    sample = load(batches, range(_SCALE_BATCHES), workers=0, pin=False)
    latents = torch.cat([objective.encode(each.batch.to(device).rgb * 2 - 1).float() for each in sample])
    vae = objective.vae
    vae.register_to_config(scaling_factor=vae.config.scaling_factor / float(latents.std()))


@torch.no_grad()
def score(objective: Objective, batch: Batch, path: Path) -> dict[str, float]:
    """Draw what the network makes of pictures, and score it against the truth.

    A column a picture: the picture; the truth, near bright; the answer. Depth and normals are the single step's,
    whatever is trained; an autoencoder's answer is the truth as it gives it back.

    Returns:
        Figures by name: AbsRel after alignment, of the project's own scenes held to their range of depths, or the mean
        angle in degrees, or the mean absolute difference.
    """
    objective.eval()
    truth = objective.drawn(batch)
    autoencoder = objective.config.objective == "autoencoder"
    draws = _draws(0, 0)
    few = objective.config.batch_size  # as many pictures at once as there is memory for
    if autoencoder:
        answers = [objective.decode(objective.encode(part)) for part in torch.split(truth, few)]
    else:
        answers = [objective.answer(part, draws) for part in torch.split(batch.rgb, few)]
    answer = torch.cat(answers)
    objective.train()
    if autoencoder:
        scores = {"reconstruction": float((answer - truth).abs().mean())}
    elif objective.config.modality == "depth":
        answer = answer.mean(dim=1, keepdim=True).clip(-1, 1).expand_as(truth)
        held_out = objective.config.held_out
        depth_range = DEPTH_RANGE_M if held_out is not None and held_out.kind == "scenes" else (1e-3, inf)
        scores = {"AbsRel": abs_rel(answer[:, 0], batch.target[:, 0], batch.mask, depth_range)}
    else:
        scores = {"mean angle": mean_angle_deg(answer, truth, batch.mask)}
        answer = torch.nn.functional.normalize(answer, dim=1)
    sign = -1 if objective.config.modality == "depth" else 1
    draw_sheet([batch.rgb, *((sign * picture.clip(-1, 1) + 1) / 2 for picture in (truth, answer))], path)
    return scores


def _score_held_out(
    accelerator: Accelerator,
    objective: Objective,
    average: EMAModel | None,
    held_out: Batch | None,
    output: Path,
    step: int,
) -> None:
    """Score held-out pictures, if it is time; the sheet appears once its figures are written."""
    config = objective.config
    if held_out is None or (step != config.steps and step % config.picture_steps):
        return
    sheet = _sheet(output, step)
    partial = sheet.with_suffix(".partial.png")
    with _averaged(average, objective):
        scores = score(objective, held_out.to(accelerator.device), partial)
    log.info("step %d, held out: %s", step, scores)
    accelerator.log({f"held_out/{name}": value for name, value in scores.items()}, step=step)
    partial.replace(sheet)


def _sheet(output: Path, step: int) -> Path:
    return output / "pictures" / f"{step:06d}.png"


@contextmanager
def _averaged(average: EMAModel | None, objective: Objective) -> Iterator[None]:
    """Put the average of the weights in their place for a while, if one is kept."""
    if average is None:
        yield
        return
    parameters = list(objective.trained.parameters())
    average.store(parameters)
    average.copy_to(parameters)
    try:
        yield
    finally:
        average.restore(parameters)


def _held_out(config: TrainConfig) -> Batch | None:
    if config.held_out is None or config.objective == "generative":
        return None
    pictures = open_set(config.held_out, config.modality)
    spread = np.linspace(0, len(pictures) - 1, min(config.held_out_pictures, len(pictures))).round().astype(int)
    unusable: dict[int, str] = {}
    parts = [read_usable(pictures, int(index), unusable) for index in spread]
    # One sheet, one size: that of the first picture.
    return concatenate([part for part in parts if part.rgb.shape == parts[0].rgb.shape])


def _save_state(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Write what the run resumes from; the state before it goes once this one is whole, and on the disk."""
    partial = folder / f"{step:06d}.partial"
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for file in filter(Path.is_file, partial.rglob("*")):
            with file.open("rb") as written:
                os.fsync(written.fileno())  # or a power cut takes it, when the one before it is gone
        older = [path for path in folder.iterdir() if path != partial]
        shutil.rmtree(folder / f"{step:06d}", ignore_errors=True)
        partial.rename(folder / f"{step:06d}")
        for path in older:
            shutil.rmtree(path, ignore_errors=True)
    accelerator.wait_for_everyone()


def _remove(accelerator: Accelerator, output: Path) -> None:
    """Remove an earlier run."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for name in ("states", "tensorboard", "pictures", "checkpoint"):
            shutil.rmtree(output / name, ignore_errors=True)
        for name in ("losses.csv", "state.pt"):
            (output / name).unlink(missing_ok=True)
    accelerator.wait_for_everyone()


def _resume(accelerator: Accelerator, config: TrainConfig, output: Path) -> int:
    """Load the last whole state, if there is one; the number of steps that are done."""
    refuse_other_kind(output, stages=False)
    states = sorted(path for path in (output / "states").glob("*") if path.name.isdigit())
    found = gather_object([states[-1].name if states else "none"])
    if len(set(found)) > 1:
        raise TrainingError(
            f"the last saved state in {output} is {' or '.join(sorted(set(found)))}, as different machines see it; "
            "expected one: give a folder that all of them share (--out)"
        )
    if not states:
        return 0
    document = read_config(output)
    document.pop("pictures", None)
    before = document.pop("processes", 1)
    # Validated, an option that a later version added has its default.
    old = validated(TrainConfig, document, where=str(output / "config.json")).model_dump(mode="json")
    new = config.model_dump(mode="json")
    # A step is the same on more processes if each accumulates less.
    for run, processes in ((old, before), (new, accelerator.num_processes)):
        run["accumulation x processes"] = run.pop("accumulation") * processes
    different = [name for name in new if new[name] != old[name] and name not in _FREE]
    moved = ("sets",) if _where_aside(new["sets"]) == _where_aside(old["sets"]) else ()
    if refused := [name for name in different if name not in (*_REMEDIES, *moved)]:
        shown = ", ".join(f"{name} ({old[name]}, now {new[name]})" for name in refused)
        raise TrainingError(
            f"{output} holds a run with another {shown}: train into another folder, or start over with --overwrite"
        )
    if new["mixed_precision"] == "fp16" != old["mixed_precision"]:
        raise TrainingError(
            f"{output} holds a run with mixed_precision {old['mixed_precision']}, whose states lack what fp16 scales "
            "gradients by: go on with bf16 or no, or start over with --overwrite"
        )
    for name in different if accelerator.is_main_process else ():
        log.warning("from step %s on %s is %s, not %s", states[-1].name, name, new[name], old[name])
    accelerator.load_state(str(states[-1]))
    accelerator.step = 0  # not the micro-batches that as many processes as there were have accumulated so far
    return int(states[-1].name)


def _where_aside(sets: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Training sets as they were configured, but for where they are."""
    return [{name: value for name, value in each.items() if name not in _FREE_OF_SETS} for each in sets]
