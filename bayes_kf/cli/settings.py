"""A `KalmanConfig` from a file and from flags: every field has one, with the field's own documentation."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bayes_kf.inference.config import KalmanConfig

FLAGS = {"rank": "covariance-rank"}  # --rank is the adapter's
ELSEWHERE = ("seed",)  # a flag of every command
PREFIX = "setting_"
NAMED = {"loko": KalmanConfig.loko, "dataset": KalmanConfig.dataset}


def add_setting_flags(parser: argparse.ArgumentParser) -> None:
    """Adds ``--config`` and a flag for each setting."""
    group = parser.add_argument_group("filter")
    group.add_argument(
        "--config",
        metavar="PATH",
        help="settings: a JSON file, a folder with kalman_config.json, or the word loko or dataset",
    )
    described = _descriptions()
    for field in dataclasses.fields(KalmanConfig):
        if field.name in ELSEWHERE:
            continue
        flag = "--" + FLAGS.get(field.name, field.name).replace("_", "-")
        kind: dict[str, Any] = {"type": _value, "metavar": "VALUE"}
        if isinstance(field.default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        default = "" if field.default is None else f" (default: {field.default})"
        text = f"{described.get(field.name, '')}{default}".replace("%", "%%")
        group.add_argument(flag, dest=PREFIX + field.name, default=argparse.SUPPRESS, help=text, **kind)


def read_settings(args: argparse.Namespace) -> KalmanConfig:
    """The settings of ``--config``, with those given by flags in their place.

    Raises:
        ValueError: if the file is unreadable, holds unknown fields, or a value will not do.
    """
    given = {name.removeprefix(PREFIX): value for name, value in vars(args).items() if name.startswith(PREFIX)}
    if args.seed is not None:
        given["seed"] = args.seed
    if args.config is None:
        return KalmanConfig(**given)
    if args.config in NAMED:
        return NAMED[args.config](**given)
    return KalmanConfig(**(_read(Path(args.config)) | given))


def _read(path: Path) -> dict[str, Any]:
    """The fields in a file."""
    if path.is_dir():
        return dataclasses.asdict(KalmanConfig.from_pretrained(path))
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"`--config` must be a readable JSON file, got {path}: {error}.") from error
    known = [field.name for field in dataclasses.fields(KalmanConfig)]
    if not isinstance(fields, dict):
        raise ValueError(f"`--config` must hold a JSON object, got {type(fields).__name__} in {path}.")
    for name in fields:
        if name not in known:
            raise ValueError(f"`--config` must hold fields among {', '.join(known)}, got {name!r} in {path}.")
    return fields


def _value(text: str) -> float | str | dict[str, Any] | None:
    """A number, None, a JSON object, or the word itself; the configuration says whether it will do.

    Example:
        >>> _value("3"), _value("0.5"), _value("none"), _value("diagonal"), _value('{"rank": [3, 20]}')
        (3, 0.5, None, 'diagonal', {'rank': [3, 20]})
    """
    if text.lower() == "none":
        return None
    readers: list[Callable[[str], Any]] = [int, float, *([json.loads] if text.startswith("{") else [])]
    for read in readers:
        try:
            return read(text)
        except ValueError:
            continue
    return text


def _descriptions() -> dict[str, str]:
    """What the configuration's docstring says about each field."""
    lines = (inspect.getdoc(KalmanConfig) or "").partition("Attributes:")[2].partition("\n\n")[0]
    found = re.findall(r"^ {4}(\w+): (.*?)(?=^ {4}\w+: |\Z)", lines, flags=re.MULTILINE | re.DOTALL)
    return {name: " ".join(text.replace("`", "").split()) for name, text in found}
