"""A `KalmanConfig` from a file and from flags. Every field has a flag with the documentation of the field.

The flags come from the JSON schema in the package, so ``--help`` does not import PyTorch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayes_kf.validation import did_you_mean

if TYPE_CHECKING:
    from bayes_kf.inference.config import KalmanConfig

FLAGS = {"rank": "covariance-rank"}  # --rank is the rank of the adapter
ELSEWHERE = ("seed",)  # all commands have this flag
PREFIX = "setting_"
NAMED = ("loko", "dataset", "stream")  # class methods of KalmanConfig
YAML = (".yaml", ".yml")


def add_setting_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--config`` and a flag for each setting."""
    group = parser.add_argument_group("filter")
    group.add_argument(
        "--config",
        metavar="PATH",
        help="settings: a YAML or JSON file, a folder with kalman_config.json, or the word loko, dataset or stream",
    )
    for name, setting in _described_settings().items():
        if name in ELSEWHERE:
            continue
        flag = "--" + FLAGS.get(name, name).replace("_", "-")
        kind: dict[str, Any] = {"type": _value, "metavar": "VALUE"}
        if setting.get("type") == "boolean":
            kind = {"action": argparse.BooleanOptionalAction}
        if "enum" in setting:
            kind = {"choices": setting["enum"]}
        default = "" if setting["default"] is None else f" (default: {setting['default']})"
        text = f"{setting['description']}{default}".replace("%", "%%")
        group.add_argument(flag, dest=PREFIX + name, default=argparse.SUPPRESS, help=text, **kind)


def _described_settings() -> dict[str, dict[str, Any]]:
    """Type, default and description of every setting, by name."""
    text = (resources.files("bayes_kf") / "inference" / "kalman_config.schema.json").read_text(encoding="utf-8")
    settings: dict[str, dict[str, Any]] = json.loads(text)["properties"]
    return settings


def gives_settings(args: argparse.Namespace) -> bool:
    """Whether the arguments include ``--config`` or the flag of a setting; ``--seed`` does not count."""
    return args.config is not None or any(name.startswith(PREFIX) for name in vars(args))


def read_settings(args: argparse.Namespace) -> KalmanConfig:
    """The settings of ``--config``; flags replace them.

    Raises:
        ValueError: if the file is unreadable, or holds unknown settings or bad values.
    """
    from bayes_kf.inference.config import KalmanConfig

    flags = {name.removeprefix(PREFIX): value for name, value in vars(args).items() if name.startswith(PREFIX)}
    if args.seed is not None:
        flags["seed"] = args.seed
    if args.config is None:
        return KalmanConfig(**flags)
    if args.config in NAMED:
        return getattr(KalmanConfig, args.config)(**flags)
    path = Path(args.config)
    if not path.exists() and not path.suffix and path.name == args.config:
        words, nearest = ", ".join(NAMED), did_you_mean(args.config, NAMED) or "."
        raise ValueError(f"`--config` must be a file, a folder, or one of {words}, got {args.config!r}{nearest}")
    if path.suffix.lower() in YAML and not path.is_dir():
        return _from_yaml(path, flags)
    return KalmanConfig(**(_read(path) | flags))


def _read(path: Path) -> dict[str, Any]:
    """The settings in a JSON file, or in the folder of a configuration."""
    from bayes_kf.inference.config import KalmanConfig, check_setting

    if path.is_dir():
        try:
            return dataclasses.asdict(KalmanConfig.from_pretrained(path))
        except ValueError as error:
            raise ValueError(str(error).replace("`folder`", "`--config`")) from error
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"`--config` must be a readable JSON file, got {path}: {error}.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"`--config` must hold a JSON object, got {type(fields).__name__} in {path}.")
    for name in fields:
        check_setting(name, "`--config` must hold settings of KalmanConfig", f" in {path}")
    return fields


def _from_yaml(path: Path, flags: dict[str, Any]) -> KalmanConfig:
    """The settings of a YAML file; flags replace them. Errors name the line of the file.

    Raises:
        ValueError: if the file is unreadable, or holds unknown or repeated settings or bad values.
    """
    import yaml

    from bayes_kf.inference.config import KalmanConfig, check_setting

    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        fields = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"`--config` must be a readable YAML file, got {path}: {error}.") from error
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise ValueError(f"`--config` must be YAML, got {path}{line}: {error.problem}.") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"`--config` must be YAML, got {path}: {error}.") from error
    if not isinstance(root, yaml.MappingNode) or not isinstance(fields, dict):
        raise ValueError(f"`--config` must hold a mapping from settings to values, got {path}.")
    lines: dict[str, int] = {}
    for key, _ in root.value:
        name, line = key.value, key.start_mark.line + 1
        check_setting(name, "`--config` must hold settings of KalmanConfig", f" in {path}, line {line}")
        if name in lines:
            raise ValueError(f"`--config` must hold a field once, got {name!r} again in {path}, line {line}.")
        lines[name] = line
    read = {
        name: _value(value) if isinstance(value, str) else value for name, value in fields.items()
    }  # YAML reads 1e-3 as text
    try:
        return KalmanConfig(**(read | flags))
    except (ValueError, TypeError) as error:
        name = next((n for n in re.findall(r"`(\w+)`", str(error)) if n in lines and n not in flags), None)
        place = f"{path}, line {lines[name]}" if name else str(path)
        raise ValueError(f"{str(error).rstrip('.')} ({place}).") from error


def _value(text: str) -> float | str | dict[str, Any] | None:
    """The text as a number, None or a JSON object if it is one, otherwise the text. KalmanConfig checks it.

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
        except (ValueError, RecursionError):
            continue
    return text
