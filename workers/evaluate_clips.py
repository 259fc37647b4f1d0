"""`depthmill evaluate --video`, whole: clips, their labels as they are and smoothed, the figures of both."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from depthmill.pipeline.config import LabelConfig, SmoothConfig, make_folder
from depthmill.pipeline.errors import ConfigError, EvaluationError, StoreError
from depthmill.pipeline.evaluation.clip_report import clip_reasons, clip_table, write_clip_report
from depthmill.pipeline.evaluation.clip_score import ClipRow, score_clips
from depthmill.pipeline.evaluation.clips import CLIP_SETS, ClipSet, TrueClip, find_index, open_clips, read_file
from depthmill.pipeline.evaluation.datasets import find
from depthmill.pipeline.evaluation.predictions import Predictions, from_folder, from_store
from depthmill.pipeline.evaluation.samples import Sample, write_picture
from depthmill.pipeline.evaluation.score import Scores
from depthmill.pipeline.room import room_in
from depthmill.pipeline.sources.naming import source_id
from depthmill.pipeline.store import open_store
from depthmill.workers.evaluate import Folder, LabelledStore, claim, keep_figures
from depthmill.workers.label import label
from depthmill.workers.progress import RunConsole, progress_on, warn
from depthmill.workers.smooth import smooth


def evaluate_clips(
    name: str,
    data: Path,
    out: Path,
    what: LabelConfig | LabelledStore | Folder,
    *,
    overwrite: bool = False,
) -> dict[str, Scores[ClipRow]]:
    """Evaluate on clips: label and smooth them, unless they are labelled, score them, and write a report.

    Args:
        name: Of the set (`clips.CLIP_SETS`).
        data: Its index, or a folder that has it; of `rendered`, a folder that it is rendered to if it is not there.
        out: Folder for `metrics.json` and `per_clip.csv`; a labelling run also leaves `pictures/` and `labels.zarr`
            there, and goes on with what an earlier run left.
        what: How to label, or what was labelled.
        overwrite: Replace figures, and label anew, whatever `out` holds.

    Returns:
        The figures of the labels as they are, `raw`, and, where they are smoothed, of those, `smoothed`.

    Raises:
        EvaluationError: If files are missing, of another version of the scenes, not one clip can be scored, or `out` is
            another evaluation's.
        RunStoppedError: If the disk is full, or memory.
        DepthmillError: Also whatever labelling raises.
    """
    console = RunConsole(highlight=False)
    wanted = find(CLIP_SETS, name, "set of clips")
    _see_to(wanted, data, console)
    clips = open_clips(wanted, data)
    make_folder(out)
    with room_in(out):
        frames = [frame for clip in clips for frame in clip.frames]
        samples = [frame.sample for frame in frames]
        if isinstance(what, Folder):
            folder = what.path / name if (what.path / name).is_dir() else what.path
            compared = {"raw": from_folder(folder, samples, "depth")}
        elif isinstance(what, LabelledStore):
            compared = _compared(what.path, samples, console)
        else:
            if what.labels != ("depth",):
                raise ConfigError(f"labels is {list(what.labels)}; clips are scored by depth alone")
            # A clip is a video, however its pictures lie: a long one is not to be squeezed as a corpus's are.
            what = what if what.round_aspect is not None else what.model_copy(update={"round_aspect": False})
            checksums = [(frame.sample.name, zlib.crc32(read_file(frame.picture))) for frame in frames]
            claim(name, wanted.colours, checksums, out, overwrite=overwrite)
            clips = tuple(map(_numbered, clips))
            store, own = _label(wanted, clips, out, what, overwrite, console)
            compared = _compared(store, [frame.sample for clip in clips for frame in clip.frames], console, own)
        if not isinstance(what, LabelConfig):
            keep_figures(name, compared["raw"], out, overwrite=overwrite)
        scores = {}
        with progress_on(console) as progress:
            for which, predictions in compared.items():
                task = progress.add_task(f"scoring {which}", total=len(clips))
                scores[which] = score_clips(wanted, clips, predictions.read, advance=partial(progress.advance, task))
        config = what.model_dump(mode="json") if isinstance(what, LabelConfig) else None
        write_clip_report(out, wanted, scores, compared, config)
        console.print(clip_table(wanted, scores, compared["raw"].checkpoint))
        for line in clip_reasons(scores):
            warn(console, line)
        console.print(f"written: {out / 'metrics.json'}, {out / 'per_clip.csv'}", soft_wrap=True)
        return scores


def _see_to(wanted: ClipSet, data: Path, console: Console) -> None:
    """See that the set is at `data`: the rendered one is made there, or compared with what would be made."""
    try:
        index = find_index(wanted, data)
    except EvaluationError:
        if wanted.name != "rendered":
            raise
        from depthmill.pipeline.training.clips import CAMERAS, SEEDS, export_clips

        total = len(SEEDS) * len(CAMERAS)
        console.print(f"rendering {total} clips to {data}, which takes minutes each; a rerun goes on", soft_wrap=True)
        make_folder(data)
        with room_in(data), progress_on(console) as progress:
            for _ in progress.track(export_clips(data), total=total, description="rendering"):
                pass
    else:
        if wanted.name == "rendered":
            from depthmill.pipeline.training.clips import check_version

            check_version(index.parent)


def _numbered(clip: TrueClip) -> TrueClip:
    """The clip with pictures numbered in order, in a folder of its own: clips may have some in common."""
    names = [f"{clip.name}/{i:06d}" for i in range(len(clip.frames))]
    return replace(
        clip,
        frames=tuple(
            replace(frame, sample=Sample(name, f"{name}{frame.picture.suffix}", "", None))
            for name, frame in zip(names, clip.frames, strict=True)
        ),
    )


def _label(
    wanted: ClipSet, clips: Sequence[TrueClip], out: Path, config: LabelConfig, overwrite: bool, console: Console
) -> tuple[Path, list[str]]:
    """Label each clip as a folder, and smooth it. The store, and its sources; others are of where `out` was before."""
    pictures, store = out / "pictures", out / "labels.zarr"
    if overwrite:
        shutil.rmtree(pictures, ignore_errors=True)
    for frame in (frame for clip in clips for frame in clip.frames):
        path = pictures / frame.sample.picture
        if not path.is_file() and not path.with_suffix(".png").is_file():
            write_picture(read_file(frame.picture), path, colours=wanted.colours)
    inputs = [str(pictures / clip.name) for clip in clips]
    label(inputs, store, config, overwrite=overwrite, retry_failed=True, console=console)
    there, own = open_store(store).sources(), list(map(source_id, inputs))
    done = smooth(store, SmoothConfig.beside(config), sources=[one for one in there if one in own], console=console)
    for name, why in {**done.left_out, **done.unread}.items():
        warn(console, f"not smoothed: {name}: {why}")
    return store, own


def _compared(
    store: str | Path, samples: Sequence[Sample], console: Console, among: Collection[str] | None = None
) -> dict[str, Predictions]:
    """A store's labels as they are and, if all are, smoothed; the console is told if not."""
    found = {"raw": from_store(store, samples, "depth", among=among)}
    try:
        found["smoothed"] = from_store(store, samples, "depth", smooth=True, among=among)
    except (EvaluationError, StoreError) as error:
        warn(console, f"smoothed labels are left out: {error}")
    return found
