"""Distances from the training set and rank correlations against answers by hand."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.common.learners import Stream
from benchmarks.quality.split.distance import features, nearest_distance, rank_correlation


def test_distances_are_those_by_hand():
    train = torch.tensor(
        [[0.0, 10.0, 5.0], [2.0, 30.0, 5.0]], dtype=torch.float64
    )  # sds √2, 10√2; the last is constant
    test = torch.tensor([[0.0, 10.0, 9.0], [1.0, 10.0, 0.0], [2.0, 50.0, 5.0]], dtype=torch.float64)
    expected = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64) / 2**0.5
    torch.testing.assert_close(nearest_distance(train, test), expected, rtol=1e-12, atol=1e-12)


def test_equal_values_share_their_mean_rank():
    # ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: correlation 4.5/√(4.5 · 5)
    one, other = torch.tensor([0.0, 5.0, 5.0, 7.0]), torch.tensor([1.0, 30.0, 2.0, 100.0])
    assert rank_correlation(one, other) == pytest.approx(4.5 / (4.5 * 5) ** 0.5, abs=1e-9)
    assert rank_correlation(one, -one) == -1.0
    assert rank_correlation(one, torch.ones(4)) is None


def test_features_are_the_inputs_of_the_classifier_in_the_frozen_network():
    torch.manual_seed(0)
    base = nn.Sequential()
    base.add_module("body", nn.Linear(3, 4))
    base.add_module("act", nn.Tanh())
    base.add_module("head", nn.Linear(4, 2))
    inputs = torch.randn(150, 3)
    with torch.no_grad():
        expected = base.body(inputs).tanh().double()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"])).eval()
    stream = Stream(inputs, torch.zeros(150, dtype=torch.long))
    torch.testing.assert_close(features(model, stream), expected)
    torch.testing.assert_close(features(model, stream), expected)  # the hook is gone
    with pytest.raises(
        ValueError, match=r"`model` must have a classifier in `modules_to_save`, got Linear without one\."
    ):
        features(nn.Linear(3, 2), stream)
