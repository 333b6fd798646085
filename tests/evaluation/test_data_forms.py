"""Predictions and targets as people have them: each form gives the numbers of tensors (N, C) and (N,)."""

import numpy as np
import pytest
import torch

from bayes_kf import evaluation as ev
from bayes_kf.evaluation.flattened_predictions import flattened

NAMES = ["cat", "dog", "owl"]
QUICK = {"num_simulations": 39}


def case(count=120, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    probs = (2 * torch.randn(count, classes, generator=generator, dtype=torch.float64)).softmax(1)
    return probs, torch.multinomial(probs, 1, generator=generator)[:, 0]


def test_tables_and_columns_count_by_place_whatever_their_index():
    pandas = pytest.importorskip("pandas", reason="needs the Python package pandas")
    probs, labels = case()
    order = np.random.default_rng(0).permutation(len(labels))
    table = pandas.DataFrame(probs.numpy(), columns=NAMES, index=order)
    column = pandas.Series(labels.numpy(), index=order[::-1])
    for score in (ev.accuracy, ev.negative_log_likelihood, ev.expected_calibration_error):
        assert score(table, column) == score(probs, labels)
    named = column.map(dict(enumerate(NAMES)))
    report = ev.evaluate_predictions(table, named, **QUICK)
    assert report.scores == ev.evaluate_predictions(probs, labels, **QUICK).scores
    classes = next(table for table in report.sections.tables if table.caption == "Class by class")
    assert [row[0].text for row in classes.rows] == NAMES
    with_gap = column.astype("float64")
    assert ev.accuracy(table, with_gap) == ev.accuracy(probs, labels)
    objects = table.astype(object)
    assert ev.brier_score(objects, labels) == ev.brier_score(probs, labels)


def test_one_column_is_the_probability_of_class_one():
    probs, labels = case(classes=2)
    for second in (probs[:, 1], probs[:, 1:], probs[:, 1].tolist()):
        assert ev.brier_score(second, labels) == pytest.approx(ev.brier_score(probs, labels))
    assert ev.accuracy(probs[:, 1], labels[:, None]) == ev.accuracy(probs, labels)
    report = ev.evaluate_predictions(probs[:, 1], labels, ood={"half": torch.full((30,), 0.5)}, **QUICK)
    assert report.scores["nll"] == pytest.approx(ev.negative_log_likelihood(probs, labels))
    with pytest.raises(ValueError, match="pass their sigmoid"):
        ev.accuracy(torch.tensor([2.0, -1.0]), torch.tensor([1, 0]))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_one_hot_targets(dtype):
    probs, labels = case()
    one_hot = torch.nn.functional.one_hot(labels, 3).to(dtype)
    assert ev.negative_log_likelihood(probs, one_hot) == ev.negative_log_likelihood(probs, labels)
    assert ev.evaluate_predictions(probs, one_hot, **QUICK).scores["ece"] == ev.expected_calibration_error(
        probs, labels
    )


def test_names_of_classes_as_targets():
    probs, labels = case()
    named = [NAMES[label] for label in labels]
    for targets in (named, np.array(named), np.array(named, dtype=object)):
        report = ev.evaluate_predictions(probs, targets, class_names=NAMES, **QUICK)
        assert report.scores["accuracy"] == ev.accuracy(probs, labels)
    with pytest.raises(ValueError, match=r"must hold names among `class_names`, got 'dogs'; did you mean"):
        ev.evaluate_predictions(probs, ["dogs", *named[1:]], class_names=NAMES)


def test_tokens_and_pixels_count_one_by_one_but_for_the_ignored_ones():
    probs, labels = case(240)
    targets = labels.clone()
    targets[::7] = -100
    kept = targets != -100
    parts = [(torch.arange(240) // size)[kept] for size in (30, 60)]
    expected = [ev.evaluate_predictions(probs[kept], labels[kept], clusters=part, **QUICK).scores for part in parts]
    tokens = ev.evaluate_predictions(probs.view(8, 30, 3), targets.view(8, 30), **QUICK)
    pixels = ev.evaluate_predictions(
        probs.view(4, 6, 10, 3).permute(0, 3, 1, 2).numpy(), targets.view(4, 6, 10).numpy(), **QUICK
    )
    assert [tokens.scores, pixels.scores] == expected
    assert f"The {int(kept.sum())} tokens are those of 8 inputs; intervals" in tokens.sections.lead
    one = ev.evaluate_predictions(probs[None], targets[None], **QUICK)
    assert one.scores == ev.evaluate_predictions(probs[kept], labels[kept], **QUICK).scores
    assert f"The {int(kept.sum())} tokens of the one input count as independent" in one.sections.lead
    assert "pixels" in pixels.sections.lead
    with pytest.raises(ValueError, match="without its last or second dimension"):
        flattened(probs.view(8, 30, 3), targets.view(30, 8))
    with pytest.raises(ValueError, match="got -100 everywhere"):
        flattened(probs.view(8, 30, 3), torch.full((8, 30), -100))
    with pytest.raises(ValueError, match="`examples` must be left out"):
        ev.evaluate_predictions(probs.view(8, 30, 3), targets.view(8, 30), examples=["a"] * 8)


def test_several_labels_are_questions_of_their_own():
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(100, 4, generator=generator, dtype=torch.float64)
    targets = (torch.rand(100, 4, generator=generator) < probs).long()
    report = ev.evaluate_predictions(probs, targets, **QUICK)
    assert report.scores["accuracy"] == ((probs > 0.5) == targets).double().mean().item()
    assert report.scores["brier"] == pytest.approx(2 * (probs - targets).square().mean().item())
    with pytest.raises(ValueError, match="zeros and ones"):
        ev.evaluate_predictions(probs, 2 * targets)


def test_a_group_that_stands_out_is_named_and_a_table_has_all():
    probs, labels = case(1500)
    source = np.array(["web", "book", "letter"])[np.arange(1500) % 3]
    wrong = torch.from_numpy(source == "letter")
    labels[wrong] = (labels[wrong] + 1) % 3
    report = ev.evaluate_predictions(probs, labels, groups={"source": source, "half": np.arange(1500) % 2}, **QUICK)
    found = [finding.where for finding in report.sections.findings]
    assert "Errors for source letter" in found
    assert "Too sure for source letter" in found
    assert not any(where.startswith("Errors for half") for where in found)
    table = next(table for table in report.sections.tables if table.caption == "Groups by source")
    right = (probs.argmax(1) == labels).numpy()
    for row in table.rows:
        assert row[2].value == pytest.approx(right[source == row[0].text].mean())
    with pytest.raises(ValueError, match=r"`groups\['source'\]` must have shape \(1500,\)"):
        ev.evaluate_predictions(probs, labels, groups={"source": source[:3]})


def test_groups_of_a_table():
    pandas = pytest.importorskip("pandas", reason="needs the Python package pandas")
    probs, labels = case(300)
    table = pandas.DataFrame({"site": ["a", "b", "c"] * 100, "year": [2024, 2025] * 150})
    report = ev.evaluate_predictions(probs, labels, groups=table, **QUICK)
    captions = [table.caption for table in report.sections.tables]
    assert {"Groups by site", "Groups by year"} <= set(captions)


def test_groups_of_a_calibrated_model_are_found_in_five_per_cent_of_data_sets():
    """With forty groups of two kinds; three standard errors of 100 data sets are 6.5 %."""
    alarms = 0
    for seed in range(100):
        probs, labels = case(400, seed=seed)
        groups = {"a": np.arange(400) % 20, "b": np.arange(400) // 20}
        report = ev.evaluate_predictions(probs, labels, groups=groups, num_simulations=39)
        alarms += any(
            finding.where.startswith(("Errors", "Too sure at", "Right", "Too")) for finding in report.sections.findings
        )
    assert alarms / 100 <= 0.05 + 3 * (0.05 * 0.95 / 100) ** 0.5


def test_polars_tables():
    polars = pytest.importorskip("polars", reason="needs the Python package polars")
    probs, labels = case()
    table = polars.DataFrame({name: probs[:, place].numpy() for place, name in enumerate(NAMES)})
    report = ev.evaluate_predictions(table, polars.Series([NAMES[label] for label in labels]), **QUICK)
    assert report.scores["accuracy"] == ev.accuracy(probs, labels)
