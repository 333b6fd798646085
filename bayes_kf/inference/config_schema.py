"""The JSON Schema of a :class:`KalmanConfig`'s settings, for editors and checkers of YAML and JSON files.

``python -m bayes_kf.inference.config_schema`` prints it; ``kalman_config.schema.json`` beside this file is its
output, which the command line reads.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from bayes_kf.inference.config import CHOICES, WHOLE, KalmanConfig
from bayes_kf.inference.covariance.structure import STRUCTURES

DRAFT = "https://json-schema.org/draft/2020-12/schema"
KINDS = {"str": "string", "float": "number", "int": "integer", "bool": "boolean", "None": "null"}
# settings that are numbers or this word
WORDS = {"noise_variance": "estimated", "temperature": "prequential"}


def config_schema() -> dict[str, Any]:
    """The JSON Schema of a file of settings: names, types, allowed words, defaults and descriptions.

    It does not express all bounds of numbers, nor bounds that depend on other settings. :class:`KalmanConfig` checks
    those.

    Example:
        >>> config_schema()["properties"]["forgetting"]["default"]
        1.0
    """
    fields = dataclasses.fields(KalmanConfig)
    return {
        "$schema": DRAFT,
        "title": "KalmanConfig",
        "type": "object",
        "additionalProperties": False,
        "properties": {f.name: _property(f) | {"description": f.metadata["help"]} for f in fields},
    }


def _property(field: dataclasses.Field[Any]) -> dict[str, Any]:
    """The type and the default of one setting."""
    default = {"default": field.default}
    choices = CHOICES | {"covariance": tuple(STRUCTURES)}
    if field.name in choices:
        return {"enum": list(choices[field.name])} | default
    if field.name == "tune":
        lists = {"type": "object", "additionalProperties": {"type": "array", "minItems": 1}, "minProperties": 1}
        return {"anyOf": [lists, {"type": "null"}]} | default
    if field.name in WORDS:
        return {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"const": WORDS[field.name]}]} | default
    kinds = [KINDS[kind] for kind in str(field.type).split(" | ")]
    schema: dict[str, Any] = {"type": kinds[0] if len(kinds) == 1 else kinds} | default
    return schema | ({"minimum": 1} if field.name in WHOLE else {})


if __name__ == "__main__":
    print(json.dumps(config_schema(), indent=2))
