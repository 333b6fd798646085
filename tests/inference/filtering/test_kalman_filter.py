"""The recursion as a whole: purity, refusals, bad input, prior rules, gate, guard, noise variance."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import chi2
from torch import nn

import bayes_kf as bkf
from bayes_kf.inference import DivergenceError, KalmanConfig, KalmanFilter
from bayes_kf.models import AdapterModel


def classifier(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()


def batch(size=2, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(size, 4, generator=g).double(), torch.randint(3, (size,), generator=g)


def _run(kf, state, batches):
    for inputs, targets in batches:
        state, _ = kf.update(state, inputs, targets)
    return state


def test_update_is_pure_and_leaves_the_model_alone():
    model = classifier().train()
    model[3].eval()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    kf = KalmanFilter(model, KalmanConfig())
    state = kf.init()
    copy = [t.clone() for t in (*state.belief, *state.prior, *state.temperature_scores[1:])]
    first, info = kf.update(state, *batch())
    again, _ = kf.update(state, *batch())
    assert all(
        torch.equal(a, b)
        for a, b in zip((*state.belief, *state.prior, *state.temperature_scores[1:]), copy, strict=True)
    )
    assert torch.equal(first.belief.mean, again.belief.mean)
    assert torch.equal(kf.marginal_variance(first), kf.marginal_variance(again))
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert [m.training for m in model] == [True, True, True, False, True]
    assert (first.step, first.examples, len(info.log_loss)) == (1, 2, 2)


def test_modes_come_back_after_an_exception():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = nn.Linear(4, 3), 0

        def forward(self, x):
            self.calls += 1
            if self.calls > 3:
                raise RuntimeError("broken on purpose")
            return self.inner(x)

    model = Fails().train()
    kf, weights = KalmanFilter(model, KalmanConfig()), model.inner.weight.clone()
    state, batches = kf.init(), [(torch.randn(1, 4), torch.tensor([0]))] * 5
    with pytest.raises(RuntimeError, match="broken on purpose"):
        _run(kf, state, batches)
    assert model.training
    assert model.inner.training
    assert torch.equal(model.inner.weight, weights)
    assert not model.inner._forward_hooks


BAD_BATCHES = [
    (lambda x, y: (x, torch.tensor([0, 3])), r"`targets` must lie in 0\.\.2 for 3 outputs, got 0\.\.3"),
    (lambda x, y: (x, y.double()), r"`targets` must be integer class labels, got dtype torch\.float64"),
    (lambda x, y: (x, y[:1]), r"`targets` must have shape \(2,\), got \(1,\)"),
    (lambda x, y: (x, [0, 1]), r"`targets` must be a tensor, got list"),
    (lambda x, y: (x.fill_(math.nan), y), r"`inputs` must be finite, got 8 NaN or infinite values out of 8"),
    (lambda x, y: ({"input": x.fill_(math.inf)}, y), r"`input` must be finite, got 8 NaN"),
    (lambda x, y: (x[:0], y[:0]), r"`inputs` must hold at least one example, got an empty batch"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_BATCHES)
def test_bad_batches_are_named_before_anything_changes(spoil, message):
    kf = KalmanFilter(classifier(), KalmanConfig(initial_variance=0.1, bound_prior=False))
    state = kf.init()
    with pytest.raises(ValueError, match=message):
        kf.update(state, *spoil(*batch()))
    assert torch.equal(state.belief.mean, kf.adapter.vector())


def test_models_that_do_not_fit():
    with pytest.raises(ValueError, match=r"`model` must have trainable tensors, got none"):
        AdapterModel(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(ValueError, match=r"`model` must be a torch\.nn\.Module, got str"):
        AdapterModel("model")
    kf = KalmanFilter(nn.Conv2d(1, 2, 1), KalmanConfig())
    with pytest.raises(ValueError, match=r"outputs of shape \(batch, outputs\), got \(1, 2, 3, 3\)"):
        kf.update(kf.init(), torch.randn(1, 1, 3, 3), torch.tensor([0]))
    kf = KalmanFilter(nn.Linear(2, 1), KalmanConfig())
    with pytest.raises(ValueError, match="`likelihood` categorical needs at least 2 outputs, got 1"):
        kf.update(kf.init(), torch.randn(1, 2), torch.tensor([0]))


def test_everything_trainable_by_accident_warns_with_its_cost():
    model = nn.utils.skip_init(nn.Linear, 5000, 4200)
    with pytest.warns(UserWarning, match=r"21,004,200 trainable numbers, above 20,000,000: .* 0\.3 GiB"):
        AdapterModel(model)


def test_prior_scale_gives_the_outputs_their_spread():
    kf = KalmanFilter(classifier(), KalmanConfig(initial_logit_sd=3.0, initial_spread="tensors"))
    x, _ = batch(50)
    state = kf.init(x)
    jacobian = kf.linearize(state.belief.mean, x).jacobian().dense()
    added = (jacobian.square() * state.prior.variance).mean((0, 1))
    shares = torch.stack([added[where].sum() for where in kf.adapter.slices().values()])
    torch.testing.assert_close(shares, torch.full_like(shares, 9.0 / len(shares)), rtol=1e-9, atol=0)
    assert state.prior_is_scaled
    modules = KalmanFilter(classifier(), KalmanConfig(initial_logit_sd=3.0)).init(x)
    assert len(modules.prior.variance.unique()) == 3  # two Linears and a batch norm
    added = (jacobian.square() * modules.prior.variance).mean((0, 1))
    gains = {name: float(jacobian[..., where].square().sum(-1).mean()) for name, where in kf.adapter.slices().items()}
    shares = {name: float(added[where].sum()) for name, where in kf.adapter.slices().items()}
    assert sum(shares.values()) == pytest.approx(9.0, rel=1e-9)
    shared, gained = (sum(v for k, v in d.items() if k[0] == "0") / sum(v for k, v in d.items() if k[0] == "4")
                   for d in (shares, gains))  # fmt: skip
    assert shared == pytest.approx(gained**0.5, rel=1e-9)
    constant = KalmanFilter(classifier(), KalmanConfig(initial_logit_sd=3.0, initial_spread="constant")).init(x)
    assert len(constant.prior.variance.unique()) == 1
    assert float((jacobian.square() * constant.prior.variance).sum(-1).mean()) == pytest.approx(9.0, rel=1e-9)
    lazily, _ = kf.update(kf.init(), x, torch.zeros(50).long())
    torch.testing.assert_close(lazily.prior.variance, state.prior.variance, rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("curvature", ["exact", "sampled"])
def test_a_bias_of_the_outputs_has_a_prior_of_its_own(curvature):
    """Also where PEFT wraps it; all other tensors, a hidden bias of as many numbers among them, keep theirs."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    model = get_peft_model(
        base, LoraConfig(r=2, target_modules=["0"], bias="lora_only", modules_to_save=["2"])
    ).double()
    settings = {"initial_logit_sd": 0.3, "curvature": curvature, "curvature_draws": 8}
    x, _ = batch(50)
    plain, own, small = (
        KalmanFilter(model, KalmanConfig(**settings, initial_bias_sd=sd)).init(x) for sd in (None, 2.0, 1e-3)
    )
    adapter = AdapterModel(model)
    biases = [name for name in adapter.names if name.endswith("bias")]
    assert len(biases) == 2
    expected = plain.prior.variance.clone()
    where = next(where for name, where in adapter.slices().items() if name == biases[-1])
    assert "2." in biases[-1]
    expected[where] = 4.0
    assert torch.equal(own.prior.variance, expected)
    assert torch.equal(small.prior.variance, plain.prior.variance)  # at least so wide, never narrower


def test_a_prior_of_the_outputs_bias_finds_how_frequent_classes_are():
    """Features that say nothing, one class in nine of ten: a narrow prior learns that only with a bias of its own."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 5, generator=g).double(), (torch.rand(60, generator=g) < 0.1).long()
    torch.manual_seed(0)
    model = nn.Linear(5, 2).double()
    probs = {}
    for sd in (None, 1.0):
        kf = KalmanFilter(model, KalmanConfig(initial_logit_sd=0.1, initial_bias_sd=sd))
        state = _run(kf, kf.init(x), [(x[i : i + 1], y[i : i + 1]) for i in range(60)])
        probs[sd] = float(kf.adapter.outputs(state.belief.mean, torch.zeros(1, 5).double()).softmax(1)[0, 0])
    rate = float((y == 0).double().mean())
    assert abs(probs[1.0] - rate) < 0.05
    assert abs(probs[None] - rate) > 0.2


def test_prior_variance_rules():
    constant = KalmanFilter(classifier(), KalmanConfig(initial_variance=0.3)).init().prior.variance
    assert torch.equal(constant, torch.full_like(constant, 0.3))
    config = KalmanConfig(initial_variance=0.3, initial_rule="uniform")
    uniform = KalmanFilter(classifier(), config).init().prior.variance
    assert (uniform > 0).all()
    assert (uniform <= 0.3).all()
    assert uniform.std() > 0.05
    assert torch.equal(uniform, KalmanFilter(classifier(), config).init().prior.variance)


def test_forgetting_and_drift_widen_before_the_update():
    kf = KalmanFilter(
        classifier(),
        KalmanConfig(
            covariance="diagonal", initial_variance=0.1, bound_prior=False, forgetting=0.5, drift_variance=0.02
        ),
    )
    blind, y = torch.zeros(1, 4).double(), torch.tensor([0])
    state = kf.init()
    jacobian = kf.linearize(state.belief.mean, blind).jacobian().dense()
    after, _ = kf.update(state, blind, y)
    unseen = (jacobian[0] == 0).all(0)
    assert unseen.any()
    torch.testing.assert_close(after.belief.variance[unseen], torch.full((int(unseen.sum()),), 0.22).double())


def test_gate_inflates_the_noise_of_an_outlier():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    settings = {"likelihood": "gaussian", "covariance": "full", "initial_variance": 0.5}
    x, far = torch.randn(1, 3).double(), torch.full((1, 2), 50.0).double()
    plain, gated = (KalmanFilter(model, KalmanConfig(**settings, gate_quantile=q)) for q in (None, 0.99))
    _, info = plain.update(plain.init(), x, far)
    state, gated_info = gated.update(gated.init(), x, far)
    assert gated_info.innovation == pytest.approx(info.innovation)
    assert gated_info.damping == pytest.approx(chi2.ppf(0.99, 2) / info.innovation)
    manual = KalmanFilter(model, KalmanConfig(**settings, noise_variance=1 / gated_info.damping))
    expected, _ = manual.update(manual.init(), x, far)
    torch.testing.assert_close(state.belief.mean, expected.belief.mean)
    torch.testing.assert_close(state.belief.covariance, expected.belief.covariance)
    _, near = gated.update(gated.init(), x, model(x).detach())
    assert near.damping == 1.0


def test_innovations_of_a_true_linear_model_are_chi_square():
    torch.manual_seed(0)
    total, count = 0.0, 400
    for seed in range(count):
        torch.manual_seed(seed)
        model = nn.Linear(3, 2, bias=False).double()
        kf = KalmanFilter(model, KalmanConfig(likelihood="gaussian", covariance="full", initial_variance=0.5))
        truth = model.weight.detach() + 0.5**0.5 * torch.randn(2, 3).double()
        x = torch.randn(2, 3).double()
        _, info = kf.update(kf.init(), x, x @ truth.T + torch.randn(2, 2).double())
        assert info.degrees_of_freedom == 4
        total += info.innovation
    assert abs(total / count - 4) < 5 * math.sqrt(2 * 4 / count)


def test_estimated_noise_variance_finds_the_truth_per_output():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    truth = torch.tensor([0.25, 4.0]).double()
    kf = KalmanFilter(
        model, KalmanConfig(likelihood="gaussian", covariance="full", noise_variance="estimated", initial_variance=4.0)
    )
    state, weight, count = kf.init(), torch.randn(2, 3).double(), 1500
    for _ in range(count // 5):
        x = torch.randn(5, 3).double()
        state, _ = kf.update(state, x, x @ weight.T + truth.sqrt() * torch.randn(5, 2).double())
    actual = state.noise.variance
    assert (state.noise.information > 0.95 * count).all()
    assert ((actual - truth).abs() < 5 * truth * math.sqrt(2 / count)).all()


def test_guard_damps_a_step_that_overshoots_and_says_so():
    class Exponential(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, x):
            return torch.exp(self.weight) * x

    x, y = torch.ones(1, 1).double(), torch.full((1, 1), 30.0).double()
    steps = {}
    for damping in (True, False):
        kf = KalmanFilter(Exponential(), KalmanConfig(likelihood="gaussian", initial_variance=10.0, damping=damping))
        steps[damping] = kf.update(kf.init(), x, y)
    assert steps[False][1].damping == 1.0
    assert steps[True][1].damping < 1.0
    loss = {k: float((torch.exp(s.belief.mean) - 30).abs()) for k, (s, _) in steps.items()}
    assert loss[True] < 30 < loss[False]


@pytest.mark.parametrize(
    ("weight", "apply", "variance", "noise", "target"),
    [(1.0, torch.log, 100.0, 1e-2, -50.0), (0.0, torch.exp, 1e3, 1e-3, 30.0)],
)
def test_a_batch_toward_which_no_step_is_good_is_not_learned_and_that_is_said(weight, apply, variance, noise, target):
    """Neither to a weight without a logarithm, nor to one whose exponential is far beyond the target."""

    class Curved(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.full((1,), weight, dtype=torch.float64))

        def forward(self, x):
            return apply(self.weight) * x

    config = KalmanConfig(likelihood="gaussian", initial_variance=variance, noise_variance=noise)
    kf = KalmanFilter(Curved(), config)
    state, x = kf.init(), torch.ones(1, 1).double()
    with pytest.warns(UserWarning, match="the update left them out"):
        after, info = kf.update(state, x, torch.full((1, 1), target).double())
    assert info.damping == 0.0
    assert info.step_norm == 0.0
    assert torch.equal(after.belief.mean, state.belief.mean)
    variance = type(state.belief).marginal_variance
    assert torch.equal(variance(after.belief), variance(state.belief))
    assert (after.step, after.examples) == (1, 1)
    near = apply(state.belief.mean) * 1.001
    later, info = kf.update(after, x, near.view(1, 1))  # and the filter goes on
    assert info.damping == 1.0
    assert (variance(later.belief) < variance(after.belief)).all()


def test_a_prior_variance_that_does_not_fit_the_dtype():
    with pytest.raises(
        ValueError, match=r"`initial_variance` must be positive and finite in torch.float32, got 1e\+300"
    ):
        KalmanFilter(nn.Linear(2, 2), KalmanConfig(initial_variance=1e300)).init()


def test_divergence_is_refused_with_its_step_and_cause():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    kf = KalmanFilter(model, KalmanConfig(initial_variance=1e30, bound_prior=False, damping=False, expansion="mean"))
    state = kf.init()
    batches = [(torch.randn(1, 4), torch.randint(3, (1,))) for _ in range(50)]
    with pytest.raises(DivergenceError, match=r"update \d+ refused: .* the state before it is kept") as caught:
        _run(kf, state, batches)
    kept = caught.value.state
    assert caught.value.step == kept.step < 50
    again = _run(kf, state, batches[: kept.step])
    assert torch.equal(again.belief.mean, kept.belief.mean)
    assert torch.isfinite(kept.belief.mean).all()
    assert torch.isfinite(kf.marginal_variance(kept)).all()


@pytest.mark.parametrize("noise", ["exponential_family", "ema_taylor", "ema_residual", "identity", "decaying"])
@pytest.mark.parametrize("covariance", ["diagonal", "diagonal_information", "diagonal_mixed", "low_rank", "full"])
def test_every_combination_runs_in_float32_and_stays_positive(noise, covariance):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    kf = KalmanFilter(model, KalmanConfig(noise=noise, covariance=covariance, initial_variance=0.1, bound_prior=False))
    state = kf.init()
    for _ in range(30):
        state, info = kf.update(state, torch.randn(2, 4), torch.randint(3, (2,)))
    variance = kf.marginal_variance(state)
    assert variance.dtype == torch.float32
    assert (variance > 0).all()
    assert (variance <= 0.1 * (1 + 1e-5)).all()
    assert info.innovation >= 0


@pytest.mark.parametrize("noise_variance", [1e-2, 1e-4])
@pytest.mark.parametrize("covariance", ["diagonal", "diagonal_information", "diagonal_mixed", "low_rank", "full"])
def test_precise_float32_regression_is_not_refused(covariance, noise_variance):
    torch.manual_seed(0)
    model = nn.Linear(5, 1)
    config = KalmanConfig(likelihood="gaussian", covariance=covariance, noise_variance=noise_variance)
    kf, weight = KalmanFilter(model, config), torch.randn(5, 1)
    state = kf.init(torch.randn(32, 5))
    for _ in range(30):
        x = torch.randn(16, 5)
        state, _ = kf.update(state, x, x @ weight + noise_variance**0.5 * torch.randn(16, 1))
    assert (kf.marginal_variance(state) > 0).all()
    assert ((state.belief.mean[:5] - weight[:, 0]).abs() < 30 * noise_variance**0.5).all()


def test_an_outlying_rate_leaves_no_nan_in_the_state():
    torch.manual_seed(0)
    kf = KalmanFilter(nn.Linear(4, 1), KalmanConfig(likelihood="poisson"))
    state = kf.init(torch.randn(32, 4))
    state, _ = kf.update(state, torch.randn(1, 4) * 20, torch.tensor([3.0]))
    assert not torch.isnan(state.temperature_scores.total).any()
    assert kf.temperature(state) > 0


def test_a_step_to_outputs_that_are_not_finite_is_damped():
    class Fragile(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, x):
            return self.weight.log() * x  # not a number below zero

    kf = KalmanFilter(Fragile(), KalmanConfig(likelihood="gaussian", initial_variance=100.0))
    state, info = kf.update(kf.init(), torch.ones(1, 1).double(), torch.full((1, 1), -50.0).double())
    assert info.damping < 1
    assert float(state.belief.mean) > 0


def test_fixed_noise_of_a_gaussian_likelihood_has_its_variance():
    states = {}
    for noise in ("identity", "exponential_family"):
        torch.manual_seed(0)
        config = KalmanConfig(
            likelihood="gaussian", noise=noise, noise_variance=0.01, covariance="full", initial_variance=1.0
        )
        kf = KalmanFilter(nn.Linear(3, 2).double(), config)
        states[noise], _ = kf.update(kf.init(), torch.ones(1, 3).double(), torch.ones(1, 2).double())
    torch.testing.assert_close(states["identity"].belief.covariance, states["exponential_family"].belief.covariance)


@pytest.mark.parametrize("scale", [0.5, 50.0])
def test_a_prior_too_wide_for_the_linearization_is_narrowed_with_a_warning(scale):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    sizes = {name: float(p.detach().square().mean()) for name, p in model.named_parameters()}
    x = torch.randn(32, 4)
    kf = KalmanFilter(model, KalmanConfig(initial_variance=scale))
    with pytest.warns(UserWarning, match=rf"^`initial_variance` {scale:g} lets the logits vary by .* a priori"):
        variance = kf.adapter.unflatten(kf.init(x).prior.variance)
    for name, part in variance.items():
        assert bool((part <= min(scale, 9 * sizes[name]) * (1 + 1e-6)).all())
    as_given = KalmanFilter(model, KalmanConfig(initial_variance=scale, bound_prior=False)).init(x)
    assert bool((as_given.prior.variance == scale).all())


def test_priors_of_linear_models_and_narrow_ones_are_taken_as_they_are():
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    logistic = KalmanFilter(nn.Linear(4, 3), KalmanConfig(initial_variance=1e4))
    assert bool((logistic.init(x).prior.variance == 1e4).all())
    network = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    narrow = KalmanFilter(network, KalmanConfig(initial_variance=1e-3))
    assert bool((narrow.init(x).prior.variance == 1e-3).all())
    regression = KalmanFilter(network, KalmanConfig(likelihood="gaussian", initial_variance=1e4))
    assert bool((regression.init(x).prior.variance == 1e4).all())


@pytest.mark.parametrize("covariance", ["diagonal", "low_rank", "full"])
@pytest.mark.parametrize("first", [0.0, 1e-3, 0.1])
def test_a_lucky_first_prediction_does_not_rule_out_noise(covariance, first):
    torch.manual_seed(0)
    model, weight = nn.Linear(3, 1, bias=False), torch.tensor([[1.0, -2.0, 0.5]])
    x = torch.randn(500, 3)
    y = x @ weight.T + 0.3 * torch.randn(500, 1)
    y[0] = model(x[:1]).detach() + first
    kf = KalmanFilter(model, KalmanConfig(likelihood="gaussian", covariance=covariance, noise_variance="estimated"))
    state = kf.init(x[:32])
    for i in range(500):
        state, _ = kf.update(state, x[i : i + 1], y[i : i + 1])
    assert 0.06 < float(state.noise.variance) < 0.13  # 0.09 is true
    off = (state.belief.mean - weight[0]).abs() / kf.marginal_variance(state).sqrt()
    assert float(off.max()) < 4


def test_a_filter_gives_the_posterior_of_a_state():
    kf = KalmanFilter(nn.Linear(2, 3), KalmanConfig(covariance="diagonal"))
    state = kf.init(torch.randn(4, 2))
    actual, x = kf.posterior(state), torch.randn(5, 2)
    assert isinstance(actual, bkf.Posterior)
    assert torch.equal(actual.mean_vector, state.belief.mean)
    assert torch.equal(actual.predict(x).probs, bkf.Posterior(kf, state).predict(x).probs)
