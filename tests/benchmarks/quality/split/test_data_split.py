"""The split: drawn by its rule, disjoint, and sealed sets are refused."""

import pytest

from benchmarks.bench.registry import data_split
from benchmarks.bench.registry.data_split import ADDED, SECOND, SEEN, UNSEEN, drawn_split
from benchmarks.bench.registry.problems import QualityProblem, found_split_problems
from benchmarks.quality.split import run

PROBLEMS = found_split_problems()
SEALED = {name for name, problem in PROBLEMS.items() if problem.sealed == 1}


def test_every_set_is_in_one_stratum_and_was_seen_or_not():
    listed = [*ADDED, *SECOND, *(name for part in (SEEN, UNSEEN) for names in part.values() for name in names)]
    assert len(listed) == len(set(listed))
    assert set(listed) == set(PROBLEMS)
    kinds = {name: isinstance(PROBLEMS[name], QualityProblem) for name in PROBLEMS}
    assert {name for name, is_classification in kinds.items() if not is_classification} == set(UNSEEN["regression"])
    texts = {name for name, problem in PROBLEMS.items() if problem.title.startswith("MiniLM")}
    assert texts == {*SEEN["texts"], *UNSEEN["texts"]}


def test_problems_state_the_part_that_was_drawn():
    assert drawn_split() == SEALED
    assert {name for name, problem in PROBLEMS.items() if problem.sealed == 2} == set(SECOND)
    assert not SEALED & {*ADDED, *(name for names in SEEN.values() for name in names)}


def test_half_of_a_stratum_is_sealed_where_enough_sets_were_unseen():
    for stratum, names in UNSEEN.items():
        total = len(names) + len(SEEN[stratum])
        assert len(SEALED & set(names)) == min(len(names), total // 2)


def test_the_rule_knows_names_only():
    unseen = {"one": ("d", "c", "b", "a"), "two": ("x",)}
    seen = {"one": ("e",), "two": ("y", "z")}
    sealed = drawn_split(seen, unseen)
    assert sealed == drawn_split(seen, {"one": ("a", "b", "c", "d"), "two": ("x",)})
    assert len(sealed & set("abcd")) == 2
    assert "x" in sealed
    assert len({drawn_split(seen, unseen, seed) for seed in range(20)}) > 1
    assert "names only, no" in " ".join(data_split.__doc__.split())


def test_sealed_sets_are_refused_without_the_option(monkeypatch, tmp_path):
    assert set(run.checked_data(None, 0)) == set(PROBLEMS) - SEALED - set(SECOND)
    assert set(run.checked_data(None, 1)) == SEALED
    assert set(run.checked_data(None, 2)) == set(SECOND)
    with pytest.raises(SystemExit, match=r"`--data` must name development sets, got ag-news: sealed sets are opened"):
        run.checked_data(["fashion", "ag-news"], 0)
    with pytest.raises(SystemExit, match=r"`--data` must name sealed sets with `--open-sealed`, got fashion\."):
        run.checked_data(["fashion", "ag-news"], 1)
    with pytest.raises(SystemExit, match="`--data` must name second sealed sets with `--open-sealed`, got ag-news"):
        run.checked_data(["usps-resnet", "ag-news"], 2)

    def refuse(*_):
        raise AssertionError("a sealed set was measured")

    monkeypatch.setattr(run, "run", refuse)
    monkeypatch.setattr("sys.argv", ["run", "--data", "ag-news", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="got ag-news"):
        run.main()
    assert not list(tmp_path.iterdir())
