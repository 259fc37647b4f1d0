"""The command line: parse, load the configuration, call. Heavy imports stay inside the commands."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, get_args, get_origin

import typer
from typer.core import TyperCommand

from depthmill import __version__
from depthmill.pipeline.errors import (
    ConfigError,
    DepthmillError,
    RunStoppedError,
    StoreFullError,
    printable,
    short_of_memory,
)
from depthmill.workers.stopping import stoppable

if TYPE_CHECKING:
    from pydantic import BaseModel

    from depthmill.pipeline.config import LabelConfig, SmoothConfig

app = typer.Typer(
    name="depthmill",
    help="Depth and surface-normal labels from videos and image corpora, in batch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

# Options and arguments of several commands.
_StoreToRead = Annotated[str, typer.Argument(metavar="STORE", help="A labelled store.")]
_StoreToCheck = Annotated[str, typer.Argument(metavar="STORE", help="A store: a directory, s3:// or gs://.")]
_OverYaml = Annotated[str | None, typer.Option(help="YAML file; the options below win over it.")]
_Checkpoint = Annotated[
    str | None,
    typer.Option(help="Depth checkpoint: a hub id, a directory in diffusers layout, or demo, the embedded toy model."),
]
_NormalsCheckpoint = Annotated[
    str | None, typer.Option(help="The same for normals; default: CHECKPOINT, if it is demo or GeoWizard.")
]
_Labels = Annotated[str | None, typer.Option(help="depth, normals, or depth,normals.")]
_Resolution = Annotated[
    int | None, typer.Option(help="Longer side in pixels at which the model sees a frame; default: CHECKPOINT's.")
]
_Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, xpu or mps; with --workers 0 also cuda:1.")]
_Dtype = Annotated[str | None, typer.Option(help="Of the network.")]
_Workers = Annotated[
    int | None,
    typer.Option(help="Ray workers; 0 labels in this process; default: one for each GPU; on CPUs, for 8 cores."),
]
_Threads = Annotated[
    int | None, typer.Option(help="CPU threads of each worker; default: one for each core, at most 8.")
]
_Address = Annotated[
    str | None,
    typer.Option(
        help="An existing Ray cluster: auto, or ray://host:10001; default: RAY_ADDRESS, else one for this run."
    ),
]

SOME_FAILED, NOT_STARTED, CRASHED, STOPPED = 1, 2, 70, 130
_KEPT = "what is committed stays"
_INTERRUPTED = f"stopped; {_KEPT}"


def main() -> NoReturn:
    """Run a command; its exit status: 0 all well, 1 some failed, 2 nothing could start, 70 a bug, 130 stopped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name can be any bytes, and a terminal ASCII
    with stoppable() as stopped:
        try:
            app()
        except (RunStoppedError, StoreFullError) as error:
            _stopped(error)
        except DepthmillError as error:
            _say(error)
            sys.exit(NOT_STARTED)
        except KeyboardInterrupt:
            _stopped(_INTERRUPTED)
        except SystemExit as end:
            if end.code == STOPPED:  # which is what the parser makes of a KeyboardInterrupt
                _stopped(_INTERRUPTED)
            raise
        except Exception as error:  # Python's own status for it would say that some frames failed
            if stopped.is_set():  # a library that was being imported, say, made this of it
                _stopped(_INTERRUPTED)
            if short_of_memory(error):
                _stopped(f"no memory, or no thread, is left ({error}): raise what limits it, and run again; {_KEPT}")
            traceback.print_exc()
            sys.exit(CRASHED)
        sys.exit(0)


def _stopped(why: object) -> NoReturn:
    """End at once: a signal may have cut off anything, such as the making of a thread that Python would wait for."""
    with suppress(OSError, AttributeError):  # nobody may be there to read it, or no stream at all
        _say(why)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(STOPPED)


def _say(message: object, color: str | None = None) -> None:
    """Write to standard error; that nobody reads it, or its disk is full, changes nothing of what is done."""
    try:
        typer.secho(printable(f"depthmill: {message}"), fg=color, err=True)
    except OSError:
        from depthmill.workers.progress import RunConsole

        RunConsole(stderr=True).on_broken_pipe()


def _show(text: object) -> None:
    """Write to standard output; a reader that goes away, as `head` does, changes no exit status.

    Raises:
        DepthmillError: If it cannot be written for another reason.
    """
    try:
        typer.echo(printable(text))
    except OSError as error:
        from depthmill.workers.progress import RunConsole

        RunConsole().on_broken_pipe()
        if not isinstance(error, BrokenPipeError):
            raise DepthmillError(
                f"standard output cannot be written ({error.strerror}); give it a place where it can, and run again"
            ) from error


def _version(wanted: bool) -> None:
    if wanted:
        _show(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if sys.getfilesystemencoding() != "utf-8":
        raise ConfigError(
            f"file names are {sys.getfilesystemencoding()} in this locale; expected UTF-8, as inputs are called in a "
            "store whatever the locale: set PYTHONUTF8=1"
        )


class _Command(TyperCommand):
    """A command whose help has the choices and defaults of the configuration that its options are keys of."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from depthmill.pipeline.config import LabelConfig, SmoothConfig

        fields = (SmoothConfig if self.name == "smooth" else LabelConfig).model_fields
        option: Any
        for option in self.params:
            field = fields.get(option.opts[0].removeprefix("--").replace("-", "_"))
            if field is None or option.default is not None:
                continue
            kind = field.annotation
            parts = (kind,) if get_origin(kind) is Literal else get_args(kind)
            choices = [word for part in parts for word in get_args(part)]
            known = all(part is NoneType or get_origin(part) is Literal for part in parts)
            if known and not all(word in option.help for word in choices):
                option.help += f" One of {', '.join(choices)}."
            if isinstance(field.default, (str, int, float, tuple)) and "default" not in option.help:
                words = field.default if isinstance(field.default, tuple) else [field.default]
                option.show_default = ",".join("no" if word is False else str(word) for word in words)
        super().format_help(ctx, formatter)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            if error.param is None or error.param.name != "inputs":
                raise
            raise ConfigError(  # of a single argument, the parser misses the inputs
                "expected INPUT... STORE, the last of which is where the labels go, as in "
                "`depthmill label clip.mp4 labels.zarr`"
            ) from None


def _keys(model: type[BaseModel], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a command's arguments that are keys of its configuration."""
    return {key: arguments[key] for key in model.model_fields if key in arguments}


def _label_config(config: str | None, arguments: Mapping[str, Any]) -> LabelConfig:
    """How a command labels, by its file and its arguments; the user is told if that is by the toy."""
    from depthmill.pipeline.config import LabelConfig
    from depthmill.pipeline.config_files import load_config

    settings = load_config(LabelConfig, config, _keys(LabelConfig, arguments))
    if settings.labels_by_default:
        _say(
            "no --checkpoint is given, so the embedded demo model is used, a toy; for labels that you care about: "
            "--config video, --config images, or --checkpoint",
            None if os.environ.get("NO_COLOR") else "yellow",
        )
    return settings


@app.command(cls=_Command)
def label(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT...", help="Videos, images, folders, WebDataset or Parquet shards, globs."),
    ],
    store: Annotated[str, typer.Argument(metavar="STORE", help="Zarr store for the labels; an existing one resumes.")],
    config: Annotated[
        str | None,
        typer.Option(help="YAML file, or one that is shipped: video, images, demo. The options below win over it."),
    ] = None,
    checkpoint: _Checkpoint = None,
    normals_checkpoint: _NormalsCheckpoint = None,
    labels: _Labels = None,
    normals_axes: Annotated[
        str | None,
        typer.Option(help="Where the normals checkpoint's x, y, z point, as left-up-towards; default: as it says."),
    ] = None,
    domain: Annotated[
        str | None, typer.Option(help="Scene that a GeoWizard checkpoint is told of; default: indoor.")
    ] = None,
    processing_resolution: _Resolution = None,
    batch_size: Annotated[
        str | None, typer.Option(help="Frames per forward pass; auto: as many as fit in memory.")
    ] = None,
    compile: Annotated[
        str | None, typer.Option(help="Whether full batches run compiled; auto: on CUDA, in long runs.")
    ] = None,
    device: _Device = None,
    dtype: _Dtype = None,
    normals_dtype: Annotated[str | None, typer.Option(help="Of stored normals.")] = None,
    shard_frames: Annotated[int | None, typer.Option(help="Frames in a shard file.")] = None,
    segment_frames: Annotated[
        int | None,
        typer.Option(help="Frames in a unit of work and commit; default: 64 or so, of corpora on GPUs 2048."),
    ] = None,
    round_aspect: Annotated[
        bool | None,
        typer.Option(
            "--round-aspect/--exact-aspect",
            help="Round aspect ratios so that batches fill; default: only for corpora.",
        ),
    ] = None,
    workers: _Workers = None,
    threads: _Threads = None,
    address: _Address = None,
    attempts: Annotated[int | None, typer.Option(help="Attempts per segment, then per failing frame.")] = None,
    frame_limit_s: Annotated[
        float | None, typer.Option(help="Seconds that a frame may take; default: 60, a large network's on CPUs 600.")
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(help="Pixel limit: larger images fail, larger videos are skipped.")
    ] = None,
    max_frames: Annotated[int | None, typer.Option(help="Inputs with more frames are refused.")] = None,
    steps: Annotated[int | None, typer.Option(help="UNet calls for a label; 1 is what E2E-FT models need.")] = None,
    ensemble: Annotated[
        int | None, typer.Option(help="Predictions per frame that are combined into one (1, or 3 and more).")
    ] = None,
    noise: Annotated[str | None, typer.Option(help="What labels are drawn from.")] = None,
    timestep_spacing: Annotated[
        str | None, typer.Option(help="trailing; leading reproduces the scheduler flaw, for comparison.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed of the noise.")] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Also label frames again that failed in earlier runs.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove an existing store first.")] = False,
    smooth: Annotated[bool, typer.Option("--smooth", help="Then smooth the videos over time.")] = False,
) -> None:
    """Label videos and images: depth and normals of every frame, into a Zarr store.

    Exit status: 0 all labelled, 1 some frames or inputs failed, 2 nothing could start, 130 stopped; a rerun resumes.
    """
    settings = _label_config(config, locals())
    if smooth and "depth" not in settings.labels:
        raise ConfigError(
            f"--smooth is given with labels {', '.join(settings.labels)}; expected depth among them, which is what is "
            "smoothed: add it (--labels depth,normals), or leave out --smooth"
        )
    from depthmill.workers.progress import print_summary, quiet_libraries
    from depthmill.workers.resume import finished

    summary = None if overwrite else finished(inputs, store, settings, retry_failed=retry_failed)
    if summary is None:
        from depthmill.workers.label import label as run

        quiet_libraries()
        summary = run(inputs, store, settings, overwrite=overwrite, retry_failed=retry_failed)
    print_summary(summary)
    smoothed = True
    if smooth:
        from depthmill.pipeline.config import SmoothConfig
        from depthmill.workers.resume import unsmoothed_videos

        if videos := unsmoothed_videos(inputs, store):
            smoothed = _smooth(store, SmoothConfig.beside(settings), videos)
    if summary.failures or not smoothed:
        raise typer.Exit(SOME_FAILED)


@app.command("smooth", cls=_Command)
def smooth_store(
    store: _StoreToRead,
    config: _OverYaml = None,
    source: Annotated[
        list[str] | None, typer.Option(help="Source id; repeat for several; default: all videos.")
    ] = None,
    max_edge: Annotated[int | None, typer.Option(help="Frames between the two of an edge, at most.")] = None,
    flow: Annotated[str | None, typer.Option(help="Quality of the optical flow.")] = None,
    leak: Annotated[float | None, typer.Option(help="Cut-off in radians per frame; slower changes are kept.")] = None,
    filter: Annotated[bool | None, typer.Option(help="Filter labels over five frames as well.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Ray workers; 0 smooths in this process; default: one for each core.")
    ] = None,
    address: _Address = None,
    attempts: Annotated[int | None, typer.Option(help="Attempts per segment.")] = None,
    frame_limit_s: Annotated[float | None, typer.Option(help="Seconds that a frame may take, at most.")] = None,
    max_pixels: Annotated[int | None, typer.Option(help="As in depthmill label.")] = None,
    max_frames: Annotated[int | None, typer.Option(help="As in depthmill label.")] = None,
) -> None:
    """Smooth depth over time: a scale and shift for each frame, beside the labels, which stay as they are.

    Exit status: 0 all smoothed, 1 some sources left out or segments unread, 2 nothing could start, 130 stopped.
    """
    from depthmill.pipeline.config import SmoothConfig
    from depthmill.pipeline.config_files import load_config

    if not _smooth(store, load_config(SmoothConfig, config, _keys(SmoothConfig, locals())), source or []):
        raise typer.Exit(SOME_FAILED)


def _smooth(store: str, settings: SmoothConfig, sources: list[str]) -> bool:
    """Smooth and say how it went; whether all is smoothed."""
    from depthmill.workers.progress import print_smoothed
    from depthmill.workers.smooth import smooth as run

    done = run(store, settings, sources=sources)
    print_smoothed(done, filtered=settings.filter)
    return not done.left_out and not done.unread


@app.command()
def preview(
    store: _StoreToRead,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for pictures; default: labels-preview for labels.zarr, beside it; of a URL, here."),
    ] = None,
    source: Annotated[str | None, typer.Option(help="Id of one source; by default all.")] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames on the contact sheet.")] = 6,
    smooth: Annotated[bool, typer.Option("--smooth", help="Raw and smoothed, side by side and over time.")] = False,
    video: Annotated[bool, typer.Option("--video/--no-video", help="Whether to draw the MP4.")] = True,
    start: Annotated[float, typer.Option(help="Second at which the MP4 begins.")] = 0.0,
    stop: Annotated[float, typer.Option(help="Second at which it ends.")] = float("inf"),
) -> None:
    """Draw a contact sheet (PNG) and a side-by-side video (MP4) of frames, depth and normals.

    Exit status: 0 all drawn, 1 some sources not drawn, or not whole, 2 nothing could start, 130 stopped.
    """
    from depthmill.pipeline.preview import preview as draw

    path = Path(Path(store).name if "://" in store else store).resolve()
    folder = out or path.parent / f"{path.name.removesuffix('.zarr')}-preview"
    drawn = draw(store, folder, source_id=source, frames=frames, smooth=smooth, video=video, start_s=start, stop_s=stop)
    for file in drawn.files:
        _show(file)
    for name, why in drawn.left_out.items():
        _say(f"{name} is not drawn whole: {why}")
    if drawn.left_out:
        raise typer.Exit(SOME_FAILED)


@app.command()
def verify(
    store: _StoreToCheck,
    repair: Annotated[
        bool, typer.Option("--repair", help="Un-commit damaged segments, so that the next label run does them again.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads that read.")] = 8,
) -> None:
    """Check that every committed file of a store is there, decodes, and has the bytes that were written.

    What smoothing wrote can be made again, and has no checksums: that it is there and decodes is all that is checked.

    Exit status: 0 all sound, 1 damage found, repaired or not, 2 not a store, 130 stopped.
    """
    from depthmill.pipeline.store import open_store
    from depthmill.pipeline.store.verify import as_text
    from depthmill.pipeline.store.verify import verify as check

    try:
        found = check(open_store(store), repair=repair, workers=threads)
    except KeyboardInterrupt:
        so_far = "; what was found damaged by then may be un-committed" if repair else ""
        raise RunStoppedError(f"stopped before all was checked{so_far}: run the same command again") from None
    _show(as_text(found, repair))
    if found.damage:
        raise typer.Exit(SOME_FAILED)


@app.command()
def inspect(
    store: _StoreToCheck,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, of every source, as JSON.")] = False,
) -> None:
    """Say what is in a store: sources, frames, sizes, checkpoint, rate, failures by reason."""
    from depthmill.pipeline.store import open_store
    from depthmill.pipeline.store.inspect import as_text
    from depthmill.pipeline.store.inspect import inspect as look

    found = look(open_store(store))
    if as_json:
        import json
        from dataclasses import asdict

        _show(json.dumps(asdict(found), indent=2))
    else:
        _show(as_text(found))


@app.command()
def train(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, as configs/train-marigold-depth.yaml.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; by default runs/ and the name of CONFIG.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or, in one process, cuda:1; xpu and mps where torch has them.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over, whatever the folder holds.")] = False,
) -> None:
    """Train a checkpoint; the same command goes on where it was stopped.

    On several GPUs or machines: accelerate launch --module depthmill.cli train CONFIG.

    Exit status: 0 trained, 2 it could not start or go on, 130 stopped, as by a full disk; a rerun resumes.
    """
    import logging

    from depthmill.workers.progress import quiet_libraries

    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("depthmill").setLevel(logging.INFO)
    quiet_libraries()
    folder = out or Path("runs") / Path(config).stem
    if os.environ.get("WORLD_SIZE", "1") != "1":  # in C it waits for others, and hears no handler of Python's
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    before, trained = _began(folder), None
    with suppress(KeyboardInterrupt):
        trained = _train(config, folder, overwrite, device)
    if trained is None:  # and all it held is gone, such as processes that read pictures, and what is shared with them
        begun = overwrite and _began(folder) not in (None, before)  # until then what is to be replaced is there
        again = "the same command again, without --overwrite," if begun else "the same command again"
        raise RunStoppedError(
            f"stopped: what is saved in {folder} stays, as do rendered scenes; run {again} to go on from there"
        )
    _show(trained)


def _began(folder: Path) -> int | None:
    """When the run in a folder was begun, or gone on with, in nanoseconds; None if there is none."""
    try:
        return (folder / "config.json").stat().st_mtime_ns
    except OSError:
        return None


def _train(config: str, folder: Path, overwrite: bool, device: str | None) -> Path:
    from depthmill.pipeline.config_files import load_config, load_yaml

    if "stages" in load_yaml(config):
        from depthmill.pipeline.training.from_scratch.config import StagedConfig
        from depthmill.pipeline.training.from_scratch.train import train as run_stages

        return run_stages(load_config(StagedConfig, config, {}), folder, overwrite=overwrite, device=device)
    from depthmill.pipeline.training.config import TrainConfig

    try:
        from depthmill.pipeline.training.train import train as run
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"training needs {error.name}, which is not installed: pip install 'depthmill[train]'"
        ) from error
    return run(load_config(TrainConfig, config, {}), folder, overwrite=overwrite, device=device)


@app.command(cls=_Command)
def evaluate(
    name: Annotated[
        str,
        typer.Argument(
            metavar="SET",
            help="Depth: nyuv2, kitti, eth3d, scannet, diode. Normals: nyuv2-normals, scannet-normals, ibims, sintel. "
            "With --video: sintel, scannet, kitti, bonn, nyuv2, rendered.",
        ),
    ],
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="The set's tar, or its folder; with --video its index, or folder.")
    ],
    video: Annotated[
        bool, typer.Option("--video", help="Clips: depth under one scale and shift a clip, raw and smoothed, and TAE.")
    ] = False,
    checkpoint: Annotated[
        str | None, typer.Option(help="What to evaluate: a hub id, a directory in diffusers layout, or demo.")
    ] = None,
    store: Annotated[str | None, typer.Option(help="Score this labelled store instead.")] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="Score this folder of .npy instead, named after the pictures.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the report; by default evaluations/ and SET.")] = None,
    split: Annotated[
        Path | None, typer.Option(help="Text file of the pictures to use, suffixes may be left out; default: all.")
    ] = None,
    config: Annotated[str | None, typer.Option(help="YAML file of labelling options; those below win over it.")] = None,
    normals_axes: Annotated[
        str | None, typer.Option(help="Where x, y and z of the checkpoint's, or the folder's, normals point.")
    ] = None,
    domain: Annotated[
        str | None, typer.Option(help="Scene, for GeoWizard checkpoints; default: indoor; sintel's normals: outdoor.")
    ] = None,
    processing_resolution: Annotated[
        int | None,
        typer.Option(
            help="Longer side in pixels that the model sees; by default the paper's, with --video CHECKPOINT's."
        ),
    ] = None,
    batch_size: Annotated[str | None, typer.Option(help="Pictures per forward pass.")] = None,
    device: _Device = None,
    dtype: Annotated[str | None, typer.Option(help="Of the network; by default float32, with --video auto.")] = None,
    workers: _Workers = None,
    threads: _Threads = None,
    address: _Address = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Label anew; replace figures, even another evaluation's.")
    ] = False,
) -> None:
    """Measure a checkpoint, a labelled store or a folder of predictions on a public set.

    With --video on clips, as Video-Depth-Anything's benchmark lays them out; `rendered` renders its own to DATA.

    Exit status: 0 all pictures scored, 1 some skipped, 2 nothing could start, 130 stopped; a rerun resumes.
    """
    from depthmill.pipeline.config import LabelConfig
    from depthmill.pipeline.evaluation.clips import CLIP_SETS
    from depthmill.pipeline.evaluation.datasets import SETS, find
    from depthmill.pipeline.geometry import STORED_AXES
    from depthmill.workers.evaluate import Folder, LabelledStore, label_options
    from depthmill.workers.evaluate import evaluate as run
    from depthmill.workers.progress import quiet_libraries

    options = _keys(LabelConfig, locals())
    if video and split is not None:
        raise ConfigError("--split names pictures of a set; with --video give an index of the clips to use as DATA")
    if not video and name in CLIP_SETS and name not in SETS:
        raise ConfigError(f"{name} is a set of clips: add --video")
    wanted = None if video else find(SETS, name)
    given = {key: value for key, value in {**options, "config": config}.items() if value is not None}
    if store is not None and predictions is not None:
        raise ConfigError("--store and --predictions are both given: expected one of them")
    if predictions is not None:
        given.pop("normals_axes", None)
    if given and (store or predictions) is not None:
        flags = ", ".join(f"--{key.replace('_', '-')}" for key in given)
        raise ConfigError(
            f"{flags} would label pictures, but --store or --predictions are labels already: leave out one"
        )
    if predictions is not None:
        what: Folder | LabelledStore | LabelConfig = Folder(predictions, normals_axes or STORED_AXES)
    elif store is not None:
        what = LabelledStore(store)
    else:
        labelled = label_options(wanted, options) if wanted else {**options, "labels": ("depth",)}
        what = _label_config(config, labelled)
    quiet_libraries()
    if wanted is None:
        from depthmill.workers.evaluate_clips import evaluate_clips

        scores = evaluate_clips(name, data, out or Path("evaluations") / f"{name}-video", what, overwrite=overwrite)
        if any(one.skipped for one in scores.values()):
            raise typer.Exit(SOME_FAILED)
    elif run(wanted, data, out or Path("evaluations") / name, what, split=split, overwrite=overwrite).skipped:
        raise typer.Exit(SOME_FAILED)


@app.command(cls=_Command)
def bench(
    uri: Annotated[
        str | None,
        typer.Option("--input", help="Input to measure reading and writing with: a video, a folder, a shard."),
    ] = None,
    frames: Annotated[
        int, typer.Option(min=1, help="Frames of it that are read, and written, in a round, and labelled as in a run.")
    ] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of measurement.")] = 5,
    folder: Annotated[
        Path | None, typer.Option(help="Folder on the disk whose write speed is measured; by default TMPDIR, or /tmp.")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Time diffusers' pipelines compiled, too, which takes minutes.")
    ] = False,
    config: _OverYaml = None,
    checkpoint: _Checkpoint = None,
    normals_checkpoint: _NormalsCheckpoint = None,
    labels: _Labels = None,
    processing_resolution: _Resolution = None,
    batch_size: Annotated[str | None, typer.Option(help="Frames per forward pass.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, xpu or mps.")] = None,
    dtype: _Dtype = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of the network; default: one for each core, at most 8.")
    ] = None,
) -> None:
    """Measure how fast this machine labels, and say what to change.

    Beside diffusers' pipelines, the machine's own matrix products and, with --input, reading, writing and a whole run.
    """
    settings = _label_config(config, locals())
    from depthmill.pipeline.bench.bench import bench as measure
    from depthmill.workers.progress import quiet_libraries

    quiet_libraries()
    _show(measure(settings, uri, frames=frames, rounds=rounds, folder=folder, compiled=compiled))


if __name__ == "__main__":
    main()
