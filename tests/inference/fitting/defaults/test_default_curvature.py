"""The curvature of fits without a config."""

import pytest
import torch
from torch import nn

from bayes_kf.inference.fitting.defaults.default_curvature import EXACT_IN_MIXTURE, EXACT_IN_ONE_PASS, default_curvature
from bayes_kf.inference.fitting.mixture_fit import default_members
from bayes_kf.models.adapter import AdapterModel


@pytest.mark.parametrize("most", [EXACT_IN_MIXTURE, EXACT_IN_ONE_PASS])
def test_it_is_sampled_above_a_number_of_outputs(most):
    for outputs, expected in ((most, "exact"), (most + 1, "sampled")):
        assert default_curvature(AdapterModel(nn.Linear(3, outputs)), torch.zeros(2, 3), most) == expected
    with pytest.raises(ValueError, match=r"`inputs` must hold a tensor with a batch dimension, got none"):
        default_curvature(AdapterModel(nn.Linear(3, 2)), [1, 2], most)


@pytest.mark.parametrize(
    ("outputs", "targets", "expected"),
    [
        (3, torch.tensor([0, 1]), "exact"),
        (4, torch.tensor([0, 1]), "sampled"),
        (4, torch.ones(2, 4, dtype=torch.bool), "exact"),  # answers have no sampled curvature
    ],
)
def test_members_of_a_mixture(outputs, targets, expected):
    data = [(torch.zeros(2, 3), targets)] * 8
    assert {config.curvature for config in default_members(AdapterModel(nn.Linear(3, outputs)), data)} == {expected}
