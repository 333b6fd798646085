"""README.md: the example prints what the page says, the table is that of the results file, the links work."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"\d+\.\d+")
ROUNDING = 0.02  # of a printed score: other processors round otherwise, and a stream follows


def block(language):
    (actual,) = re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return actual


def test_the_example_prints_what_the_page_says(capsys):
    code = block("python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    exec(compile(code, "README.md", "exec"), {})
    printed, expected = capsys.readouterr().out, block("text")
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", expected)
    numbers = [float(number) for number in NUMBER.findall(printed)]
    assert numbers == pytest.approx([float(number) for number in NUMBER.findall(expected)], abs=ROUNDING)


def test_the_table_of_costs_is_that_of_the_results():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "docs" / "_ext" / "readme.py")
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    assert readme.written(README) == README, "run python docs/_ext/readme.py"


def test_it_is_short():
    assert len(README.splitlines()) <= 200
    assert len(README.split()) <= 1500


def test_its_commands_are_there():
    for command in re.findall(r"^    (scripts/\S+)", README, re.MULTILINE):
        assert (ROOT / command).is_file()


def anchors(page):
    """Anchors of a page's headings, as MyST and GitHub make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    labels = re.findall(r"^\((.*)\)=$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings} | set(labels)


@pytest.mark.parametrize("page", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://", "#")):
            continue
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        assert not anchor or anchor in anchors(ROOT / path), link
