"""The code of every tutorial runs as it stands, from top to bottom."""

import re
from pathlib import Path

import pytest

TUTORIALS = sorted((Path(__file__).parents[2] / "tutorials").glob("*.md"))


def test_there_are_tutorials():
    assert [path.name for path in TUTORIALS] == ["choosing.md", "evaluating.md"]


@pytest.mark.parametrize("path", TUTORIALS, ids=[path.stem for path in TUTORIALS])
def test_code_runs(path, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```$", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    scope: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{path.name}, block {number}", "exec"), scope)
        assert capsys.readouterr().out.strip(), f"block {number} printed nothing"
    report = scope["report"]
    assert report.scores["accuracy"] > 0.8
    assert report.scores["ece"] < 0.12
    if path.stem == "choosing":
        assert scope["after"].history["size"].tolist() == [10.0]
