"""The grouping loss is the known variance of accuracies between groups, and zero without groups."""

import pytest
import torch

from bayes_kf import evaluation as ev


def case(spread: float, size: int = 4000, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Calibrated confidences; the sign of the first of three features moves the accuracy up or down by ``spread``."""
    generator = torch.Generator().manual_seed(seed)
    confidence = 0.55 + 0.3 * torch.rand(size, generator=generator, dtype=torch.float64)
    features = torch.randn(size, 3, generator=generator)
    truth = confidence + spread * features[:, 0].sign()
    return confidence, torch.rand(size, generator=generator) < truth, features


@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_the_mean_over_data_sets_is_the_known_loss(spread):
    losses = [ev.grouping_loss(*case(spread, seed=seed), num_groups=2) for seed in range(30)]
    values = torch.tensor([loss.value for loss in losses])
    error = float(values.std()) / 30**0.5
    within = 0.3**2 / 12 / 15**2  # of the confidences in a bin, which the groups cannot see
    assert abs(float(values.mean()) - spread**2) < 4 * error + within
    assert all(loss.value == pytest.approx(loss.explained - loss.bias) for loss in losses)


def test_a_calibrated_model_may_have_it_and_features_without_information_do_not_show_it():
    confidence, correct, features = case(0.14)
    shown = ev.grouping_loss(confidence, correct, features)
    hidden = ev.grouping_loss(confidence, correct, features[:, 1:])
    assert shown.value > 0.01
    assert abs(hidden.value) < 0.003
    assert hidden.explained > 0  # without the correction
    probs = torch.stack([confidence, 1 - confidence], dim=1)
    assert ev.calibration_test(probs, (~correct).long()).p_value > 0.01


def test_bad_features_are_refused():
    confidence, correct, features = case(0.0, 50)
    with pytest.raises(ValueError, match=r"^`features` must have shape \(50, D\), got \(50,\)\.$"):
        ev.grouping_loss(confidence, correct, features[:, 0])
    with pytest.raises(ValueError, match=r"^`num_groups` must be a positive integer, got 0\.$"):
        ev.grouping_loss(confidence, correct, features, num_groups=0)
    assert ev.grouping_loss(confidence[:5], correct[:5], features[:5]) == (0.0, 0.0, 0.0)
