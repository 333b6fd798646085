"""Tables of the page: what belongs to which score, and what sorts a cell."""

import math

import pytest

from bayes_kf.evaluation.report.html_page import LABELS, known_label, label_of, number
from bayes_kf.evaluation.report.score_table import OTHERS, group_of, score_table
from bayes_kf.evaluation.report.sortable_tables import sort_value, table_view


def rows(scores):
    """Label of each row to its texts."""
    return {row[0].text: [cell.text for cell in row[1:]] for group in score_table(scores).groups for row in group.rows}


def test_interval_band_and_p_value_stand_beside_their_score():
    ece = {"ece": 0.2, "ece_low": 0.1, "ece_high": 0.3, "ece_null_mean": 0.05, "ece_null_low": 0.01}
    table = score_table(ece | {"ece_null_high": 0.09, "ece_p_value": 0.0004, "accuracy": 0.5})
    assert [column.name for column in table.columns] == ["Score", "Value", "95 % interval", "Chance alone", "p-value"]
    assert [group.title for group in table.groups] == ["Accuracy and likelihood", "Calibration"]
    accuracy, found = table.groups[0].rows[0], table.groups[1].rows[0]
    assert [cell.text for cell in found] == ["ECE", "0.2000", "0.1000 to 0.3000", "0.0100 to 0.0900", "<\u00a00.001"]
    assert [cell.value for cell in found] == ["", "0.2", "0.1", "0.01", "0.0004"]
    assert [cell.text for cell in accuracy] == ["Accuracy", "0.5000", "", "", ""]


@pytest.mark.parametrize(
    ("scores", "titles"),
    [
        ({"accuracy": 1.0}, []),
        ({"accuracy": 1.0, "accuracy_low": 0.9, "accuracy_high": 1.0}, ["95 % interval"]),
        ({"pit_ks": 1.0, "pit_ks_null_low": 0.9, "pit_ks_null_high": 1.0}, ["Chance alone"]),
        ({"spiegelhalter": 1.0, "spiegelhalter_p_value": 0.3}, ["p-value"]),
    ],
)
def test_columns_stand_only_where_some_score_has_them(scores, titles):
    assert [column.name for column in score_table(scores).columns] == ["Score", "Value", *titles]


def test_names_that_merely_end_so_are_scores_of_their_own():
    scores = {"mine_low": 1.0, "mine_null_low": 2.0, "mine_p_value": 3.0, "whole_high": 4.0}
    assert rows(scores) == {name: [f"{value:.4f}"] for name, value in scores.items()}


def test_the_longest_name_that_is_there_owns_a_suffix():
    both = {"x": 1.0, "x_null": 2.0, "x_null_low": 3.0, "x_null_high": 4.0}
    assert rows(both) == {"x": ["1.0000", "3.0000 to 4.0000"], "x_null": ["2.0000", ""]}
    alone = {name: value for name, value in both.items() if name != "x"}
    assert rows(alone) == {"x_null": ["2.0000", "3.0000 to 4.0000"]}


def test_no_number_is_lost_behind_one_that_has_no_row():
    scores = {"x": 1.0, "x_low": 0.5, "x_high": 1.5, "x_low_p_value": 0.25}
    assert rows(scores) == {"x": ["1.0000", "0.5000 to 1.5000"], "x_low_p_value": ["0.2500", ""]}


@pytest.mark.parametrize(
    ("value", "word"), [(0.5, ""), (0.1, ""), (0.6, ""), (0.05, "value below"), (0.61, "value above"), (math.nan, "")]
)
def test_values_outside_the_band_are_marked_by_a_word_too(value, word):
    """Only of a score that a report tests: of seven, one lies outside by chance in 14 to 25 % of data sets."""
    for name, marked in (("ece_smooth", word), ("ece", ""), ("mine", "")):
        table = score_table({name: value, f"{name}_null_low": 0.1, f"{name}_null_high": 0.6})
        _, shown, band = table.groups[0].rows[0]
        assert (shown.is_outside, band.note) == (marked != "", marked)


def test_p_values_and_ends_that_are_not_defined():
    scores = {"ks": math.nan, "ks_low": math.nan, "ks_high": math.nan, "ks_p_value": math.nan}
    table = score_table(scores | {"mce": 1.0, "mce_low": 0.0, "mce_high": math.inf})
    assert [[cell.text for cell in row[1:]] for row in table.groups[0].rows] == [
        ["not defined", "not defined", "not defined"],
        ["1.0000", "0.0000 to ∞", ""],
    ]


def test_unknown_names_stand_as_they_are_at_the_end():
    table = score_table({"<b>": 1.0, "a/b": 2.0, "nll": 3.0, "ood_x_flops": 4.0})
    assert [(group.title, [row[0].text for row in group.rows]) for group in table.groups] == [
        ("Accuracy and likelihood", [label_of("nll")[0]]),
        (OTHERS, ["<b>", "a/b", "ood_x_flops"]),
    ]


def test_scores_of_several_models_stand_under_their_score():
    scores = {"runs/a/ece": 0.3, "runs/a/ece_null_low": 0.1, "runs/a/ece_null_high": 0.2, "runs/a/nll": 1.0}
    table = score_table(scores | {"b/ece": 0.1, "b/nll": 2.0})
    assert [(group.title, group.note) for group in table.groups] == [label_of("ece"), label_of("nll")]
    assert [[cell.text for cell in row] for row in table.groups[0].rows] == [
        ["runs/a", "0.3000", "0.1000 to 0.2000"],
        ["b", "0.1000", ""],
    ]


def test_data_sets_with_odd_names_have_labels():
    assert known_label("ood_a_b/c_low_auroc")[0] == "Foreign “a_b/c_low”: AUROC"
    assert rows({"ood_x_low_auroc": 0.5, "ood_x_auroc": 0.25}).keys() == {
        "Foreign “x_low”: AUROC",
        "Foreign “x”: AUROC",
    }


def test_every_label_has_a_group():
    assert [name for name in LABELS if group_of(name) == OTHERS] == []


NUMBERS = [
    ("0.1235", 0.1235),
    ("−0.5000", -0.5),
    ("-3", -3),
    ("1,234,567", 1234567),
    ("12,345.5", 12345.5),
    ("∞", math.inf),
    ("−∞", -math.inf),
    ("95.0 %", 95),
    ("0.25 to 0.75", 0.25),
    ("−0.1 (−0.2 to 0.1)", -0.1),
    ("1.5 ± 0.2", 1.5),
    ("2e−05", 2e-5),
    ("1.5e+3", 1500),
    ("< 0.001", 0.001),
]


@pytest.mark.parametrize(("text", "value"), NUMBERS)
def test_numbers_are_read_as_they_are_written(text, value):
    view = table_view("t", ("first", "x"), [("a", text), ("b", "not defined"), ("c", "")])
    assert view.columns[1].is_number
    assert float(view.rows[0][1].value) == pytest.approx(value, rel=1e-12)
    assert [row[1].value for row in view.rows[1:]] == ["", ""]


@pytest.mark.parametrize("text", ["12,34", "1.2.3", "0x10", "7a", "a7", "1 2", "--1", "nan", "3 cats", "√2"])
def test_one_text_makes_a_column_of_text(text):
    view = table_view("t", ("first", "x"), [("a", "1"), ("b", text)])
    assert not view.columns[1].is_number
    assert [row[1].value for row in view.rows] == ["", ""]


def test_a_column_of_nothing_is_no_column_of_numbers():
    assert not table_view("t", ("x",), [("",), ("not defined",)]).columns[0].is_number
    assert table_view("t", ("x", "y"), []).rows == ()


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"^`rows` must hold 2 cells each, as the header of 't' does, got 1\.$"):
        table_view("t", ("x", "y"), [("1",)])


def test_sort_values_keep_every_digit():
    for value in (1 / 3, -1e-17, 1e300, 123456789.123, 0.0):
        assert float(sort_value(value)) == value


def test_a_rounded_zero_has_no_sign():
    assert (number(-1e-9), number(-0.0), number(-0.0001)) == ("0.0000", "0.0000", "−0.0001")


def test_small_numbers_keep_two_digits_and_sort_as_what_they_are():
    found = [number(value) for value in (1.04e-5, -1.26e-5, 0.000344, 0.001, 1.2e-7)]
    assert found == ["0.00001", "−0.000013", "0.00034", "0.0010", "0.00000012"]
    assert [number(value) for value in (1e-12, 0.0)] == ["0.0000", "0.0000"]
    view = table_view("Small", ("x",), [(number(value),) for value in (1.04e-5, -0.00034)])
    assert [row[0].value for row in view.rows] == ["1e-05", "-0.00034"]
