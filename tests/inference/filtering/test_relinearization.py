"""Large batches: linearized again where the true outputs have left the linearized ones."""

import warnings

import pytest
import torch
from torch import nn

import bayes_kf as bkf
from bayes_kf.inference.covariance.diagonal import DiagonalGaussian
from bayes_kf.inference.filtering.linearization_check import (
    TRUST_RADIUS,
    is_small_change,
    move_to_mean,
    symmetric_divergence,
)
from bayes_kf.inference.filtering.measurement_update import measurement_update
from bayes_kf.inference.filtering.step_guard import OBJECTIVE_RTOL, StepGuard
from bayes_kf.inference.filtering.update_info import UpdateInfoBuilder
from bayes_kf.inference.linearization.jacobian_blocks import CHUNK_NUMEL
from bayes_kf.inference.linearization.linearizer import MAX_PASS_BYTES, Linearizer
from bayes_kf.models.batch import Batch
from bayes_kf.models.likelihood import LIKELIHOODS, Gaussian

FEATURES, CLASSES, LEARNED = 16, 10, 1024


def problem(seed, count=LEARNED):
    """Three clusters a class, of which a small network learns all in one pass."""
    g = torch.Generator().manual_seed(seed)
    centres = 1.2 * torch.randn(3 * CLASSES, FEATURES, generator=g)
    which = torch.randint(3 * CLASSES, (count + 1000,), generator=g)
    return centres[which] + 0.6 * torch.randn(count + 1000, FEATURES, generator=g), which % CLASSES


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(FEATURES, 24), nn.Tanh(), nn.Linear(24, CLASSES))


def one_pass(size, seed, **settings):
    """Held-out log loss and accuracy of the mean after one pass, and how often batches were linearized again."""
    x, y = problem(seed)
    kf = bkf.KalmanFilter(network(seed), bkf.KalmanConfig(temperature=1.0, **settings))
    state, again = kf.init(x[:32]), 0
    for first in range(0, LEARNED, size):
        state, info = kf.update(state, x[first : first + size], y[first : first + size])
        again += info.relinearized
    actual = bkf.Posterior(kf, state).predict(x[LEARNED:], "mean", targets=y[LEARNED:])
    right = (actual.probs.argmax(1) == y[LEARNED:]).double().mean()
    return torch.tensor([-float(actual.log_prob.double().mean()), float(right)]), again


@pytest.mark.parametrize(
    "settings",
    [
        {"covariance": "diagonal"},
        {"covariance": "low_rank"},
        pytest.param({"covariance": "low_rank", "curvature": "sampled"}, marks=pytest.mark.slow),
        pytest.param(
            {"covariance": "diagonal", "curvature": "truncated", "curvature_epsilon": 0.05}, marks=pytest.mark.slow
        ),
    ],
    ids=lambda s: "-".join(s.values()) if len(s) < 3 else "truncated",
)
def test_no_batch_size_learns_worse_than_small_ones(settings):
    """Linearized once, a batch of 1,024 ends at an accuracy of 0.3 to 0.8 and a log loss of 0.5 to 2.2."""
    seeds = range(4)
    small = torch.stack([one_pass(16, seed, **settings)[0] for seed in seeds]).mean(0)
    actual = [one_pass(LEARNED, seed, **settings) for seed in seeds]
    large = torch.stack([scores for scores, _ in actual]).mean(0)
    assert large[0] <= 1.05 * small[0]
    assert large[1] >= small[1] - 0.01
    assert min(again for _, again in actual) > 0


def test_a_model_that_is_linear_is_linearized_once():
    x, y = problem(0)
    kf = bkf.KalmanFilter(nn.Linear(FEATURES, CLASSES), bkf.KalmanConfig(initial_logit_sd=10.0))
    info = kf.update(kf.init(x[:32]), x[:300], y[:300])[1]
    assert (info.relinearized, info.linearized_again) == (0, 0)
    assert info.step_norm > 1.0


def test_what_an_update_reports_of_it_is_what_it_did(monkeypatch):
    """Examples are counted as they are linearized; a small budget cuts the batch into pieces, and changes nothing."""
    x, y = problem(0)
    reports, beliefs = [], []
    for budget in (None, MAX_PASS_BYTES + 2 * 8 * CHUNK_NUMEL + 10_000_000):
        kf = bkf.KalmanFilter(network(0), bkf.KalmanConfig(covariance="diagonal", bytes_budget=budget))
        state, counts = kf.init(x[:32]), []
        plain = Linearizer.__call__

        def counted(self, vector, inputs, *, rows_per_example=None, counts=counts, plain=plain):
            counts.append(Batch.of(inputs).size)
            return plain(self, vector, inputs, rows_per_example=rows_per_example)

        with monkeypatch.context() as patched:
            patched.setattr(Linearizer, "__call__", counted)
            after, info = kf.update(state, x[:600], y[:600])
        torch.testing.assert_close(info.outputs, kf.adapter.outputs(state.belief.mean, x[:600]), rtol=1e-4, atol=1e-5)
        assert len(info.log_loss) == len(info.correct) == 600
        assert after.examples == 600
        assert info.linearized_again == max(0, sum(counts) - 600)
        assert len(list(kf.linearize.chunks(state.belief.mean, x[:600]))) == (1 if budget is None else 3)
        reports.append(info)
        beliefs.append(after.belief)
    assert reports[0].relinearized == reports[1].relinearized > 0
    assert 0 < reports[0].linearized_again <= 2 * 600
    assert reports[0].checked > 0
    torch.testing.assert_close(beliefs[0].mean, beliefs[1].mean, rtol=1e-3, atol=1e-4)


def test_an_update_elsewhere_is_not_linearized_again():
    """At a mean that has seen the data, or that is held, the expansion is what is asked for."""
    x, y = problem(0)
    kf = bkf.KalmanFilter(network(0), bkf.KalmanConfig(covariance="diagonal"))
    state = kf.init(x[:32])
    for kwargs in ({"hold_mean": True}, {"at": state.belief.mean + 0.1}):
        info = kf.update(state, x[:600], y[:600], **kwargs)[1]
        assert (info.relinearized, info.linearized_again, info.checked) == (0, 0, 0)


@pytest.mark.parametrize("settings", [{}, {"gradient_penalty": 1e-30}])
def test_a_bank_of_one_and_a_vanishing_penalty_do_the_same(settings):
    x, y = problem(1)
    config = bkf.KalmanConfig(covariance="diagonal")
    kf = bkf.KalmanFilter(network(1), config)
    expected, info = kf.update(kf.init(x[:32]), x[:500], y[:500])
    other = bkf.KalmanConfig(covariance="diagonal", **settings)
    bank = bkf.Bank(network(1), [other])
    state, report = bank.update(bank.init(x[:32]), x[:500], y[:500])
    torch.testing.assert_close(state.states[0].belief.mean, expected.belief.mean)
    assert report.relinearized == info.relinearized > 0


def test_the_guard_compares_true_outputs_with_true_outputs():
    """A step accepted or not as by brute force, whatever the first-order outputs before it claim."""
    torch.manual_seed(0)
    x, y = torch.randn(20, 3), torch.randint(0, 4, (20,))
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
    kf = bkf.KalmanFilter(model, bkf.KalmanConfig(covariance="diagonal"))
    state = kf.init(x)
    start = state.belief.mean
    state = state._replace(belief=state.belief._replace(mean=start + 0.2 * torch.randn_like(start)))
    (batch,) = kf._measure(state, Batch.of(x, y), start)
    everything = slice(0, 20)
    block = batch.block(everything, 4).shifted(state.belief.mean - start)

    def loss(mean):
        return -kf.adapter.outputs(mean, x).log_softmax(1).gather(1, y[:, None]).sum()

    before, verdicts = loss(state.belief.mean), set()
    wide = DiagonalGaussian(state.belief.mean, torch.full_like(start, 1e6))
    state = state._replace(belief=wide)
    gradient = torch.autograd.functional.jacobian(
        lambda v: nn.functional.cross_entropy(kf.adapter.call(kf.adapter.unflatten(v), x), y), wide.mean
    )
    for scale in (2.0, -2.0, 5.0, -5.0):
        after = wide._replace(mean=wide.mean - scale * gradient / gradient.norm())
        change = block.jacobian.matvec(after.mean - wide.mean)
        assert not is_small_change(change, block.family, block.outputs, TRUST_RADIUS)  # else accepted unchecked
        for claimed in (0.0, -100.0, 100.0):  # added to the label's logit in the first-order outputs
            outputs = block.outputs.scatter_add(1, y[:, None], torch.full((20, 1), claimed))
            guard = StepGuard(kf.config.noise_settings, state, batch, everything, block._replace(outputs=outputs))
            verdicts.add(guard.accepts(after))
            assert guard.accepts(after) == bool(loss(after.mean) <= before * (1 + OBJECTIVE_RTOL))
    assert verdicts == {True, False}


def test_some_examples_are_used_even_if_a_second_state_has_left_the_linearization():
    """Without this a batch would be linearized at the same mean again and again."""
    torch.manual_seed(0)
    x, y = torch.randn(40, 3), torch.randint(0, 4, (40,))
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
    kf = bkf.KalmanFilter(model, bkf.KalmanConfig(covariance="diagonal", initial_variance=100.0, bound_prior=False))
    state = kf.init(x)
    kf.linearize.prepare(state.belief.mean, x)
    (chunk,) = kf._measure(state, Batch.of(x, y), state.belief.mean)
    far = state._replace(belief=state.belief.with_mean(state.belief.mean + 3.0 * torch.randn_like(state.belief.mean)))
    moved, accurate = move_to_mean(
        chunk, slice(0, 40), chunk.block(slice(0, 40), 4), far.belief.mean, UpdateInfoBuilder()
    )
    assert not accurate
    assert torch.isfinite(moved.outputs).all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of refused steps
        updated = measurement_update(kf.config, [state, far], chunk, [UpdateInfoBuilder(), UpdateInfoBuilder()])
    assert 0 < updated.num_examples <= 20  # a half of the batch, at most


@pytest.mark.parametrize("name", [name for name in LIKELIHOODS if name not in ("student_t", "tokens")])
def test_the_divergence_is_that_of_the_predictions(name):
    """Both Kullback-Leibler divergences of Pyro's distributions added."""
    torch.manual_seed(0)
    family = Gaussian(torch.tensor([0.5, 2.0, 1.0])) if name == "gaussian" else LIKELIHOODS[name]()
    one, two = torch.randn(2, 7, 4 if name == "heteroscedastic_gaussian" else 3).double()
    p, q = (family.distribution(outputs) for outputs in (one, two))
    if name in ("categorical", "ordinal"):
        expected = torch.distributions.kl_divergence(p, q) + torch.distributions.kl_divergence(q, p)
    else:
        p, q = p.base_dist, q.base_dist
        expected = (torch.distributions.kl_divergence(p, q) + torch.distributions.kl_divergence(q, p)).sum(-1)
    assert symmetric_divergence(family, one, two) == pytest.approx(float(expected.mean()), rel=1e-6)
