"""A bank of filters is the filters one by one, on fewer passes."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from bayes_kf.inference import DivergenceError, KalmanConfig, KalmanFilter, Posterior, fit
from bayes_kf.inference.filtering import prequential_temperature
from bayes_kf.inference.fitting.selection.filter_bank import Bank, candidates
from bayes_kf.inference.linearization.linearized_batch import LinearizedBatch
from bayes_kf.models.likelihood import LIKELIHOODS


def model_of(m=3, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, m)).double()


def stream(size=2, count=12, m=3, seed=1):
    g = torch.Generator().manual_seed(seed)
    truth = torch.randn(4, m, generator=g).double()
    inputs = [torch.randn(size, 4, generator=g).double() for _ in range(count)]
    return [(x, (x @ truth).argmax(1)) for x in inputs]


def test_a_bank_of_one_candidate_equals_its_filter():
    config = KalmanConfig()
    bank, kf = Bank(model_of(), [config]), KalmanFilter(model_of(), config)
    data = stream()
    together, alone = bank.init(data[0][0]), kf.init(data[0][0])
    for x, y in data:
        together, seen = bank.update(together, x, y)
        alone, info = kf.update(alone, x, y)
        assert torch.equal(seen.log_loss, info.log_loss)
        assert seen.innovation == info.innovation
        assert seen.step_norm == pytest.approx(info.step_norm)
    for actual, expected in zip(together.states[0].belief, alone.belief, strict=True):
        assert torch.equal(actual, expected)
    assert together.states[0].step == alone.step == together.step
    assert together.states[0].examples == alone.examples
    assert together.own_passes == (0,)


def test_candidates_that_share_no_passes_equal_their_filters(monkeypatch):
    """Where no candidate may learn from another's passes, each is what it would be alone."""
    monkeypatch.setattr("bayes_kf.inference.fitting.selection.shared_update.MAX_OUTPUT_SHIFT", 0.0)
    configs = candidates(KalmanConfig(), {"initial_logit_sd": (0.5, 3.0), "covariance": ("diagonal", "full")})
    bank, data = Bank(model_of(), configs), stream()
    together = bank.init(data[0][0])
    alone = [KalmanFilter(model_of(), config) for config in configs]
    states = [kf.init(data[0][0]) for kf in alone]
    for x, y in data:
        together, _ = bank.update(together, x, y)
        states = [kf.update(state, x, y)[0] for kf, state in zip(alone, states, strict=True)]
    for actual, expected in zip(together.states, states, strict=True):
        assert torch.equal(actual.belief.mean, expected.belief.mean)
        assert torch.equal(actual.temperature_scores.total, expected.temperature_scores.total)
    expected = torch.stack([-state.temperature_scores.total.min() for state in states])
    torch.testing.assert_close(bank.evidence(together), expected)
    assert bank.best(together) == int(expected.argmax())
    torch.testing.assert_close(bank.weights(together), expected.softmax(0))


def test_candidates_of_a_linear_model_share_all_passes_and_equal_their_filters(monkeypatch):
    """To first order is exact there, so one linearization serves every candidate."""
    monkeypatch.setattr("bayes_kf.inference.fitting.selection.shared_update.MAX_OUTPUT_SHIFT", torch.inf)
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    configs = candidates(KalmanConfig(covariance="full", damping=False), {"initial_logit_sd": (0.5, 3.0, 10.0)})
    bank, data = Bank(model, configs), stream()
    pulls = []
    pull = LinearizedBatch.jacobian
    monkeypatch.setattr(LinearizedBatch, "jacobian", lambda self, *args: pulls.append(1) or pull(self, *args))
    together = bank.init(data[0][0])
    begun = len(pulls)
    for x, y in data:
        together, _ = bank.update(together, x, y)
    assert len(pulls) - begun == len(data)
    assert together.own_passes == (0, 0, 0)
    for config, actual in zip(configs, together.states, strict=True):
        kf = KalmanFilter(model, config)
        state = kf.init(data[0][0])
        for x, y in data:
            state, _ = kf.update(state, x, y)
        torch.testing.assert_close(actual.belief.mean, state.belief.mean, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(actual.belief.covariance, state.belief.covariance, rtol=1e-7, atol=1e-10)


def test_evidence_with_shared_passes_is_close_to_that_of_the_filters():
    configs = candidates(KalmanConfig(), {"initial_logit_sd": (1.0, 3.0), "forgetting": (1.0, 0.98)})
    bank, data = Bank(model_of(), configs), stream(count=40)
    together = bank.init(data[0][0])
    for x, y in data:
        together, _ = bank.update(together, x, y)
    assert 0 < sum(together.own_passes) < 40 * 3  # some shared, some not
    for config, actual in zip(configs, bank.evidence(together).tolist(), strict=True):
        kf = KalmanFilter(model_of(), config)
        state = kf.init(data[0][0])
        for x, y in data:
            state, _ = kf.update(state, x, y)
        assert actual == pytest.approx(-float(state.temperature_scores.total.min()), rel=0.1)


def test_a_candidate_that_diverges_is_left_out():
    steep = KalmanConfig(initial_variance=1e300, bound_prior=False, damping=False, expansion="mean", covariance="full")
    bank, data = Bank(model_of(), [steep, KalmanConfig(initial_variance=0.1)]), stream()
    state = bank.init()
    for x, y in data:
        state, info = bank.update(state, x, y)
    assert state.states[0] is None
    assert bank.evidence(state)[0] == -torch.inf
    assert bank.best(state) == 1
    assert torch.isfinite(info.log_loss).all()


TARGETS = {
    "categorical": lambda g, size: torch.randint(3, (size,), generator=g),
    "bernoulli": lambda g, size: torch.randint(2, (size, 3), generator=g).double(),
    "gaussian": lambda g, size: torch.randn(size, 3, generator=g).double(),
    "poisson": lambda g, size: torch.poisson(torch.ones(size, 3, dtype=torch.float64), generator=g),
}


@pytest.mark.parametrize("likelihood", TARGETS)
def test_an_update_reports_the_average_of_what_candidates_predicted(likelihood, monkeypatch):
    """Weighted by their evidence before it; each candidate's own prediction is taken by a forward pass at its mean."""
    monkeypatch.setattr(
        "bayes_kf.inference.fitting.selection.shared_update.MIN_RELATIVE_WEIGHT", 0.0
    )  # else what weighs less than a thousandth is left out
    configs = candidates(KalmanConfig(likelihood=likelihood), {"initial_logit_sd": (0.3, 1.0, 3.0)})
    bank, g = Bank(model_of(), configs), torch.Generator().manual_seed(3)
    state, family = bank.init(torch.randn(4, 4, generator=g).double()), LIKELIHOODS[likelihood]()
    for _ in range(8):
        x, y = torch.randn(3, 4, generator=g).double(), TARGETS[likelihood](g, 3)
        weights = bank.weights(state)
        outputs = [bank.adapter.outputs(s.belief.mean, x) for s in state.states]
        probs = torch.stack([family.log_prob(o, y) for o in outputs]).exp()
        means = torch.stack([w * family.mean(o) for w, o in zip(weights, outputs, strict=True)]).sum(0)
        state, info = bank.update(state, x, y)
        torch.testing.assert_close(info.log_loss, -(weights[:, None] * probs).sum(0).log(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(family.mean(info.outputs), means, rtol=1e-9, atol=1e-12)
        correct = family.correct(info.outputs, y)
        assert correct is None if info.correct is None else torch.equal(info.correct, correct)
    assert len({float(w) for w in weights}) == 3
    assert float((outputs[0] - outputs[2]).abs().max()) > 0.01  # there was something to average


@pytest.mark.parametrize("margin", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("skipped", [0, 10])
def test_within_the_margin_the_narrowest_prior_is_best(margin, skipped, monkeypatch):
    """Against the paired standard errors of what the candidates gained, computed anew at every step.

    Where some steps are skipped, at one temperature, so that what was gained after them is a difference.
    """
    if skipped:
        monkeypatch.setattr(prequential_temperature, "GRID", (1.0,))
    sds = (3.0, 1.0, 0.3)
    bank = Bank(model_of(), candidates(KalmanConfig(), {"initial_logit_sd": sds}), margin)
    g = torch.Generator().manual_seed(5)
    state, seen, picked = bank.init(torch.randn(8, 4, generator=g).double()), [torch.zeros(3).double()], []
    for step in range(25 + skipped):
        x = torch.randn(2, 4, generator=g).double()
        if step == skipped:
            since = state
        state, _ = bank.update(state, x, (x[:, 0] + 0.5 * torch.randn(2, generator=g).double() > 0).long())
        if step < skipped:
            continue
        seen.append(bank.evidence(state, since))
        gained, top = torch.stack(seen).diff(dim=0), int(seen[-1].argmax())
        short = gained[:, [top]] - gained
        error = short.std(0) * len(gained) ** 0.5 if len(gained) > 1 else torch.full((3,), torch.inf).double()
        near = [
            i for i in range(3) if i == top or (margin > 0 and float(short[:, i].sum()) <= margin * float(error[i]))
        ]
        assert bank.best(state, since) == max(near)  # the later, the narrower
        picked.append((bank.best(state, since), top))
    assert bool(margin) == any(best != top for best, top in picked)


def test_fit_continues_with_the_narrowest_prior_within_the_margin():
    grid = {"initial_logit_sd": (0.9, 0.8)}
    wide, narrow = (
        fit(model_of(), stream(), KalmanConfig(tune=grid, tune_margin=margin), progress=False)
        for margin in (0.0, 100.0)
    )
    assert wide.history["evidence"].argmax() == 0
    assert (wide.config.initial_logit_sd, narrow.config.initial_logit_sd) == (0.9, 0.8)


def test_fit_continues_with_the_settings_of_largest_evidence(monkeypatch):
    monkeypatch.setattr(
        "bayes_kf.inference.fitting.selection.shared_update.MAX_OUTPUT_SHIFT", 0.0
    )  # no shared passes: to the bit what it is alone
    data = stream(count=60)
    grid = {"initial_logit_sd": (0.01, 2.0), "covariance": ["diagonal", "low_rank"]}
    config = KalmanConfig(tune=grid, tune_examples=30)
    posterior = fit(model_of(), data, config, progress=False)
    evidence, chosen = posterior.history["evidence"], posterior.kf.config
    assert evidence.shape == (4,)
    bank = Bank(model_of(), candidates(config, grid))
    state = burnt_in = bank.init(torch.cat([x for x, _ in data[:16]]))
    for number, (x, y) in enumerate(data[:15]):
        burnt_in = state if number == 8 else burnt_in  # fifteen of thirty examples end in the eighth batch
        state, _ = bank.update(state, x, y)
    assert torch.equal(evidence, bank.evidence(state, burnt_in))
    losses = [
        -(s.temperature_scores.total - b.temperature_scores.total).min()
        for s, b in zip(state.states, burnt_in.states, strict=True)
    ]
    torch.testing.assert_close(evidence, torch.stack(losses), rtol=0.0, atol=0.0)
    assert chosen == candidates(config, grid)[int(evidence.argmax())]
    assert chosen.initial_logit_sd == 2.0  # the other one hardly moves
    assert chosen.tune is None
    assert len(posterior.history["log_loss"]) == 120
    assert (posterior.state.step, posterior.state.examples) == (60, 120)
    alone = fit(model_of(), data, chosen, progress=False)
    assert torch.equal(posterior.mean_vector, alone.mean_vector)
    assert torch.equal(posterior.history["log_loss"][60:], alone.history["log_loss"][60:])


def test_the_burn_in_does_not_count():
    """Coins at first, from which a wide prior learns nonsense, then a rule, which a narrow one hardly learns."""
    g = torch.Generator().manual_seed(9)
    model = nn.Linear(4, 2).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    x, coins = torch.randn(40, 4, generator=g).double(), torch.randint(2, (40,), generator=g)
    labels = torch.where(torch.arange(40) < 20, coins, (x[:, 0] > 0).long())
    data = list(zip(x.split(2), labels.split(2), strict=True))
    for burn_in, expected in ((0.0, 0.1), (0.5, 10.0)):
        config = KalmanConfig(tune={"initial_logit_sd": (0.1, 10.0)}, tune_examples=40, tune_burn_in=burn_in)
        assert fit(model, data, config, progress=False).config.initial_logit_sd == expected


def test_a_stream_that_ends_with_the_burn_in_is_counted():
    config = KalmanConfig(tune={"initial_logit_sd": (0.01, 2.0)}, tune_examples=200)
    posterior = fit(model_of(), stream(count=50), config, progress=False)
    assert posterior.config.initial_logit_sd == 2.0
    assert posterior.history["evidence"][1] < 0.0


def test_a_tuned_posterior_is_saved_and_loaded(tmp_path):
    config = KalmanConfig(tune={"initial_logit_sd": (1.0, 3.0)}, tune_examples=4)
    posterior = fit(model_of(), stream(), config, progress=False)
    posterior.save_pretrained(tmp_path)
    again = Posterior.from_pretrained(tmp_path, model_of())
    assert again.kf.config == posterior.kf.config
    config.save_pretrained(tmp_path / "config")
    loaded = KalmanConfig.from_pretrained(tmp_path / "config")
    assert dict(loaded.tune) == {"initial_logit_sd": [1.0, 3.0]}


def test_fit_continues_without_a_candidate_that_diverges_at_once():
    grid = {"initial_variance": (1e300, 0.1)}
    config = KalmanConfig(tune=grid, bound_prior=False, damping=False, expansion="mean", covariance="full")
    posterior = fit(model_of(), stream(), config, progress=False)
    assert posterior.kf.config.initial_variance == 0.1
    assert posterior.history["evidence"][0] == -torch.inf
    assert (posterior.history["seconds"] > 0).all()


def test_outputs_that_are_not_finite_leave_the_states(monkeypatch):
    class Cubed(nn.Linear):
        def forward(self, x):
            return super().forward(x) ** 3

    torch.manual_seed(0)
    bank = Bank(Cubed(4, 3), candidates(KalmanConfig(covariance="diagonal"), {"initial_variance": (0.1, 0.2)}))
    state = bank.init()
    with pytest.raises(DivergenceError, match="all candidates of the bank diverged") as caught:
        bank.update(state, torch.full((1, 4), 3e13), torch.tensor([0]))
    assert caught.value.state is state.states[0]


def test_closeness_is_in_units_of_the_noise():
    """The same regression in other units shares the same passes."""
    torch.manual_seed(0)
    x, y = torch.randn(30, 4).double(), torch.randn(30, 1).double()
    own = []
    for scale in (1e-3, 1.0, 1e3):
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape).double()
        model[2].weight.data *= scale
        model[2].bias.data *= scale
        config = KalmanConfig(likelihood="gaussian", noise_variance=(0.1 * scale) ** 2, initial_spread="tensors")
        bank = Bank(model, [dataclasses.replace(config, initial_logit_sd=sd * scale) for sd in (0.3, 1.0)])
        state = bank.init(x)
        for start in range(0, 30, 3):
            state, _ = bank.update(state, x[start : start + 3], scale * y[start : start + 3])
        own.append(state.own_passes)
    assert own[0] == own[1] == own[2]
    assert 0 < sum(own[0]) < 10


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"tune": []}, r"`tune` must be a mapping from settings to values, got \[\]\."),
        ({"tune": {"seed": (0, 1)}}, r"`tune` must name settings that a stream can choose, got 'seed'\."),
        ({"tune": {"rank": 3}}, r"`tune` must hold a list or tuple of values for 'rank', got 3\."),
        ({"tune": {"beta": (0.9, 1.0)}}, r"`beta` must lie strictly between 0 and 1, got 1\.0\."),
        ({"tune": {"rank": (3,)}, "temperature": 1.0}, r"`tune` needs `temperature` 'prequential', got 1\.0\."),
        ({"tune_examples": 0}, r"`tune_examples` must be a whole number >= 1, got 0\."),
        ({"tune_burn_in": 1.0}, r"`tune_burn_in` must lie in \[0, 1\), got 1\.0\."),
        ({"tune_burn_in": "half"}, r"`tune_burn_in` must lie in \[0, 1\), got 'half'\."),
        ({"tune_margin": -1.0}, r"`tune_margin` must be >= 0 and finite, got -1\.0\."),
        (
            {"tune": {"tune_margin": (0.0, 1.0)}},
            r"`tune` must name settings that a stream can choose, got 'tune_margin'",
        ),
    ],
)
def test_grids_that_cannot_be_tuned(setting, message):
    with pytest.raises(ValueError, match=message):
        KalmanConfig(**setting)


@pytest.mark.parametrize("margin", [-0.5, float("nan"), float("inf"), True, "one"])
def test_bad_margins_raise(margin):
    with pytest.raises(ValueError, match=r"`margin` must be >= 0 and finite, got "):
        Bank(model_of(), [KalmanConfig()], margin)


def test_tuning_of_a_trained_adapter_raises():
    with pytest.raises(
        ValueError, match=r"`tune` must be None with `start` 'trained', which makes no predictions before"
    ):
        fit(model_of(), stream(), KalmanConfig(tune={"rank": (3,)}), start="trained", progress=False)


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ([], r"`configs` must hold at least one KalmanConfig, got none\."),
        (
            [KalmanConfig(), KalmanConfig(curvature="sampled")],
            r"`configs` must have the same `curvature`, got 'exact', 'sampled'\.",
        ),
        ([KalmanConfig(temperature=1.0)], r"`configs` must have `temperature` 'prequential', got 1\.0\."),
    ],
)
def test_configs_that_differ_in_the_observation_raise(configs, message):
    with pytest.raises(ValueError, match=message):
        Bank(model_of(), configs)


def test_average_is_the_mixture_of_the_candidates():
    configs = candidates(KalmanConfig(covariance="full"), {"initial_logit_sd": (0.5, 2.0, 8.0)})
    bank, data = Bank(model_of(), configs), stream(count=4)
    state = bank.init(data[0][0])
    for x, y in data:
        state, _ = bank.update(state, x, y)
    x, y = data[0]
    actual = bank.predict(state, x, y, method="probit")
    weights = bank.weights(state)
    assert float(weights.max()) < 0.999  # else nothing is averaged
    each = [bank.posterior(state, g).predict(x, "probit", targets=y) for g in range(3)]
    probs = sum(w * p.probs for w, p in zip(weights, each, strict=True))
    torch.testing.assert_close(actual.probs, probs, rtol=2e-3, atol=2e-3)  # but for candidates of negligible weight
    torch.testing.assert_close(actual.log_prob, actual.probs.gather(1, y[:, None])[:, 0].log(), rtol=1e-9, atol=1e-9)
    drawn = bank.predict(state, x, num_samples=16)
    torch.testing.assert_close(drawn.entropy, drawn.aleatoric + drawn.epistemic)
    assert drawn.samples is None


def test_averaged_regression_has_the_variance_of_the_mixture():
    torch.manual_seed(0)
    model = nn.Linear(2, 1).double()
    configs = candidates(
        KalmanConfig(likelihood="gaussian", covariance="full", initial_variance=1.0), {"initial_variance": (0.3, 3.0)}
    )
    bank = Bank(model, configs)
    state = bank.init()
    x, y = torch.randn(3, 2).double(), torch.randn(3, 1).double()
    state, _ = bank.update(state, x, y)
    actual, weights = bank.predict(state, x), bank.weights(state)
    each = [bank.posterior(state, g).predict(x) for g in range(2)]
    mean = sum(w * p.mean for w, p in zip(weights, each, strict=True))
    second = sum(w * (p.variance + p.mean.square()) for w, p in zip(weights, each, strict=True))
    torch.testing.assert_close(actual.mean, mean)
    torch.testing.assert_close(actual.variance, second - mean.square())


def test_averages_of_every_likelihood_are_mixtures_of_densities():
    torch.manual_seed(0)
    x = torch.randn(6, 2).double()
    for likelihood, y in (("bernoulli", (x > 0).double()), ("gaussian", x), ("poisson", x.exp().round())):
        base = KalmanConfig(likelihood=likelihood, covariance="full", initial_variance=1.0)
        bank = Bank(nn.Linear(2, 2).double(), candidates(base, {"initial_variance": (0.3, 3.0)}))
        state, _ = bank.update(bank.init(), x, y)
        actual, weights = bank.predict(state, x, y), bank.weights(state)
        each = [bank.posterior(state, g).predict(x, targets=y) for g in range(2)]
        mixed = sum(w * p.log_prob.exp() for w, p in zip(weights, each, strict=True))
        torch.testing.assert_close(actual.log_prob, mixed.log())
        mean = sum(w * p.mean for w, p in zip(weights, each, strict=True))
        torch.testing.assert_close(actual.mean, mean)
        if likelihood == "bernoulli":
            entropy = -(mean * mean.log() + (1 - mean) * (1 - mean).log()).sum(-1)
            torch.testing.assert_close(actual.entropy, entropy)
            assert actual.samples is None


def test_candidates_that_diverged_have_no_posterior():
    bank = Bank(model_of(), [KalmanConfig()])
    state = bank.init(stream()[0][0])
    assert bank.posterior(state).config == KalmanConfig()
    with pytest.raises(ValueError, match=r"^`number` must be that of a candidate that did not diverge, got 1\.$"):
        bank.posterior(state, 1)


def test_candidates_with_infinite_log_loss_are_equal_and_better_than_one_that_diverged():
    bank = Bank(nn.Linear(3, 2), [KalmanConfig(initial_logit_sd=sd) for sd in (1.0, 2.0, 3.0)])
    state = bank.init(torch.randn(8, 3))
    total = torch.full((len(prequential_temperature.GRID),), math.inf, dtype=torch.float64)
    states = [
        None,
        *(
            s._replace(temperature_scores=s.temperature_scores._replace(updates=1, total=total))
            for s in state.states[1:]
        ),
    ]
    state = state._replace(states=states)
    assert bank.weights(state).tolist() == [0.0, 0.5, 0.5]
    assert bank.best(state) == 1
