"""A score and the dictionary keys that it becomes."""

import dataclasses
import math

import pytest

from bayes_kf import evaluation as ev
from bayes_kf.evaluation.resampling.null_test import NullComparison
from bayes_kf.evaluation.score import Interval, Score, flatten_scores, position_in_band


def test_a_full_score_becomes_seven_keys():
    score = Score(0.1, Interval(0.05, 0.2), Interval(0.01, 0.03), null_mean=0.02, p_value=0.001)
    assert score.flat("ece") == {
        "ece": 0.1,
        "ece_low": 0.05,
        "ece_high": 0.2,
        "ece_null_mean": 0.02,
        "ece_null_low": 0.01,
        "ece_null_high": 0.03,
        "ece_p_value": 0.001,
    }


def test_only_what_is_known_becomes_a_key():
    assert flatten_scores({"aurc": Score(0.1), "pit_ks": Score(0.2, null_band=Interval(0.0, 0.1), p_value=0.0)}) == {
        "aurc": 0.1,
        "pit_ks": 0.2,
        "pit_ks_null_low": 0.0,
        "pit_ks_null_high": 0.1,
        "pit_ks_p_value": 0.0,
    }


def test_a_value_that_is_not_a_number_stays():
    assert math.isnan(Score(math.nan).flat("nll")["nll"])


@pytest.mark.parametrize(
    ("value", "where"), [(0.5, 1), (0.2 + 2e-9, 1), (0.2, 0), (0.1, 0), (0.1 - 5e-10, 0), (0.1 - 2e-9, -1)]
)
def test_the_position_allows_for_rounding(value, where):
    assert position_in_band(value, 0.1, 0.2) == where
    assert Score(value, null_band=Interval(0.1, 0.2)).null_position == where


def test_a_score_without_a_band_is_never_outside():
    assert Score(5.0, Interval(0.0, 1.0)).null_position == 0


def test_a_score_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Score(0.1).value = 0.2


def test_a_comparison_with_a_null_becomes_a_score():
    comparison = NullComparison(0.3, 0.1, 0.0, 0.2, 0.01)
    assert comparison.score() == Score(0.3, None, Interval(0.0, 0.2), 0.1, 0.01)
    assert comparison.score(Interval(0.2, 0.4)).interval == (0.2, 0.4)


def test_the_former_name_of_a_comparison_is_still_public():
    assert ev.Calibrated is ev.NullComparison is NullComparison
