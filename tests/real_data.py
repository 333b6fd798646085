"""The folder of real data, or a skip that says why there is none."""

import os
from pathlib import Path

import pytest


def real_file(name: str) -> Path:
    """A file of the folder that BAYES_KF_DATA names, else of ../shared/data beside the repository."""
    named = os.environ.get("BAYES_KF_DATA")
    path = (Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data") / name
    if not named and not path.is_file():  # asked for by name, its absence is a failure
        pytest.skip(f"these data sets may not be redistributed with the package, and none lie here: {path}")
    return path
