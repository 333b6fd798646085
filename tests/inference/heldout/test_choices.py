"""Numbers that held-out data choose: their value, their interval, and what stands at an edge."""

import math

import pytest
import torch
from scipy.optimize import minimize_scalar

from bayes_kf.inference.heldout.choice import most_probable
from bayes_kf.inference.heldout.heldout_examples import HeldoutOutputs
from bayes_kf.inference.heldout.member_weights import choose_weights
from bayes_kf.inference.heldout.sharpness import (
    choose_sharpness,
    cross_fitted_sharpness,
    mixture_log_loss,
    point_log_losses,
)
from bayes_kf.models.likelihood import Categorical


def test_the_most_probable_value_of_a_lognormal_and_its_interval():
    values = [10.0 ** (0.25 * k) for k in range(-12, 13)]
    choice = most_probable(lambda x: -0.5 * ((math.log(x) - 0.3) / 0.8) ** 2, values)
    assert choice.value == pytest.approx(math.exp(0.3), rel=0.01)
    assert choice.low == pytest.approx(math.exp(0.3 - 1.645 * 0.8), rel=0.1)
    assert choice.high == pytest.approx(math.exp(0.3 + 1.645 * 0.8), rel=0.1)
    assert not choice.at_edge


@pytest.mark.parametrize(("slope", "edge"), [(5.0, 100.0), (-5.0, 0.01)])
def test_a_value_at_an_edge_says_so(slope, edge):
    choice = most_probable(lambda x: slope * math.log(x), [0.01, 0.1, 1.0, 10.0, 100.0])
    assert (choice.value, choice.at_edge) == (edge, True)
    assert choice.low <= choice.value <= choice.high


def logits_and_labels(number, scale):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(number, 3, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return scale * logits, labels


@pytest.mark.parametrize(("number", "sd"), [(400, 0.5), (49, 0.2)])
@pytest.mark.parametrize("scale", [0.5, 2.5])
def test_the_divisor_is_the_maximum_of_likelihood_and_prior(number, sd, scale):
    logits, labels = logits_and_labels(number, scale)
    held = HeldoutOutputs(Categorical(), logits, torch.zeros(number, 3, 3, dtype=torch.float64), None, labels)
    chosen = choose_sharpness([held])

    def loss(u):
        return (
            float(torch.nn.functional.cross_entropy(logits / math.exp(u), labels, reduction="sum"))
            + 0.5 * (u / sd) ** 2
        )

    expected = math.exp(minimize_scalar(loss, bounds=(-2, 2), method="bounded").x)
    assert chosen.value == pytest.approx(expected, rel=0.02)
    assert chosen.low < chosen.value < chosen.high
    if number == 400:
        assert chosen.low < scale < chosen.high  # the logits were multiplied by it


def test_a_few_examples_that_are_all_right_do_not_make_predictions_certain():
    logits = torch.tensor([[2.0, 0.0, 0.0]]).double().repeat(30, 1)
    labels = torch.zeros(30, dtype=torch.long)
    held = HeldoutOutputs(Categorical(), logits, torch.zeros(30, 3, 3, dtype=torch.float64), None, labels)
    assert choose_sharpness([held]).value > 0.5


def test_the_divisor_of_cross_fitted_members_is_a_share_of_that_of_all_their_examples():
    logits, labels = logits_and_labels(300, 2.0)
    generator = torch.Generator().manual_seed(1)
    root = 0.3 * torch.randn(300, 3, 3, generator=generator, dtype=torch.float64)
    held = [
        HeldoutOutputs(Categorical(), logits[part], root[part].mT @ root[part], None, labels[part])
        for part in (slice(0, 100), slice(100, 200), slice(200, 300))
    ]
    together = choose_sharpness([HeldoutOutputs(Categorical(), logits, root.mT @ root, None, labels)])
    chosen = cross_fitted_sharpness(held)
    assert together.value > 1.3
    for name in ("value", "low", "high"):
        assert getattr(chosen, name) == pytest.approx(getattr(together, name) / 3**0.2)
    assert cross_fitted_sharpness(held[:1]) == choose_sharpness(held[:1])
    drawn = [HeldoutOutputs(h.family, h.outputs, None, root[:100], h.targets) for h in held]
    losses = torch.cat([part.log_loss(1.2) for part in drawn])
    torch.testing.assert_close(HeldoutOutputs.joined(drawn).log_loss(1.2), losses, rtol=0, atol=0.02)  # other draws


def test_the_loss_of_a_mixture_is_that_of_the_mean_probability():
    (one, labels), (two, _) = logits_and_labels(20, 1.0), logits_and_labels(20, -1.0)
    zero = torch.zeros(20, 3, 3, dtype=torch.float64)
    members = [HeldoutOutputs(Categorical(), logits, zero, None, labels) for logits in (one, two)]
    probs = 0.7 * (one / 1.3).softmax(1) + 0.3 * (two / 1.3).softmax(1)
    expected = -probs.gather(1, labels[:, None]).squeeze(1).log()
    torch.testing.assert_close(mixture_log_loss(members, [0.7, 0.3], 1.3), expected, rtol=0, atol=1e-9)


def test_point_losses_of_real_targets_use_the_best_noise_variance():
    outputs, targets = torch.zeros(100, 2), torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    variance = targets.double().square().mean(0)
    expected = 0.5 * (variance.log() + targets.double().square() / variance).sum(1)
    torch.testing.assert_close(point_log_losses("gaussian", outputs, targets), expected)


def test_members_have_equal_weights_unless_one_has_failed():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(50, generator=generator, dtype=torch.float64) for _ in range(2))
    first, second = (values - values.mean() for values in (first, second))
    error = float((first.square().sum() + second.square().sum()) / 98 * 2 / 50) ** 0.5  # of two independent means
    assert choose_weights([first, second + 3.9 * error]) == [0.5, 0.5]
    assert choose_weights([first, second + 4.1 * error]) == [1.0, 0.0]
    assert choose_weights([second + 4.5 * error, first, first.clone()]) == [0.0, 0.5, 0.5]
    easy = torch.full((50,), 0.01)  # all right, so that their own variance would be zero
    assert choose_weights([easy, first + 0.4]) == [0.5, 0.5]
    assert choose_weights([first, torch.full((50,), torch.inf)]) == [1.0, 0.0]
    assert choose_weights([first]) == [1.0]
