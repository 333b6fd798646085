"""The table of scores: rows, columns and marks."""

import math

import pytest

from bayes_kf.evaluation.report.score_labels import LABELS, known_label, label_of, size_label
from bayes_kf.evaluation.report.score_table import OTHERS, group_of, score_table
from bayes_kf.evaluation.score import Interval, Score


def rows(scores):
    """Label of each row to its texts."""
    return {row[0].text: [cell.text for cell in row[1:]] for group in score_table(scores).groups for row in group.rows}


def test_interval_band_and_p_value_stand_beside_their_score():
    ece = Score(0.2, Interval(0.1, 0.3), Interval(0.01, 0.09), 0.05, 0.0004)
    table = score_table({"ece": ece, "accuracy": Score(0.5)})
    assert [column.name for column in table.columns] == ["Score", "Value", "95 % interval", "Null band", "p-value"]
    assert [column.is_number for column in table.columns] == [False, True, True, True, True]
    assert [group.title for group in table.groups] == ["Accuracy and likelihood", "Calibration"]
    accuracy, actual = table.groups[0].rows[0], table.groups[1].rows[0]
    assert [cell.text for cell in actual] == ["ECE", "0.2000", "0.1000 to 0.3000", "0.0100 to 0.0900", "<\u00a00.001"]
    assert [cell.sort_key for cell in actual] == ["", "0.2", "0.1", "0.01", "0.0004"]
    assert [cell.text for cell in accuracy] == ["Accuracy", "0.5000", "", "", ""]
    assert [cell.sort_key for cell in accuracy] == ["", "0.5", "", "", ""]


@pytest.mark.parametrize(
    ("score", "titles"),
    [
        (Score(1.0), []),
        (Score(1.0, Interval(0.9, 1.0)), ["95 % interval"]),
        (Score(1.0, null_band=Interval(0.9, 1.0)), ["Null band"]),
        (Score(1.0, p_value=0.3), ["p-value"]),
        (Score(1.0, null_mean=0.3), []),
    ],
)
def test_columns_stand_only_where_some_score_has_them(score, titles):
    assert [column.name for column in score_table({"mine": score}).columns] == ["Score", "Value", *titles]


def test_names_that_end_like_an_interval_are_scores_of_their_own():
    scores = {
        "x": Score(0.5, Interval(0.25, 1.0)),
        "x_low": Score(1.0),
        "x_null_low": Score(2.0),
        "x_p_value": Score(3),
    }
    assert rows(scores) == {
        "x": ["0.5000", "0.2500 to 1.0000"],
        "x_low": ["1.0000", ""],
        "x_null_low": ["2.0000", ""],
        "x_p_value": ["3.0000", ""],
    }


@pytest.mark.parametrize(
    ("value", "word"), [(0.5, ""), (0.1, ""), (0.6, ""), (0.05, "value below"), (0.61, "value above"), (math.nan, "")]
)
def test_values_outside_the_band_are_marked_by_a_word_too(value, word):
    """Only of a score that a report tests: one of seven untested ones lies outside in 14 to 25 % of data sets."""
    for name, marked in (("ece_smooth", word), ("ece", ""), ("mine", "")):
        table = score_table({name: Score(value, null_band=Interval(0.1, 0.6))}, tested=["ece_smooth"])
        _, shown, band = table.groups[0].rows[0]
        assert (shown.is_outside, band.note) == (marked != "", marked)


def test_p_values_and_ends_that_are_not_defined():
    undefined = Score(math.nan, Interval(math.nan, math.nan), p_value=math.nan)
    table = score_table({"ks": undefined, "mce": Score(1.0, Interval(0.0, math.inf))})
    assert [[cell.text for cell in row[1:]] for row in table.groups[0].rows] == [
        ["not defined", "not defined", "not defined"],
        ["1.0000", "0.0000 to ∞", ""],
    ]


def test_unknown_names_stand_as_they_are_at_the_end():
    table = score_table({"<b>": Score(1.0), "a/b": Score(2.0), "nll": Score(3.0), "ood_x_flops": Score(4.0)})
    assert [(group.title, [row[0].text for row in group.rows]) for group in table.groups] == [
        ("Accuracy and likelihood", [label_of("nll").name]),
        (OTHERS, ["<b>", "a/b", "ood_x_flops"]),
    ]


def test_scores_of_several_models_stand_under_their_score():
    scores = {"runs/a/ece": Score(0.3, null_band=Interval(0.1, 0.2)), "runs/a/nll": Score(1.0)}
    table = score_table(scores | {"b/ece": Score(0.1), "b/nll": Score(2.0)})
    assert [(group.title, group.note) for group in table.groups] == [label_of("ece"), label_of("nll")]
    assert [[cell.text for cell in row] for row in table.groups[0].rows] == [
        ["runs/a", "0.3000", "0.1000 to 0.2000"],
        ["b", "0.1000", ""],
    ]


def test_data_sets_with_odd_names_have_labels():
    assert known_label("ood_a_b/c_low_auroc").name == "OOD “a_b/c_low”: AUROC"
    assert rows({"ood_x_low_auroc": Score(0.5), "ood_x_auroc": Score(0.25)}).keys() == {
        "OOD “x_low”: AUROC",
        "OOD “x”: AUROC",
    }
    assert size_label("foreign examples, foreign examples, x") == "OOD examples, foreign examples, x"


def test_every_label_has_a_group():
    assert [name for name in LABELS if group_of(name) == OTHERS] == []
