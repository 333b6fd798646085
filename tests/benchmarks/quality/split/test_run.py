"""The command: cells of both kinds, costs, the default that is kept under another name, tables."""

import json

import pytest
from real_data import real_file

from bayes_kf.data import uci_digits_split
from bayes_kf.models.zoo import lora_digits_vit
from benchmarks.bench.registry.problems import QualityData, QualityProblem
from benchmarks.common import result_files
from benchmarks.common.learners import Stream
from benchmarks.common.result_files import ResultFile
from benchmarks.quality.split import cells, rows, run
from benchmarks.quality.split.table import render


def load(seed):
    train, rest = uci_digits_split(96)
    test = Stream(rest.images[:60], rest.labels[:60])
    return QualityData(Stream(*train), test, Stream(-test.inputs, test.labels))


DIGITS = QualityProblem("digits", "UCI's digits", load, lambda seed, _: lora_digits_vit(rank=2, seed=seed), 10, 0)


@pytest.fixture
def digits(monkeypatch):
    monkeypatch.setitem(run.PROBLEMS, "digits", DIGITS)
    monkeypatch.setattr(cells, "PROBE", 2)


def test_a_classification_is_measured(digits):
    cell = cells.measure("digits", "strong-ensemble", 0, 600.0)
    assert cell["accuracy"] > 0.8
    assert cell["ood_auroc_epistemic"] is not None
    assert -1 <= cell["distance_correlation"] <= 1
    assert cell["seconds"] > cell["search_seconds"] > 0
    assert cell["epoch_seconds"] > 0
    text = "\n".join(render({"digits/strong-ensemble/0": cell}, {"digits": DIGITS}, False))
    assert "| ensemble of three of them |" in text
    assert "## digits" in text


def test_an_error_of_a_row_is_its_result(digits, monkeypatch):
    def fail(*_):
        raise FloatingPointError("no luck")

    monkeypatch.setitem(rows.ROWS, "strong", ("strong", fail))
    cell = cells.measure("digits", "strong", 0, 600.0)
    assert cell["skipped"] == "FloatingPointError: no luck"
    text = "\n".join(render({"digits/strong/0": cell}, {"digits": DIGITS}, False))
    assert "no luck" not in text  # a set without any result has no table


@pytest.mark.real
def test_a_regression_is_measured():
    real_file("uci-regression/uci.npz")
    cell = cells.measure("boston", "ridge", 0, 600.0)
    assert cell["rmse"] < 1
    assert 0.5 < cell["coverage_90"] <= 1


def test_an_epoch_costs_as_many_steps_as_it_has_batches(digits, monkeypatch):
    monkeypatch.setattr(cells, "probe", lambda *_: 2.0)
    monkeypatch.setitem(rows.ROWS, "strong", ("s", lambda *_: pytest.fail("not this")))
    cell = cells.measure("digits", "default", 0, 600.0)
    assert cell["epoch_seconds"] == 2.0 * 6  # 96 examples in batches of 16
    assert cell["single_seconds"] == 2.0 * 96


def test_a_default_is_kept_under_another_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(result_files, "RESULTS", tmp_path)
    scores = dict.fromkeys(("nll", "rmse", "crps", "coverage_50", "coverage_90", "predict_seconds", "mib"), 0.5)
    scores |= {"seconds": 2.0, "epoch_seconds": 1.0, "single_seconds": 4.0}
    file = ResultFile("quality_development")
    for row in ("strong", "default"):
        file.put(f"boston/{row}/0", scores)
    arguments = ["run", "--results", str(tmp_path), "--keep-default-as", "0.1"]
    monkeypatch.setattr("sys.argv", arguments)
    run.main()
    written = json.loads((tmp_path / "quality_development.json").read_text(encoding="utf-8"))["cells"]
    assert list(written) == ["boston/default-0.1/0", "boston/strong/0"]
    assert "| ours, default of 0.1 " in capsys.readouterr().out
    file = ResultFile("quality_development")
    file.put("boston/default/0", scores)
    with pytest.raises(SystemExit, match=r"`--keep-default-as` must be a new name, got 0.1, which 1 cells have\."):
        run.main()
    monkeypatch.setattr("sys.argv", [*arguments[:-1], "a/b"])
    with pytest.raises(SystemExit, match=r"`--keep-default-as` must be letters, .*got 'a/b'\."):
        run.main()


def test_each_part_has_a_page_of_its_own(digits):
    problems = {"digits": DIGITS, "closed": DIGITS._replace(name="closed", title="a sealed set", sealed=True)}
    skipped = {"skipped": "more than 9 s"}
    assert "opened once" not in "\n".join(render({"digits/strong/0": skipped}, problems, False))
    text = "\n".join(render({"digits/strong/0": skipped}, problems, True))
    assert "These sets were opened once" in text
    assert "Sealed sets: closed." in text
    assert "Development sets: digits." in text


def test_means_are_over_the_sets_of_the_base_rows_and_the_default():
    problems = {name: run.PROBLEMS[name] for name in ("boston", "energy", "power")}
    scores = dict.fromkeys(("rmse", "crps", "coverage_50", "coverage_90", "predict_seconds", "mib"), 0.5)
    scores |= {"seconds": 2.0, "epoch_seconds": 1.0, "single_seconds": 4.0}
    nll = {"boston": 1.0, "energy": 2.0}
    measured = {f"{name}/{row}/0": scores | {"nll": nll[name]} for row in ("strong", "strong-ensemble") for name in nll}
    measured |= {f"power/{row}/0": scores | {"nll": 9.0} for row in ("strong", "strong-ensemble")}  # no default yet
    measured |= {f"{name}/default/0": scores | {"nll": 3.0} for name in nll}
    measured |= {f"{name}/ridge/0": scores | {"nll": 4.0} for name in problems}
    measured |= {"boston/gp/0": scores | {"nll": 0.0}}
    lines = "\n".join(render(measured, problems, False)).splitlines()
    assert "Over the 2 sets that the strong row, the ensemble and the default have: boston, energy." in lines
    table = lines[lines.index("## Means, regression") : lines.index("## Against the strong row, regression")]
    first = {
        line.split("|")[1].strip(): [part.strip() for part in line.split("|")[2:-1]] for line in table if "|" in line
    }
    assert first["AdamW, early stopping, σ² held out"][0] == "1.500"
    assert (first["Bayesian ridge (scikit-learn)"][0], first["Bayesian ridge (scikit-learn)"][-1]) == ("4.000", "3")
    assert (first["Gaussian process (scikit-learn)"][0], first["Gaussian process (scikit-learn)"][-1]) == ("–", "1")


def test_differences_are_paired_and_verdicts_need_two_seeds():
    def cell(nll):
        names = ("accuracy", "ece", "ece_null_low", "ece_null_high", "ood_auroc", "error_auroc", "aurc", "mib")
        shifts = [f"{name}_{severity}" for name in ("nll", "ece") for severity in (1, 2, 3)]
        values = dict.fromkeys([*names, *shifts, "predict_seconds"], 0.5)
        return values | {"nll": nll, "seconds": 6.0, "search_seconds": 2.0, "epoch_seconds": 2.0, "single_seconds": 8.0}

    measured = {f"digits/strong/{seed}": cell(nll) for seed, nll in enumerate((0.50, 0.60, 0.70))}
    measured |= {f"digits/default/{seed}": cell(nll) for seed, nll in enumerate((0.41, 0.50, 0.61))}
    measured |= {"digits/post-hoc/0": cell(0.6)}
    text = "\n".join(render(measured, {"digits": DIGITS}, False))
    line = next(line for line in text.splitlines() if "ours, default" in line and "| nll" in line)
    assert [part.strip() for part in line.split("|")[2:7]] == ["nll", "-0.093", "1", "1 better", "digits -0.093"]
    line = next(line for line in text.splitlines() if "post hoc" in line and "| nll" in line)
    assert [part.strip() for part in line.split("|")[3:6]] == ["+0.100", "1", "1 one seed"]
    assert "| 3.0 (2.0) | 0.8 (0.5) " in text  # six seconds are three epochs, two of them without the search
