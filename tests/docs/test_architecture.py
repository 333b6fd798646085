"""ARCHITECTURE.md is short, and every path that it names is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
MAP = re.search(r"## The map\n\n((?:    .*\n)+)", PAGE)[1]


def mapped():
    """The paths of the map: indentation is the folder, two spaces part the path from what it holds."""
    folders = {}
    for line in MAP.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.split(r" {3,}", line.strip())[0].split("  ")
        for name in names:
            folders[depth] = name
            yield "".join(folders[level] for level in sorted(folders) if level < depth) + name
        folders = {level: folder for level, folder in folders.items() if level <= depth}


def test_it_is_short():
    assert len(PAGE.splitlines()) <= 250


def test_every_path_of_the_map_is_there():
    paths = list(mapped())
    assert len(paths) > 35
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_path_in_the_text_is_there():
    paths = re.findall(r"`((?:bayes_kf|benchmarks|docs|tests|tutorials)/[\w/.]+)`", PAGE)
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_folder_of_the_package_is_on_the_map():
    packages = {path.parent.relative_to(ROOT) for path in (ROOT / "bayes_kf").rglob("__init__.py")}
    assert packages <= {Path(path) for path in mapped()}
