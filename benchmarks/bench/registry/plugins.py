"""Python files of a folder as modules, ordered by name."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

BENCH = Path(__file__).resolve().parents[1]


def modules(kind: str, extra: Path | None = None) -> dict[str, ModuleType]:
    """Name -> module of the bench's own folder ``kind``, and of ``extra/kind`` if that exists.

    Args:
        kind: "optimizers" or "problems".
        extra: a folder of further files; a file with the name of one of the bench's replaces it.

    Raises:
        ValueError: if ``extra`` is not a folder.
    """
    if extra is not None and not extra.is_dir():
        raise ValueError(f"`--extra` must name a folder with `optimizers` or `problems` in it, got {extra}.")
    folders = [BENCH / kind] + ([extra / kind] if extra is not None else [])
    paths = [path for folder in folders for path in sorted(folder.glob("*.py")) if not path.stem.startswith("_")]
    return {path.stem: _module(kind, path) for path in paths}


def _module(kind: str, path: Path) -> ModuleType:
    if path.parent.parent == BENCH:
        return importlib.import_module(f"benchmarks.bench.{kind}.{path.stem}")
    spec = importlib.util.spec_from_file_location(f"bench_extra_{kind}_{path.stem}", path)
    assert spec is not None  # a .py file
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def attribute(module: ModuleType, name: str, wanted: str) -> object:
    """A required attribute of a file of the bench.

    Raises:
        ValueError: if it is missing.
    """
    if not hasattr(module, name):
        raise ValueError(f"`{name}` must be {wanted} in {module.__file__}, got nothing of that name.")
    return getattr(module, name)
