"""Imports run one way. Imports under ``TYPE_CHECKING`` and inside functions count, so that no circle hides in them."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import bayes_kf

PACKAGE = Path(bayes_kf.__file__).parent
MOST_FILES = 12
# Top first: a part imports only from parts below it, and from itself. A folder's own name is its `__init__`.
ORDER = """
__main__
cli/
integrations/ distributed/ serving/
.
inference
inference/baselines/
inference/pyro/kalman_svi
inference/fitting/
inference/mixture/
inference/posterior
inference/pyro/
inference/saving/ inference/heldout/
inference/predictive/
inference/filtering/
inference/measurement_model/
inference/config_schema
inference/config
inference/config_groups inference/config_field inference/config_combinations
inference/covariance/
inference/linearization/
models
models/clip/ models/zoo models/language/
models/prior/
models/batched_forward
models/adapter
models/
evaluation
evaluation/comparison_report
evaluation/posterior_report
evaluation/classification_report evaluation/regression_report
evaluation/text/
evaluation/options evaluation/own_metrics
evaluation/sections/
evaluation/plots/
evaluation/report/
evaluation/classification/ evaluation/regression/
evaluation/calibration/
evaluation/recalibration/ evaluation/online/
evaluation/resampling/
evaluation/
data/
files/ processes/
validation _version
"""
RANKS = {part: rank for rank, line in enumerate(ORDER.split("\n")) for part in line.split()}
APART = (("evaluation", "inference"), ("evaluation", "models"), ("models", "inference"), ("data", "inference"))


def name_of(path):
    """A file's path below the package without its ending; a folder's own name for ``__init__.py``, "." for the root."""
    relative = path.relative_to(PACKAGE)
    return str(relative.parent if path.name == "__init__.py" else relative.with_suffix(""))


def part_of(name):
    """The entry of ORDER that a module belongs to: itself, else the innermost folder that has one."""
    if name in RANKS:
        return name
    folders = [f"{parent}/" for parent in [Path(name), *Path(name).parents]]
    return next(folder for folder in folders if folder in RANKS)


FILES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def imports(path):
    """The modules of the package that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.split(".")[0] != "bayes_kf":
                continue
            inner = name.removeprefix("bayes_kf").lstrip(".").replace(".", "/") or "."
            if inner not in FILES:
                inner = str(Path(inner).parent)  # a name in a module
            yield inner


IMPORTS = {name: sorted(set(imports(path)) - {name}) for name, path in FILES.items()}


def test_every_file_has_a_place_in_the_order():
    for name in FILES:
        assert part_of(name)
    used = {part_of(name) for name in FILES}
    assert used == set(RANKS)  # no entry of a folder that is gone


def test_imports_run_down():
    wrong = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in others
        if part_of(name) != part_of(other) and RANKS[part_of(name)] >= RANKS[part_of(other)]
    ]
    assert not wrong


def test_no_circle_of_modules():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from error


def test_parts_that_know_nothing_of_each_other():
    for one, other in APART:
        actual = [
            (name, to) for name, tos in IMPORTS.items() for to in tos if name.startswith(one) and to.startswith(other)
        ]
        assert not actual


def test_no_folder_is_crowded():
    for folder in {path.parent for path in FILES.values()}:
        assert len(list(folder.glob("*.py"))) <= MOST_FILES, folder


def test_the_posterior_is_a_facade():
    """What it does stands in the parts below; here are the methods that users call, and their words."""
    assert len(FILES["inference/posterior"].read_text(encoding="utf-8").splitlines()) <= 250
