"""The counts on the page of promises are those of the results beside their scripts."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "promises.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")]


def cells(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["cells"]


def faults():
    found = cells("faults")["all"]
    saves = cells("faults")["saves without room"]
    return {
        "faults in saved folders": [
            found["refused"] + found["did not matter"],
            found["refused"],
            found["did not matter"],
        ],
        "saves without room": [saves["ended"]],
    }


def kills():
    (found,) = cells("kills").values()
    assert found["equal_to_the_bit"]
    return {"kills (SIGKILL) at random moments": [found["kills"], found["killed_while_writing"]]}


def fuzz():
    found = cells("fuzz").values()
    return {"files made to break readers": [sum(c[name] for c in found) for name in ("cases", "read", "refused")]}


def soak():
    return {"updates in a row": [max(cell["steps"] for cell in cells("soak").values())]}


def load():
    found = cells("load")
    online, adapter, classes, threads = (found[name] for name in ("online", "adapter", "classes", "threads"))
    return {
        "lines through `fit --online`": [online["examples"], round(online["mib_most"])],
        "parameters, diagonal belief": [
            adapter["parameters"],
            f"{adapter['init_copies']:.1f}",
            f"{adapter['step_copies']:.1f}",
            f"{adapter['seconds_a_step']:.1f}",
        ],
        "classes": [classes["classes"], f"{classes['seconds_sampled']:.1f}", f"{classes['seconds_truncated']:.1f}"],
        "threads on one posterior": [threads["threads"], threads["equal_to_the_bit"], threads["predictions"]],
    }


def reproducibility():
    again = [cell for name, cell in cells("reproducibility").items() if name.endswith("again")]
    return {"runs of the same seed": [len(again), sum(cell["same_bits"] and cell["same_page"] for cell in again)]}


def mutation():
    found = cells("mutation")["all"]
    rates = [f"{100 * found[name]:.1f}" for name in ("rate", "low", "high")]
    return {"mutants of `inference/` and `evaluation/`": [found["tried"], found["killed"], *rates]}


@pytest.mark.parametrize("source", [faults, kills, fuzz, soak, load, reproducibility, mutation])
def test_the_page_says_what_was_measured(source):
    for what, expected in source().items():
        (row,) = [row for row in ROWS if row[0] == what]
        assert source.__name__ in row[3]
        said = re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", " ".join(row[1:3]))
        wanted = [f"{number:,}" if isinstance(number, int) else number for number in expected]
        assert not [number for number in wanted if number not in said], what
