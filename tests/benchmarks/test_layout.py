"""The folders of benchmarks/: imports run one way, files that the README names exist, folders stay small."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in BENCHMARKS.rglob("*.py")
    if "example" not in path.parts
}
MAY_IMPORT = {  # besides a folder's own files
    "common": set(),
    "bench": {"common"},
    "few_shot": {"common"},
    "quality": {"common", "bench", "papers"},
    "reliability": {"common"},
    "speed": {"common"},
    "papers": {"common", "bench"},
    "language": {"common", "quality"},
}
PLUGINS = {"bench/optimizers", "bench/problems"}


def imported(path):
    """Modules of benchmarks that a file imports, also inside functions."""
    actual = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("benchmarks"):
            assert node.level == 0
            actual |= {name for alias in node.names if (name := f"{node.module}.{alias.name}") in FILES} or {
                node.module
            }
        elif isinstance(node, ast.Import):
            actual |= {alias.name for alias in node.names if alias.name.startswith("benchmarks")}
    return actual


GRAPH = {name: imported(path) for name, path in FILES.items()}


def test_imports_have_no_circle():
    assert sum(map(len, GRAPH.values())) > 100
    list(TopologicalSorter(GRAPH).static_order())  # raises CycleError


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_run_one_way(folder):
    others = {
        other.split(".")[1]
        for name, modules in GRAPH.items()
        if name.startswith(f"benchmarks.{folder}.")
        for other in modules
    }
    assert others - {folder} <= MAY_IMPORT[folder]


def test_every_folder_has_a_rule():
    assert {name.split(".")[1] for name in FILES if name.count(".")} == set(MAY_IMPORT)


def test_folders_are_small():
    folders = {path.parent for path in FILES.values()}
    sizes = {str(folder.relative_to(BENCHMARKS)): len(list(folder.glob("[!_]*.py"))) for folder in folders}
    assert {folder for folder, size in sizes.items() if size > 12} <= PLUGINS


def test_the_readme_names_scripts_and_results_that_exist():
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    commands = set(re.findall(r"python -m (benchmarks[\w.]+)", text))
    rows = {f"benchmarks.{name}" for name in re.findall(r"^\| `(\w+(?:\.\w+)+)", text, re.M)}
    scripts = {name for name, path in FILES.items() if '__name__ == "__main__"' in path.read_text(encoding="utf-8")}
    assert commands <= scripts
    assert rows == scripts
    results = {name for name in re.findall(r"`([\w-]+\.md)`", text) if name != "CONTRIBUTING.md"}
    assert len(results) > 25
    assert not [name for name in results if not (BENCHMARKS / "results" / name).is_file()]
