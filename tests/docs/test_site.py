"""The reference site builds without a warning, and holds what is public."""

import subprocess
import sys
from pathlib import Path

import bayes_kf
from bayes_kf import distributed, evaluation

ROOT = Path(__file__).parents[2]
PAGES = {"core": bayes_kf, "evaluation": evaluation, "distributed": distributed}


def test_it_builds_and_holds_what_is_public(tmp_path):
    """One test, so that processes which share the tests build it once."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs"]
    command += ["-d", tmp_path / "trees", ".", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    docs = tmp_path / "site" / "docs"
    for page, module in PAGES.items():
        text = (docs / "reference" / f"{page}.html").read_text()
        submodules = {"evaluate", "compare", "Report", "__version__"} if module is bayes_kf else set()
        assert not [n for n in module.__all__ if n not in submodules and f'id="{module.__name__}.{n}"' not in text]
    assert "--initial-logit-sd" in (docs / "reference" / "command-line.html").read_text()
    index = (docs / "index.html").read_text()
    for page in [*(ROOT / "tutorials").glob("[1-9]*.ipynb"), *(ROOT / "tutorials").glob("*.md")]:
        assert f"tutorials/{page.stem}.html" in index
    for page in (ROOT / "docs").glob("*/*.md"):
        text = (docs / page.relative_to(ROOT / "docs").with_suffix(".html")).read_text()
        assert f"{page.parent.name}/{page.stem}.html" in index, "a page that the navigation does not reach"
        assert "{result" not in text, "a number or a table that was not read"
        assert "docs/images/" not in text.replace("_images/", ""), "a picture that was not found"
    assert "Alias for field" not in (docs / "reference" / "evaluation.html").read_text()
