"""Cells of tables: their texts, and the numbers that sort them."""

import math

import pytest

from bayes_kf.evaluation.report.sortable_tables import Cell, make_table, number, range_cell

CELLS = [
    (0.123456, "0.1235", "0.123456"),
    (-0.5, "−0.5000", "-0.5"),
    (-3, "-3", "-3"),
    (1234567, "1,234,567", "1234567"),
    (12345.5, "12346", "12345.5"),
    (math.inf, "∞", "Infinity"),
    (-math.inf, "−∞", "-Infinity"),
    (math.nan, "not defined", ""),
    (Cell("95.0 %", 0.95), "95.0 %", "0.95"),
    (range_cell(0.25, 0.75), "0.2500 to 0.7500", "0.25"),
    (range_cell(0.25, 0.75, decimals=2), "0.25 to 0.75", "0.25"),
    (range_cell(math.nan, math.nan), "not defined", ""),
    (range_cell(-math.inf, math.nan), "−∞ to not defined", "-Infinity"),
]


@pytest.mark.parametrize(("content", "text", "sort_key"), CELLS)
def test_numbers_have_a_text_and_sort_as_what_they_are(content, text, sort_key):
    table = make_table("t", ("first", "x"), [("a", content), ("b", 1.0)])
    assert [column.is_number for column in table.columns] == [False, True]
    assert (table.rows[0][1].text, table.rows[0][1].sort_key) == (text, sort_key)


def test_one_text_makes_a_column_of_text():
    table = make_table("t", ("first", "x"), [("a", 1), ("b", "2")])
    assert not table.columns[1].is_number
    assert [row[1].text for row in table.rows] == ["1", "2"]


def test_a_column_of_nothing_is_no_column_of_numbers():
    assert not make_table("t", ("x",), [("",), (math.nan,)]).columns[0].is_number
    assert not make_table("t", ("x",), [(math.nan,), (math.nan,)]).columns[0].is_number
    assert [column.is_number for column in make_table("t", ("x", "y"), []).columns] == [False, False]


@pytest.mark.parametrize("row", [(1,), (1, 2, 3)])
def test_a_row_of_another_length_is_refused(row):
    with pytest.raises(
        ValueError, match=rf"^`rows` must hold 2 cells each, as the header of 't' does, got {len(row)}\.$"
    ):
        make_table("t", ("x", "y"), [(1, 2), row])


def test_sort_keys_keep_every_digit():
    for value in (1 / 3, -1e-17, 1e300, 123456789.123, 0.0):
        assert float(Cell("", value).sort_key) == value


def test_a_rounded_zero_has_no_sign():
    assert (number(-1e-9), number(-0.0), number(-0.0001)) == ("0.0000", "0.0000", "−0.0001")


def test_small_numbers_keep_two_digits():
    actual = [number(value) for value in (1.04e-5, -1.26e-5, 0.000344, 0.001, 1.2e-7)]
    assert actual == ["0.00001", "−0.000013", "0.00034", "0.0010", "0.00000012"]
    assert [number(value) for value in (1e-12, 0.0)] == ["0.0000", "0.0000"]
