"""Options of a report: checked when they are made, and against the number of classes."""

import dataclasses

import pytest

from bayes_kf import evaluation as ev
from bayes_kf.evaluation.options import EvaluationOptions
from bayes_kf.evaluation.resampling.null_test import NullSettings


def options(**given) -> EvaluationOptions:
    return EvaluationOptions(null=NullSettings(), **given)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_bins": 0}, r"^`num_bins` must be a positive integer, got 0\.$"),
        ({"num_bins": 2.5}, r"^`num_bins` must be a positive integer, got 2\.5\.$"),
        ({"num_simulations": 38}, r"^`num_simulations` must be at least 39 for level 0\.95, got 38\.$"),
    ],
)
def test_null_settings_that_give_no_band_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EvaluationOptions(null=NullSettings(**settings))


def test_options_cannot_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        options().title = "another"


@pytest.mark.parametrize(("num_classes", "expected"), [(2, ()), (10, ()), (11, (5,))])
def test_top_5_is_the_default_of_more_than_10_classes(num_classes, expected):
    assert options().top_k_of(num_classes) == expected


@pytest.mark.parametrize("k", [1, 4, True, 2.0, "2"])
def test_top_k_is_an_integer_from_2_to_the_number_of_classes(k):
    message = rf"^`top_k` must hold integers from 2 to the number of classes, 3, got {k!r}\.$"
    with pytest.raises(ValueError, match=message):
        options(top_k=(2, k)).top_k_of(3)
    assert options(top_k=(2, 3)).top_k_of(3) == (2, 3)


def test_class_names():
    assert options().class_names_of(3) == ["0", "1", "2"]
    assert options(class_names=(7, "b")).class_names_of(2) == ["7", "b"]
    with pytest.raises(ValueError, match=r"^`class_names` must hold 3 names, got 2\.$"):
        options(class_names=("a", "b")).class_names_of(3)


def test_printed_config_is_text_with_the_settings_of_the_report_last():
    printed = options(config={"rank": 4, "seed": 1}).printed_config(seed=2)
    assert printed == {"rank": "4", "seed": "2"}


@pytest.mark.parametrize(
    ("given", "got"),
    [
        ({"ood": {"a": 1}}, "one"),
        ({"human": 0}, "one"),
        ({"recalibration": ev.TemperatureScaling(1.0, "s", 10)}, "one"),
        ({"conformal": 1}, "one"),
        ({"ordered": True}, "True"),
        ({"top_k": (5,)}, r"\(5,\)"),
        ({"class_names": ["a"]}, r"\['a'\]"),
    ],
)
def test_options_for_classes_are_refused_without_classes(given, got):
    name = next(iter(given))
    with pytest.raises(
        ValueError, match=rf"^`{name}` must be .* a posterior without class probabilities, got {got}\.$"
    ):
        options(**given).check_no_classes()


def test_other_options_are_not_refused_without_classes():
    options(title="t", config={"a": 1}, history={}, parameter_variance={}, output_variance={}).check_no_classes()
