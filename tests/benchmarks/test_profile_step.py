"""The profile of a step times functions that exist, and they take turns as the step calls them."""

import torch
from torch import nn

import bayes_kf as bkf
from benchmarks.speed import profile_step


def test_every_part_of_a_step_is_timed():
    kf = bkf.KalmanFilter(nn.Linear(4, 3), bkf.KalmanConfig(rank=4))
    inputs, labels = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
    state = kf.init(inputs)
    before = {name: getattr(owner, name) for parts in profile_step.PARTS.values() for owner, name in parts}
    with profile_step.clocked() as clock:
        kf.update(state, inputs, labels)
    assert {part for part, calls in clock.calls.items() if calls == 0} == set()
    assert all(seconds > 0 for seconds in clock.seconds.values())
    assert all(getattr(owner, name) is before[name] for parts in profile_step.PARTS.values() for owner, name in parts)
