"""An update stays a short path: calls of Python functions inside the package, which do not depend on the machine."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import bayes_kf as bkf

PACKAGE = str(Path(bkf.__file__).parent)
SEED = 3  # of weights with which no step is damped; each damping takes some calls more
MAX_CALLS = 300  # of one update of four examples; 1,152 (low rank) and 802 (diagonal) before Batch and typed beliefs


@pytest.mark.parametrize("covariance", ["low_rank", "diagonal"])
def test_an_update_of_four_examples_makes_few_calls(covariance):
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(4, 20, generator=generator), torch.randint(10, (4,), generator=generator)) for _ in range(4)
    ]
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 10))
    kf = bkf.KalmanFilter(model, bkf.KalmanConfig(covariance=covariance))
    state = kf.init()
    for inputs, targets in batches[:-1]:  # the first makes the plan of the linearization
        state, _ = kf.update(state, inputs, targets)
    calls = []

    def count(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            calls.append(frame.f_code.co_qualname)

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        state, _ = kf.update(state, *batches[-1])
    finally:
        sys.setprofile(before)
    assert 50 < len(calls) <= MAX_CALLS
