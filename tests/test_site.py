"""The reference site builds without a warning, and holds what is public."""

import subprocess
import sys
from pathlib import Path

import pytest

import bayes_kf
from bayes_kf import distributed, evaluation

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.xdist_group("site")  # which is built once


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", "-d", out / "trees", ".", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize(
    ("page", "module"), [("core", bayes_kf), ("evaluation", evaluation), ("distributed", distributed)]
)
def test_every_public_name_is_in_the_reference(page, module, site):
    text = (site / "docs" / "reference" / f"{page}.html").read_text()
    submodules = {"evaluate", "compare", "Report", "__version__"} if module is bayes_kf else set()
    missing = [n for n in module.__all__ if n not in submodules and f'id="{module.__name__}.{n}"' not in text]
    assert not missing


def test_tutorials_and_papers_are_in_it(site):
    index = (site / "docs" / "index.html").read_text()
    for page in [*(ROOT / "tutorials").glob("[1-7]*.ipynb"), *(ROOT / "tutorials").glob("*.md")]:
        assert f"tutorials/{page.stem}.html" in index
    assert "Alias for field" not in (site / "docs" / "reference" / "evaluation.html").read_text()
