"""Numbers and tables of the site come from `benchmarks/results/`, and a name that is not there is an error."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROMISES = (ROOT / "docs" / "development" / "promises.md").read_text(encoding="utf-8")
TYPED = re.compile(r"(?<![\w.\-^\[])\d+\.\d{2,}(?![\w.\]])")  # a number with two decimals or more

spec = importlib.util.spec_from_file_location("results_tables", ROOT / "docs" / "_ext" / "results.py")
results = importlib.util.module_from_spec(spec)
spec.loader.exec_module(results)


def cells(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))["cells"]


def test_a_number_is_that_of_the_file():
    (kills,) = cells("kills").values()
    assert results.number("kills 200.kills") == f"{kills['kills']:,}"
    assert results.number("fuzz sum *.cases") == f"{sum(cell['cases'] for cell in cells('fuzz').values()):,}"
    assert results.number("mutation 100 * all.rate as .1f") == f"{100 * cells('mutation')['all']['rate']:.1f}"


def test_a_table_is_cut_to_rows_and_columns():
    actual = results.table("online-usps", rows="frozen; default (", columns="NLL = log loss; cost")
    head, _, frozen, default = actual.splitlines()
    assert head == "|  | log loss | cost |"
    assert frozen.startswith("| frozen |")
    assert default.startswith("| **default (`KalmanConfig()`)** |")
    page = (ROOT / "benchmarks" / "results" / "online-usps.md").read_text(encoding="utf-8")
    assert all(cell.strip() in page for cell in default.split("|"))


def test_a_column_may_have_an_equals_sign_in_its_name():
    ratio = cells("speed")["bert-tiny/B16/m100/time"]["ratio"]["exact"]
    actual = results.table("speed", section="bert-tiny", rows="exact", columns="B=16 m=100")
    assert actual.splitlines()[0] == "|  | B=16 m=100 |"
    assert f"{ratio:.3g}" in actual.splitlines()[2]


@pytest.mark.parametrize("options", [{"rows": "nobody"}, {"columns": "nothing"}, {"section": "nowhere"}])
def test_what_is_not_there_is_an_error(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"`{name}` must be one of"):
        results.table("online-usps", **options)


def test_every_promise_was_kept():
    """What a number on the page cannot say: that nothing was loaded wrong or lost."""
    assert set(cells("faults")["all"]) == {"refused", "did not matter"}
    assert all(cell["equal_to_the_bit"] for cell in cells("kills").values())
    for cell in cells("process_kills").values():
        assert cell["equal to the bit"]
        assert cell["distance from one process"] < 1e-6
        assert cell["others with another error"] == 0
    assert all(cell["read"] + cell["refused"] == cell["cases"] for cell in cells("fuzz").values())
    again = [cell for name, cell in cells("reproducibility").items() if name.endswith("again")]
    assert again
    assert all(cell["same_bits"] and cell["same_page"] for cell in again)


def test_the_results_files_of_the_promises_are_there():
    rows = [line for line in PROMISES.splitlines() if line.startswith("| ") and "{result}" in line]
    assert len(rows) == 12
    for row in rows:
        (name,) = re.findall(r"`(\w+)` \|$", row)
        assert "Made by" in (ROOT / "benchmarks" / "results" / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "results").glob("*.md")), ids=lambda path: path.stem)
def test_no_number_is_typed_by_hand(path):
    """Counts may be; measured numbers have decimals. The papers' own are quoted in tables headed "theirs"."""
    text = re.sub(r"^\| theirs.*?\n\n", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"arXiv:\S+|\[[^\]]*\]\([^)]*\)", "", text)
    assert TYPED.findall(text) == []
