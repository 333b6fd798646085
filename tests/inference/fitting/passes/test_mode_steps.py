"""Passes of Adam toward the mode, and which of them is the last."""

import pytest
import torch
from scipy.optimize import minimize
from torch import nn

import bayes_kf as bkf
from bayes_kf.inference.filtering.state import DivergenceError
from bayes_kf.inference.fitting.passes import early_stopping
from bayes_kf.inference.fitting.passes.early_stopping import early_stopped_passes, latest_not_worse
from bayes_kf.inference.fitting.passes.mode_steps import ModeSteps
from bayes_kf.inference.fitting.progress import ProgressBar
from bayes_kf.models.batch import Batch


def data(number, seed=0, noise=1.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 3, generator=generator, dtype=torch.float64)
    logits = x @ torch.randn(3, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64) / noise
    return x, torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)


def batches(x, y, size=16):
    return [(x[k : k + size], y[k : k + size]) for k in range(0, len(x), size)]


def started(x, y, **settings):
    config = bkf.KalmanConfig(covariance="full", temperature=1.0, **settings)
    torch.manual_seed(0)
    model = nn.Linear(3, 3).double()
    posterior = bkf.fit(model, batches(x[:32], y[:32]), config, progress=False)
    return posterior.kf, posterior.state._replace(examples=len(x))


def mode(kf, prior, x, y):
    """The mode by a general optimizer, (n,)."""

    def objective(vector):
        theta = torch.tensor(vector, requires_grad=True)
        loss = nn.functional.cross_entropy(x @ theta[:9].view(3, 3).T + theta[9:], y, reduction="sum")
        total = loss + 0.5 * ((theta - prior.mean).square() / prior.variance).sum()
        (gradient,) = torch.autograd.grad(total, theta)
        return float(total.detach()), gradient.numpy()

    return torch.tensor(minimize(objective, prior.mean.numpy(), jac=True, tol=1e-12).x)


@pytest.mark.parametrize("logit_sd", [0.3, 3.0])
def test_many_passes_end_at_the_mode(logit_sd):
    x, y = data(96)
    kf, state = started(x, y, initial_logit_sd=logit_sd)
    expected, run = mode(kf, state.prior, x, y), ModeSteps(kf, state, 300, 0.03)
    before = (state.belief.mean - expected).norm()
    covariance = state.belief.covariance_matrix()
    for _ in range(300):
        state = run.run(batches(x, y), ProgressBar())
    assert (state.belief.mean - expected).norm() < 0.02 * before
    assert torch.equal(state.belief.covariance_matrix(), covariance)


def test_the_steps_have_the_scale_of_the_prior():
    x, y = data(32)
    for logit_sd in (0.3, 3.0):
        kf, state = started(x, y, initial_logit_sd=logit_sd)
        run = ModeSteps(kf, state._replace(examples=32), 1, learning_rate=0.05)
        after = run.run(batches(x, y, 32), ProgressBar())  # one step
        step = (after.belief.mean - state.belief.mean) / state.prior.variance.sqrt()
        # Adam's first step, up to its ε = 1e-8 beside gradients of about 1e-4
        torch.testing.assert_close(step.abs(), torch.full_like(step, 0.05), rtol=2e-3, atol=0)


def test_the_rate_grows_over_the_warm_up_and_falls_to_zero(monkeypatch):
    x, y = data(32)
    kf, state = started(x, y)
    rates = []
    monkeypatch.setattr(ModeSteps, "_descend", lambda self, gradient, rate: rates.append(rate))
    run = ModeSteps(kf, state._replace(examples=32), 4, 0.8, warm_up=2.0)
    for _ in range(4):
        run.run(batches(x, y, 8), ProgressBar())
    falling = [0.8 * (1 - k / 16) for k in range(16)]
    assert rates == pytest.approx([falling[k] * min(1.0, (k + 1) / 8) for k in range(16)])


def test_passes_that_diverge_begin_anew_with_shorter_steps(monkeypatch):
    x, y = data(160, noise=0.5)
    kf, state = started(x[:96], y[:96], initial_logit_sd=3.0)
    fitted, heldout = batches(x[:96], y[:96]), [Batch(x[96:], y[96:], 64)]
    usual = early_stopped_passes(kf, state, fitted, heldout, 5, lambda text: ProgressBar())
    rates, steps, diverging = [], early_stopping.ModeSteps, iter([True, True, False])

    def recorded(kf, state, passes, rate, **settings):
        rates.append(rate)
        return steps(kf, state, passes, float("inf") if next(diverging) else 0.02, **settings)

    monkeypatch.setattr(early_stopping, "ModeSteps", recorded)
    stopped = early_stopped_passes(kf, state, fitted, heldout, 5, lambda text: ProgressBar())
    assert rates == pytest.approx([0.02 / 3**k for k in range(3)])
    assert stopped.losses == usual.losses
    diverging = iter([True] * 4)
    with pytest.raises(DivergenceError, match="the mean in a pass of Adam"):
        early_stopped_passes(kf, state, fitted, heldout, 5, lambda text: ProgressBar())


def test_other_examples_and_broken_means_are_refused():
    x, y = data(32)
    kf, state = started(x, y)
    with pytest.raises(ValueError, match="`loader` must yield the same 32 examples in every pass, got 16"):
        ModeSteps(kf, state, 2, 0.03).run(batches(x[:16], y[:16]), ProgressBar())
    with pytest.raises(DivergenceError, match="the mean in a pass of Adam"):
        ModeSteps(kf, state, 2, learning_rate=float("inf")).run(batches(x, y), ProgressBar())


def test_the_latest_pass_that_is_not_clearly_worse():
    base = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.randn(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = (noise - noise.mean()) / noise.std(correction=0)  # mean 0, and a standard error of 1/7
    assert latest_not_worse([base + 1.0, base, base + noise + 0.9 / 7]) == 2
    assert latest_not_worse([base + 1.0, base, base + noise + 1.1 / 7]) == 1
    assert latest_not_worse([base, base + 1.0, torch.full_like(base, torch.nan)]) == 0


def test_early_stopping_keeps_the_state_of_the_pass_that_it_names():
    x, y = data(32, noise=5.0)  # labels that are almost random, so that the mode of a wide prior is worse
    kf, state = started(x, y, initial_logit_sd=10.0)
    held = [Batch.of(*data(400, seed=1, noise=5.0))]
    stopped = early_stopped_passes(kf, state, batches(x, y), held, 4, lambda text: ProgressBar())
    assert len(stopped.losses) == 5
    assert stopped.losses[stopped.chosen] <= min(stopped.losses) + 0.05
    again = early_stopped_passes(kf, state, batches(x, y), held, 4, lambda text: ProgressBar())
    assert torch.equal(again.state.belief.mean, stopped.state.belief.mean)
