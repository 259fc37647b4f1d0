"""Configurations out of YAML files, and what cannot be used in them in words."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from depthmill.pipeline.config import LabelConfig, SmoothConfig
from depthmill.pipeline.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)

_OPTIONS_ALONE = ("overwrite", "retry_failed", "smooth")  # of depthmill label; a file has no such keys


def load_config(model: type[Model], path: str | Path | None, overrides: Mapping[str, Any]) -> Model:
    """Read a YAML file into `model`, with `overrides` that are not None on top.

    Args:
        model: The pydantic model that says what is allowed.
        path: A YAML file; or the bare name of one that ships for this model (`video`); or None for the defaults.
        overrides: Values that win over the file: the command line's. With a `checkpoint` among them, the file's
            `normals_checkpoint`, which goes with the file's own, does not count.

    Raises:
        ConfigError: If the file cannot be read, or a key or value is not allowed; names each of them.
    """
    values = {} if path is None else load_yaml(path, model)
    if overrides.get("checkpoint") is not None:
        values.pop("normals_checkpoint", None)
    values |= {key: value for key, value in overrides.items() if value is not None}
    return validated(model, values, where="the options" if path is None else f"{path} with the command line's options")


def load_yaml(path: str | Path, model: type[BaseModel] | None = None) -> dict[str, Any]:
    """Read a YAML file, or one that ships for `model` (None: a training run's), without looking at what it says.

    Raises:
        ConfigError: If it cannot be read, has a key twice, or holds something else than keys and values.
    """
    text = _read(Path(path), model)
    try:
        loaded = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # PyYAML lets pass what Python says of 2026-13-01
        raise ConfigError(f"{path} is no YAML that can be used: {error}") from error
    if not isinstance(loaded, dict | None):
        raise ConfigError(f"{path} holds data of type {type(loaded).__name__}; expected `key: value` lines")
    return loaded or {}


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which PyYAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} is there twice; leave out one", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def validated(model: type[Model], values: Mapping[str, Any], *, where: str) -> Model:
    """Make a `model` of `values`.

    Raises:
        ConfigError: If a key or value is not allowed; names each of them. `where` says where they came from.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError("\n  ".join([f"{where} cannot be used:", *_problems(model, error)])) from error


def _problems(model: type[BaseModel], error: ValidationError) -> list[str]:
    """A line for each key or value that is not allowed, and one with the model's keys if one is like none of them."""
    problems, unknown = [], False
    items = error.errors(include_url=False)
    for item in items:
        loc, key = item["loc"], ".".join(map(str, item["loc"]))
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden" and key in _OPTIONS_ALONE and model is LabelConfig:
            message = f"no key, only an option of depthmill label: --{key.replace('_', '-')}"
        elif item["type"] == "extra_forbidden":
            close = get_close_matches(key, model.model_fields, 1) if len(loc) == 1 else []
            message = f"no such key; did you mean {close[0]}?" if close else "no such key"
            unknown = unknown or (len(loc) == 1 and not close)
        elif item["type"] == "too_short" and any(other["loc"][: len(loc)] == loc != other["loc"] for other in items):
            continue  # its parts are there, but not as they should be
        elif item["type"] != "missing" and key:
            message += f" (got {item['input']!r})"
        problems.append(f"{key}: {message}" if key else message)
    return [*problems, f"expected some of: {', '.join(model.model_fields)}"] if unknown else problems


def _read(path: Path, model: type[BaseModel] | None) -> str:
    folder = resources.files("depthmill.configs")
    every = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    names = [
        name for name in every if name.startswith("train-") != (model is LabelConfig) and model is not SmoothConfig
    ]
    name = path.name.removesuffix(".yaml")
    is_name = not path.is_file() and path.name == str(path)
    if is_name and name in names:
        return (folder / f"{name}.yaml").read_text(encoding="utf-8")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        if is_name and name in every:
            reason = "what ships under that name is for another command"
        ships = f", or one of the names that ship: {', '.join(names)}" if names else ""
        close = get_close_matches(name, names, 1)
        raise ConfigError(
            f"the configuration {path} cannot be read ({reason}); give the path of a YAML file{ships}"
            + (f". Did you mean {close[0]}?" if close else "")
        ) from error
