"""R-Kalman: updates from P̃⁻¹ = P⁻¹ + ρ‖g‖² I, against the same written out densely in float64."""

import copy
import itertools

import pytest
import torch
from oracles import dense_jacobian
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bayes_kf.inference import DivergenceError, KalmanConfig, KalmanFilter
from bayes_kf.inference.config import CURVATURES, NOISES
from bayes_kf.inference.covariance.structure import STRUCTURES
from bayes_kf.inference.filtering import measurement, measurement_update
from bayes_kf.inference.filtering.gradient_penalty import mean_gradient
from bayes_kf.inference.filtering.update_info import UpdateInfoBuilder
from bayes_kf.inference.fitting.fit import fit
from bayes_kf.inference.fitting.selection.filter_bank import Bank
from bayes_kf.inference.linearization.linearizer import Linearizer
from bayes_kf.inference.measurement_model import noise
from bayes_kf.inference.posterior import Posterior
from bayes_kf.models.batch import Batch

M = 3
FORMS = ("transient", "permanent")
PLAIN = {"expansion": "mean", "damping": False, "initial_variance": 0.3, "bound_prior": False, "temperature": 1.0}


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, M)).double()


def stream(size=2, count=5, seed=1, likelihood="categorical"):
    g = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(size, 4, generator=g).double()
        yield (
            x,
            (
                torch.randint(M, (size,), generator=g)
                if likelihood == "categorical"
                else torch.randn(size, M, generator=g).double()
            ),
        )


def at(model, vector):
    """A copy of a model of plain parameters with ``vector`` in their place."""
    model = copy.deepcopy(model)
    nn.utils.vector_to_parameters(vector, model.parameters())
    return model


def autograd_gradient(model, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss(model), list(model.parameters()))])


class Dense:
    """The filter with dense matrices: any structure is the exact Gaussian posterior, projected after every update."""

    def __init__(self, model, config, vector, variance, blocks):
        self.model, self.config, self.mean, self.cov = model, config, vector, torch.diag(variance)
        self.r, self.blocks = torch.eye(M).double(), blocks

    def loss(self, model, x, y):
        if self.config.likelihood == "categorical":
            return F.cross_entropy(model(x), y)
        return 0.5 * (model(x) - y).square().sum(1).mean() / self.config.noise_variance

    def update(self, x, y):
        model = at(self.model, self.mean)
        outputs, jacobian = dense_jacobian(model, lambda m: m(x))
        gradient = autograd_gradient(model, lambda m: self.loss(m, x, y))
        a = self.config.gradient_penalty * float(gradient.square().sum())
        tight = torch.linalg.inv(torch.linalg.inv(self.cov) + a * torch.eye(len(self.mean)).double())
        mean, tight_cov, tight_r = self.posterior(tight, outputs, jacobian, y)
        _, cov, r = self.posterior(self.cov, outputs, jacobian, y)
        permanent = self.config.gradient_penalty_form == "permanent"
        self.mean, self.cov, self.r = mean, tight_cov if permanent else cov, tight_r if permanent else r
        return a

    def posterior(self, prior, outputs, jacobian, y):
        """Mean, projected covariance, and R after a batch under the belief N(μ, ``prior``)."""
        if self.config.likelihood == "gaussian":
            information = torch.eye(M).double().expand(len(y), M, M) / self.config.noise_variance
            pulled, r = ((y - outputs) / self.config.noise_variance), self.r
        else:
            prob = outputs.softmax(-1)
            error = F.one_hot(y, M).double() - prob
            slope = torch.diag_embed(prob) - prob.unsqueeze(-1) * prob.unsqueeze(1)
            information, pulled, r = slope, error, self.r
            if self.config.noise == "ema_taylor":
                h = slope @ jacobian
                actual = (error.unsqueeze(-1) * error.unsqueeze(1) + h @ prior @ h.mT).mean(0)
                r = 0.95 * self.r + 0.05 * actual
                inverse = torch.linalg.inv(r)
                information = slope @ inverse @ slope
                pulled = (slope @ inverse @ error.unsqueeze(-1)).squeeze(-1)
        precision = torch.linalg.inv(prior) + (jacobian.mT @ information @ jacobian).sum(0)
        cov, step = torch.linalg.inv(precision), (jacobian.mT @ pulled.unsqueeze(-1)).sum((0, 2))
        kind = self.config.covariance
        if kind in ("diagonal_information", "diagonal_mixed"):
            projected = torch.diag(1.0 / precision.diagonal())
        elif kind == "diagonal":
            projected = torch.diag(cov.diagonal())
        elif kind == "block_diagonal":
            projected = cov * self.blocks
        else:
            projected = cov
        return self.mean + (projected if kind == "diagonal_information" else cov) @ step, projected, r


def dense_of(model, config, state):
    sizes = [p.numel() for p in model.parameters()]
    blocks = torch.block_diag(*[torch.ones(size, size) for size in sizes]).double()
    return Dense(model, config, state.belief.mean, state.prior.variance, blocks)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("covariance", STRUCTURES)
@pytest.mark.parametrize(
    "setting",
    [{}, {"noise": "ema_taylor"}, {"likelihood": "gaussian", "noise_variance": 0.4}],
    ids=["own", "ema", "reg"],
)
def test_equals_the_dense_filter(covariance, form, setting):
    model = network()
    penalty = {"gradient_penalty": 3.0, "gradient_penalty_form": form}
    config = KalmanConfig(covariance=covariance, rank=27, blocks="tensors", **penalty, **PLAIN, **setting)
    kf = KalmanFilter(model, config)
    state = kf.init()
    dense = dense_of(model, config, state)
    for x, y in stream(likelihood=config.likelihood):
        state, info = kf.update(state, x, y)
        assert dense.update(x, y) == pytest.approx(info.penalty, rel=1e-9)
        torch.testing.assert_close(state.belief.mean, dense.mean, rtol=1e-9, atol=1e-9)
        actual = state.belief.covariance_matrix()
        torch.testing.assert_close(actual, dense.cov, rtol=1e-9, atol=1e-9)
        assert info.penalty > 0.1  # of an information of about 1: a penalty that is felt


@pytest.mark.parametrize("form", FORMS)
def test_the_step_ends_at_the_penalized_mode(form):
    """With expansion at the mode, −log p(y | f + Jδ) + ½δᵀP̃⁻¹δ is least at the new mean: its gradient there is zero."""
    model, (x, y) = network(), next(stream(4))
    penalty = {"gradient_penalty": 2.0, "gradient_penalty_form": form}
    config = KalmanConfig(covariance="full", **(PLAIN | {"expansion": "mode"}), **penalty)
    kf = KalmanFilter(model, config)
    before = kf.init()
    state, info = kf.update(before, x, y)
    outputs, jacobian = dense_jacobian(model, lambda m: m(x))
    eye = torch.eye(len(before.belief.mean)).double()
    plain, tight = 1.0 / 0.3 * eye, (1.0 / 0.3 + info.penalty) * eye

    def seen(step):
        return outputs + jacobian @ step

    def gradient(step, precision):
        error = F.one_hot(y, M).double() - seen(step).softmax(-1)
        return precision @ step - (jacobian.mT @ error.unsqueeze(-1)).sum((0, 2))

    def information(step, precision):
        prob = seen(step).softmax(-1)
        slope = torch.diag_embed(prob) - prob.unsqueeze(-1) * prob.unsqueeze(1)
        return precision + (jacobian.mT @ slope @ jacobian).sum(0)

    step = state.belief.mean - before.belief.mean
    assert float(gradient(step, tight).abs().max()) < 1e-8 * float(gradient(0 * step, tight).abs().max())
    precision = tight if form == "permanent" else plain
    mode = step
    for _ in range(50 if form == "transient" else 0):  # Newton's steps to the mode without the penalty
        mode = mode - torch.linalg.solve(information(mode, plain), gradient(mode, plain))
    expected = torch.linalg.inv(information(mode, precision))
    torch.testing.assert_close(state.belief.covariance, expected, rtol=1e-8, atol=1e-8)


def combinations():
    for covariance in STRUCTURES:
        yield from ({"covariance": covariance, "noise": noise} for noise in NOISES)
        yield from ({"covariance": covariance, "curvature": curvature} for curvature in CURVATURES[1:])
        yield {"covariance": covariance, "likelihood": "gaussian", "noise_variance": "estimated"}
        yield {"covariance": covariance, "drift_variance": 0.01, "forgetting": 0.9, "prior_pull": 0.1}
        yield {"covariance": covariance, "gate_quantile": 0.5}


def same(first, second):
    """Whether two states are the same numbers."""
    pairs = zip(flat(first), flat(second), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def flat(state):
    return [leaf for part in state for leaf in flat(part)] if isinstance(state, tuple) else [state]


@pytest.mark.parametrize("setting", list(combinations()), ids=lambda s: "-".join(str(v) for v in s.values()))
def test_no_penalty_is_the_plain_filter_bit_for_bit(setting, monkeypatch):
    def forbidden(*_):
        raise AssertionError("a pass for a gradient that nobody asked for")

    config = KalmanConfig(rank=2, gradient_penalty=0.0, gradient_penalty_form="permanent", **setting)
    kf = KalmanFilter(network(), config)
    monkeypatch.setattr(Linearizer, "gradient", forbidden)
    start, plain = kf.init(next(stream(likelihood=config.likelihood))[0]), None
    state = plain = start
    for x, y in stream(likelihood=config.likelihood):
        state, info = kf.update(state, x, y)
        plain = recursion(kf, plain, x, y)
        assert same(state, plain)
        assert info.penalty == 0.0


def recursion(kf, state, x, y):
    """Predict, linearize and learn, without anything between them."""
    kf.linearize.prepare(state.belief.mean, x)
    state = before = kf._predict(state)
    for batch in kf._measure(state, Batch.of(x, y), state.belief.mean):
        state = measurement_update.measurement_update(kf.config, [state], batch, [UpdateInfoBuilder()]).states[0]
    return state._replace(noise=state.noise._replace(step=before.noise.step + 1), step=before.step + 1)


@pytest.mark.parametrize("setting", list(combinations()), ids=lambda s: "-".join(str(v) for v in s.values()))
@pytest.mark.parametrize("form", FORMS)
def test_a_vanishing_penalty_is_the_plain_filter(setting, form):
    """Both sides are gone through, and 1 + a p is 1: forms that divide by it agree bit for bit, others to rounding."""
    penalty = {"gradient_penalty": 1e-60, "gradient_penalty_form": form}
    kf = KalmanFilter(network(), KalmanConfig(rank=2, **penalty, **setting))
    other = KalmanFilter(network(), KalmanConfig(rank=2, **setting))
    first = next(stream(likelihood=kf.config.likelihood))[0]
    state, plain = kf.init(first), other.init(first)
    for x, y in stream(likelihood=kf.config.likelihood):
        (state, info), (plain, expected) = kf.update(state, x, y), other.update(plain, x, y)
        assert info.penalty > 0.0
        if kf.config.covariance.startswith("diagonal"):
            assert same(state, plain)
        for actual, wanted in zip(flat(state), flat(plain), strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-12)
        assert info.degrees_of_freedom == expected.degrees_of_freedom
        numbers = (info.innovation, info.damping, info.step_norm, info.jitter, info.lumped)
        wanted = (expected.innovation, expected.damping, expected.step_norm, expected.jitter, expected.lumped)
        assert numbers == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("covariance", STRUCTURES)
def test_a_permanent_penalty_is_an_update_from_the_tightened_belief(covariance):
    model, (x, y) = network(), next(stream(3))
    config = KalmanConfig(covariance=covariance, gradient_penalty=5.0, gradient_penalty_form="permanent")
    kf, plain = KalmanFilter(model, config), KalmanFilter(model, KalmanConfig(covariance=covariance))
    start = kf.init(x)
    state, info = kf.update(start, x, y)
    added = torch.full_like(start.belief.mean, info.penalty)
    tight, _ = plain.update(start._replace(belief=start.belief.add_precision(added)), x, y)
    assert same(state.belief, tight.belief)
    untouched, _ = plain.update(start, x, y)
    assert same(state.temperature_scores, untouched.temperature_scores)  # predictions do not know the targets
    assert not same(tight.temperature_scores, untouched.temperature_scores)


@pytest.mark.parametrize("covariance", STRUCTURES)
def test_a_transient_penalty_leaves_the_covariance_and_scores(covariance):
    model, (x, y) = network(), next(stream(3))
    kf = KalmanFilter(model, KalmanConfig(covariance=covariance, gradient_penalty=5.0))
    plain = KalmanFilter(model, KalmanConfig(covariance=covariance))
    start = kf.init(x)
    (state, info), (expected, report) = kf.update(start, x, y), plain.update(start, x, y)
    assert same(state._replace(belief=state.belief._replace(mean=expected.belief.mean)), expected)
    steps = [(s.belief.mean - start.belief.mean).norm() for s in (state, expected)]
    assert steps[0] < steps[1]
    assert (info.innovation, info.step_norm) == (report.innovation, float(steps[0]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bytes_budget", [1, 6_000])
def test_how_a_batch_is_cut_does_not_matter(form, bytes_budget, monkeypatch):
    """A linear model under the full covariance: pieces by the memory, and parts of 4 rows, against all at once."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(5, 2).double(), torch.randn(12, 5).double(), torch.randn(12, 2).double()
    penalty = {"gradient_penalty": 0.7, "gradient_penalty_form": form}
    setting = {"likelihood": "gaussian", "covariance": "full", "initial_variance": 0.5, **penalty}
    whole, cut = (KalmanFilter(model, KalmanConfig(bytes_budget=b, **setting)) for b in (None, bytes_budget))
    state, info = whole.update(whole.init(), x, y)
    monkeypatch.setattr(measurement, "MAX_BLOCK_ROWS", 4)
    assert len(list(cut.linearize.chunks(cut.adapter.vector(), x))) > 1 or bytes_budget > 1
    other, report = cut.update(cut.init(), x, y)
    assert report.penalty == pytest.approx(info.penalty, rel=1e-12)
    torch.testing.assert_close(other.belief.mean, state.belief.mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(other.belief.covariance, state.belief.covariance, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_the_gradient_is_the_mean_loss_s(curvature, size):
    """Whatever the curvature sees, the expansion, the model's class, and the number of pieces."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, M)).double()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])).double()
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
    x, y = next(stream(size))
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(F.cross_entropy(model(x), y), trained)])
    for budget in (None, 1):
        config = KalmanConfig(curvature=curvature, gradient_penalty=2.0, bytes_budget=budget)
        kf = KalmanFilter(model, config)
        state = kf.init(x)
        actual = mean_gradient(config, kf.linearize, state, Batch.of(x, y))
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
        assert kf.update(state, x, y)[1].penalty == pytest.approx(2.0 * float(expected.square().sum()), rel=1e-10)


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_gradient_reaches_checkpointed_layers(reentrant):
    class Checkpointed(nn.Sequential):
        def forward(self, x):
            return checkpoint(super().forward, x.requires_grad_(True), use_reentrant=reentrant)

    plain, (x, y) = network(), next(stream(3))
    config = KalmanConfig(gradient_penalty=1.0)
    kf = KalmanFilter(Checkpointed(*network()), config)
    state = kf.init(x)
    expected = autograd_gradient(plain, lambda m: F.cross_entropy(m(x), y))
    torch.testing.assert_close(
        mean_gradient(config, kf.linearize, state, Batch.of(x, y)), expected, rtol=1e-10, atol=1e-12
    )


def test_the_gradient_of_a_first_batch_with_estimated_noise():
    """σ² is the first guess that the filter makes of it: the mean square of the first residuals."""
    model, (x, y) = network(), next(stream(6, likelihood="gaussian"))
    config = KalmanConfig(likelihood="gaussian", noise_variance="estimated", gradient_penalty=1.0)
    kf = KalmanFilter(model, config)
    guess = (y - model(x)).square().mean(0).detach()
    expected = autograd_gradient(model, lambda m: 0.5 * ((m(x) - y).square() / guess).sum(1).mean())
    state = kf.init(x)
    torch.testing.assert_close(
        mean_gradient(config, kf.linearize, state, Batch.of(x, y)), expected, rtol=1e-10, atol=1e-12
    )
    after, _ = kf.update(state, x, y)
    later = noise.likelihood(config.noise_settings, after.noise).noise_variance
    moved = at(model, after.belief.mean)
    expected = autograd_gradient(moved, lambda m: 0.5 * ((m(x) - y).square() / later).sum(1).mean())
    torch.testing.assert_close(
        mean_gradient(config, kf.linearize, after, Batch.of(x, y)), expected, rtol=1e-10, atol=1e-12
    )


def test_copies_of_a_batch_have_its_penalty():
    model, (x, y) = network(), next(stream(3))
    kf = KalmanFilter(model, KalmanConfig(gradient_penalty=1.0))
    state = kf.init(x)
    once, twice = (kf.update(state, x.repeat(k, 1), y.repeat(k))[1].penalty for k in (1, 2))
    assert twice == pytest.approx(once, rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("covariance", STRUCTURES)
def test_a_huge_penalty_holds_the_mean_in_single_precision(covariance, form):
    penalty = {"gradient_penalty": 1e9, "gradient_penalty_form": form}
    kf = KalmanFilter(network().float(), KalmanConfig(covariance=covariance, initial_variance=0.1, **penalty))
    start = state = kf.init()
    for x, y in stream():
        state, info = kf.update(state, x.float(), y)
        assert info.step_norm < 1e-5
    ratio = kf.marginal_variance(state) / start.prior.variance
    assert bool((ratio > 0).all())
    assert bool((ratio < 1e-6).all()) == (form == "permanent")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("trusted", [0.0, float("inf")], ids=["own passes", "shared passes"])
def test_a_bank_s_candidates_are_their_filters(form, trusted, monkeypatch):
    """Bit for bit where each takes passes of its own; and a linear model's, which share all, to rounding."""
    torch.manual_seed(0)
    model = network() if trusted == 0.0 else nn.Linear(4, M).double()
    monkeypatch.setattr("bayes_kf.inference.fitting.selection.shared_update.MAX_OUTPUT_SHIFT", trusted)
    configs = [
        KalmanConfig(gradient_penalty=rho, gradient_penalty_form=form, expansion="mean", damping=False)
        for rho in (0.0, 0.3, 4.0)
    ]
    bank, batches = Bank(model, configs), list(stream(2, 6))
    state, alone = bank.init(batches[0][0]), [KalmanFilter(model, config) for config in configs]
    states = [kf.init(batches[0][0]) for kf in alone]
    for x, y in batches:
        state, _ = bank.update(state, x, y)
        states = [kf.update(s, x, y)[0] for kf, s in zip(alone, states, strict=True)]
    assert (sum(state.own_passes) > 0) == (trusted == 0.0)
    for actual, wanted in zip(state.states, states, strict=True):
        assert same(actual, wanted) or trusted > 0.0
        torch.testing.assert_close(actual.belief.mean, wanted.belief.mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(actual.belief.diagonal, wanted.belief.diagonal, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_saved_and_loaded_it_goes_on_as_it_would_have(form, tmp_path):
    model, batches = network(), list(stream(2, 4))
    kf = KalmanFilter(model, KalmanConfig(gradient_penalty=1.5, gradient_penalty_form=form))
    state = kf.init(batches[0][0])
    for x, y in batches[:3]:
        state, _ = kf.update(state, x, y)
    Posterior(kf, state).save_pretrained(tmp_path / "saved")
    loaded = Posterior.from_pretrained(tmp_path / "saved", model)
    assert (loaded.config.gradient_penalty, loaded.config.gradient_penalty_form) == (1.5, form)
    assert same(
        kf.update(state, *batches[3])[0],
        KalmanFilter(loaded.adapter, loaded.config).update(loaded.state, *batches[3])[0],
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gradient_penalty": -1.0}, "`gradient_penalty` must be >= 0 and finite, got -1.0"),
        ({"gradient_penalty": float("nan")}, "`gradient_penalty` must be >= 0 and finite, got nan"),
        ({"gradient_penalty": True}, "`gradient_penalty` must be >= 0 and finite, got True"),
        ({"gradient_penalty_form": "none"}, "`gradient_penalty_form` must be one of transient, permanent, got 'none'"),
        ({"gradient_penalty": 1.0, "passes": 2}, "`passes` above 1 needs `gradient_penalty` 0.0, "),
        ({"gradient_penalty": 1.0, "mean_passes": 1}, "`mean_passes` above 0 needs `gradient_penalty` 0.0, "),
    ],
)
def test_bad_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        KalmanConfig(**fields)


def test_a_mean_that_does_not_learn_has_no_penalty():
    model, (x, y) = network(), next(stream())
    kf = KalmanFilter(model, KalmanConfig(gradient_penalty=1.0))
    state = kf.init(x)
    for given in ({"hold_mean": True}, {"at": state.belief.mean}):
        with pytest.raises(ValueError, match="`gradient_penalty` must be 0 if the mean is held or the batch is linear"):
            kf.update(state, x, y, **given)
    with pytest.raises(ValueError, match="`gradient_penalty` must be 0 if the mean is held or the batch is linearized"):
        fit(model, [(x, y)], kf.config, start="trained", progress=False)


def test_it_can_be_chosen_by_the_stream():
    config = KalmanConfig(tune={"gradient_penalty": (0.0, 1.0)}, tune_examples=6)
    posterior = fit(network(), list(stream(2, 8)), config, progress=False)
    assert posterior.config.gradient_penalty in (0.0, 1.0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("covariance", STRUCTURES)
def test_larger_penalties_take_smaller_steps(covariance, form):
    """Where the likelihood is expanded at the mean, the step is (P̃⁻¹ + JᵀVJ)⁻¹ Jᵀe: shorter in P̃'s own metric."""
    model, (x, y) = network(), next(stream(3))
    steps, penalties = [], []
    for rho in (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0):
        config = KalmanConfig(covariance=covariance, rank=27, gradient_penalty=rho, gradient_penalty_form=form, **PLAIN)
        kf = KalmanFilter(model, config)
        _, info = kf.update(kf.init(), x, y)
        steps.append(info.step_norm)
        penalties.append(info.penalty)
    assert all(later < earlier for earlier, later in itertools.pairwise(steps))
    assert steps[-1] < 0.5 * steps[0]
    assert penalties == pytest.approx([rho * penalties[3] for rho in (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)])


def test_a_penalty_too_large_for_the_belief_s_numbers_changes_nothing():
    """ρ‖g‖² beyond the largest float32."""
    kf = KalmanFilter(network().float(), KalmanConfig(gradient_penalty=1e300))
    state, (x, y) = kf.init(), next(stream(3))
    kept = copy.deepcopy(state)
    with pytest.raises(DivergenceError, match="the gradient penalty's precision would not be finite"):
        kf.update(state, x.float(), y)
    assert same(state, kept)
