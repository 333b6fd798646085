"""Beliefs against Bayesian linear regression in closed form, their projections, and one contract for all structures."""

import pytest
import torch
from oracles import linear_posterior
from torch import nn

from bayes_kf.inference import KalmanConfig, KalmanFilter
from bayes_kf.inference.covariance.block_diagonal import BlockDiagonalGaussian, block_sizes
from bayes_kf.inference.covariance.diagonal import (
    DiagonalGaussian,
    DiagonalInformationGaussian,
    DiagonalMixedGaussian,
)
from bayes_kf.inference.covariance.full import FullGaussian
from bayes_kf.inference.covariance.low_rank import LowRankGaussian
from bayes_kf.inference.covariance.observation import Observation
from bayes_kf.inference.covariance.structure import STRUCTURES
from bayes_kf.inference.linearization.jacobian import Jacobian
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.zoo import lora_digits_vit

N, NOISE = 5, 0.3


def observation(k=3, n=N, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Observation.from_rows(torch.randn(k, n, generator=g).double(), torch.randn(k, generator=g).double())


def prior(n=N, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=g).double(), 0.2 + torch.rand(n, generator=g).double()


def exact(mean, variance, obs):
    """Mean and covariance after an observation, from precisions."""
    covariance = torch.linalg.inv(torch.diag(1 / variance) + obs.dense().T @ obs.dense())
    return mean + covariance @ obs.dense().T @ obs.residual, covariance


def regression(batches, covariance="full", seed=0, **config):
    """A linear model filtered over 24 examples in the given batch sizes; data, prior and final state."""
    torch.manual_seed(seed)
    model = nn.Linear(N, 1, bias=False).double()
    x, y = torch.randn(24, N).double(), torch.randn(24, 1).double()
    setting = KalmanConfig(
        likelihood="gaussian", covariance=covariance, noise_variance=NOISE, initial_variance=0.7, **config
    )
    kf = KalmanFilter(model, setting)
    state, start = kf.init(), 0
    for size in batches:
        state, _ = kf.update(state, x[start : start + size], y[start : start + size])
        start += size
    return kf, state, x[:start], y[:start, 0]


@pytest.mark.parametrize("batches", [[24], [1] * 24, [5, 1, 8, 10], [12, 12]])
@pytest.mark.parametrize("structure", ["full", "low_rank"])
def test_full_filter_is_bayesian_linear_regression(batches, structure):
    _, state, x, y = regression(batches, structure, rank=N)
    mean, covariance = linear_posterior(x, y, state.prior.mean, torch.diag(state.prior.variance), NOISE)
    torch.testing.assert_close(state.belief.mean, mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state.belief.covariance_matrix(), covariance, rtol=1e-9, atol=1e-9)


def test_order_of_batches_does_not_matter_to_the_full_filter():
    torch.manual_seed(0)
    model = nn.Linear(N, 2).double()
    x, y = torch.randn(10, N).double(), torch.randn(10, 2).double()
    kf = KalmanFilter(model, KalmanConfig(likelihood="gaussian", covariance="full", initial_variance=2.0))
    states = []
    for order in (torch.arange(10), torch.arange(9, -1, -1)):
        state = kf.init()
        for i in order:
            state, _ = kf.update(state, x[i : i + 1], y[i : i + 1])
        states.append(state.belief)
    torch.testing.assert_close(states[0].mean, states[1].mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(states[0].covariance, states[1].covariance, rtol=1e-9, atol=1e-9)


def test_gain_and_information_order_agree_for_the_full_posterior():
    mean, variance = prior()
    obs = observation()
    after = FullGaussian.from_variance(mean, variance).condition(obs)
    expected_mean, expected = exact(mean, variance, obs)
    torch.testing.assert_close(after.mean, expected_mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(after.covariance, expected, rtol=1e-9, atol=1e-9)


def test_gain_form_keeps_the_exact_marginal_variances_and_mean():
    mean, variance = prior()
    obs = observation()
    after = DiagonalGaussian(mean, variance).condition(obs)
    expected_mean, covariance = exact(mean, variance, obs)
    torch.testing.assert_close(after.mean, expected_mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(after.variance, covariance.diagonal(), rtol=1e-10, atol=1e-10)


def test_information_form_keeps_the_exact_marginal_precisions():
    mean, variance = prior()
    obs = observation()
    after = DiagonalInformationGaussian(mean, variance).condition(obs)
    _, covariance = exact(mean, variance, obs)
    precision = torch.linalg.inv(covariance).diagonal()
    torch.testing.assert_close(1 / after.variance, precision, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        after.mean, mean + after.variance * (obs.dense().T @ obs.residual), rtol=1e-10, atol=1e-10
    )


def test_mixed_form_is_gain_mean_and_information_variance():
    mean, variance = prior()
    obs = observation()
    after = DiagonalMixedGaussian(mean, variance).condition(obs)
    assert torch.equal(after.mean, DiagonalGaussian(mean, variance).condition(obs).mean)
    information = DiagonalInformationGaussian(mean, variance).condition(obs)
    torch.testing.assert_close(after.variance, information.variance, rtol=1e-12, atol=0)


def test_diagonal_forms_coincide_with_one_parameter():
    mean, variance = prior(1)
    obs = observation(4, 1)
    expected_mean, covariance = exact(mean, variance, obs)
    for name in ("diagonal", "diagonal_information", "diagonal_mixed"):
        after = STRUCTURES[name].from_variance(mean, variance).condition(obs)
        torch.testing.assert_close(after.mean, expected_mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(after.variance, covariance.diagonal(), rtol=1e-10, atol=1e-10)


def test_low_rank_truncation_keeps_marginal_variances_and_leading_directions():
    """Each diagonal entry is the one that, alone, gives its parameter the exact marginal variance after the cut."""
    mean, variance = prior(8)
    obs = observation(6, 8)
    after = LowRankGaussian.from_variance(mean, variance, rank=2).condition(obs)
    expected_mean, covariance = exact(mean, variance, obs)
    torch.testing.assert_close(after.mean, expected_mean, rtol=1e-10, atol=1e-10)  # the mean comes before the cut
    kept_only = torch.diag(1.0 / variance) + after.factor @ after.factor.T
    for index in range(8):
        precision = kept_only.clone()
        precision[index, index] += after.diagonal[index] - 1.0 / variance[index]
        torch.testing.assert_close(
            torch.linalg.inv(precision)[index, index], covariance[index, index], rtol=1e-10, atol=1e-10
        )
    scaled = obs.dense().T * variance.sqrt().unsqueeze(-1)  # eigenvalues in units of the prior
    kept = torch.linalg.eigvalsh(
        (after.factor * variance.sqrt().unsqueeze(-1)).T @ (after.factor * variance.sqrt().unsqueeze(-1))
    )
    torch.testing.assert_close(kept, torch.linalg.eigvalsh(scaled.T @ scaled)[-2:], rtol=1e-9, atol=1e-9)


def test_low_rank_is_calibrated_with_more_parameters_than_data():
    """Directions beyond the rank must not make the belief sure of what no datum has told: errors fit their sds."""
    squares, full_squares = [], []
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        x, inputs = torch.randn(60, 200, generator=g).double(), torch.randn(300, 200, generator=g).double()
        weight = torch.randn(1, 200, generator=g).double() / 200**0.5
        y = x @ weight.T + 0.1 * torch.randn(60, 1, generator=g).double()
        model = nn.Linear(200, 1, bias=False).double()
        nn.init.zeros_(model.weight)
        actual = {}
        for covariance in ("low_rank", "full"):
            setting = {"covariance": covariance, "noise_variance": 0.01, "initial_variance": 1 / 200, "rank": 20}
            kf = KalmanFilter(model, KalmanConfig(likelihood="gaussian", **setting))
            state = kf.init()
            for some in torch.arange(60).split(2):
                state, _ = kf.update(state, x[some], y[some])
            spread = state.belief.output_covariance(Jacobian.from_rows(inputs.unsqueeze(1)))
            actual[covariance] = (inputs @ (state.belief.mean - weight[0])).square() / spread.flatten()
        squares.append(actual["low_rank"].mean())
        full_squares.append(actual["full"].mean())
    assert float(torch.stack(full_squares).mean().sqrt()) == pytest.approx(1.0, abs=0.15)  # exact Bayes
    assert float(torch.stack(squares).mean().sqrt()) == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("noise", [1.0, 1e-2, 1e-4, 1e-6, 1e-8])
def test_low_rank_in_float32_is_exact_however_small_the_noise(noise):
    """Against dense float64; every row comes twice, so that half of the updates are about what is known already."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(30, 60, generator=g), torch.randn(1, 60, generator=g)
    y = (x.double() @ weight.double().T + noise**0.5 * torch.randn(30, 1, generator=g).double()).float()
    x, y, unseen = torch.cat([x, x]), torch.cat([y, y]), torch.randn(5, 60, generator=g)
    model = nn.Linear(60, 1, bias=False)
    nn.init.zeros_(model.weight)
    kf = KalmanFilter(
        model, KalmanConfig(likelihood="gaussian", noise_variance=noise, initial_variance=1.0, rank=40, temperature=1.0)
    )
    state = kf.init()
    for some in torch.arange(60).split(10):
        state, _ = kf.update(state, x[some], y[some])
    eye = torch.eye(60).double()
    mean, covariance = linear_posterior(x.double(), y[:, 0].double(), torch.zeros(60).double(), eye, noise)
    belief, rounding = state.belief, max(1e-6, 1e-12 / noise)  # W is stored in float32: (2^-24)² |x|²/σ², 60 columns
    assert float((belief.mean - mean).norm() / mean.norm()) < rounding
    variance = belief.marginal_variance().double()
    torch.testing.assert_close(variance, covariance.diagonal(), rtol=rounding, atol=0.0)
    for rows, tolerance in ((unseen, rounding), (x, 4.0 * rounding)):
        actual = belief.output_covariance(Jacobian.from_rows(rows.unsqueeze(1))).flatten()
        expected = ((rows.double() @ covariance) * rows.double()).sum(1)
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=0.0)
    draws = belief.root()(torch.eye(60)).double()
    assert float((draws.mT @ draws - covariance).norm() / covariance.norm()) < rounding


@pytest.mark.parametrize("name", STRUCTURES)
class TestContract:
    """What every covariance structure must do."""

    def belief(self, name):
        return STRUCTURES[name].from_variance(*prior(), rank=2, block_sizes=[2, N - 2]).condition(observation())

    def test_functions_agree_with_the_dense_covariance(self, name):
        belief = self.belief(name)
        covariance = belief.covariance_matrix()
        jacobian = observation(6, N, seed=5).dense().view(2, 3, N)
        vector = observation(1, N, seed=6).dense()[0]
        torch.testing.assert_close(belief.marginal_variance(), covariance.diagonal(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(
            belief.output_covariance(Jacobian.from_rows(jacobian)),
            jacobian @ covariance @ jacobian.mT,
            rtol=1e-10,
            atol=1e-12,
        )
        rows = jacobian.flatten(0, 1)  # of both examples, which share parameters
        torch.testing.assert_close(
            belief.joint_output_covariance(Jacobian.from_rows(jacobian)),
            rows @ covariance @ rows.T,
            rtol=1e-10,
            atol=1e-12,
        )
        torch.testing.assert_close(
            belief.quadratic(vector), vector @ torch.linalg.inv(covariance) @ vector, rtol=1e-9, atol=1e-9
        )
        torch.testing.assert_close(belief.log_determinant(), torch.logdet(covariance), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(belief.product(vector), covariance @ vector, rtol=1e-10, atol=1e-12)
        single = type(belief)(*(part.float() if part.is_floating_point() else part for part in belief))
        assert single.quadratic(vector.float()).dtype == torch.float32
        assert single.log_determinant().dtype == torch.float64  # a sum over all parameters
        added = torch.linspace(-0.05, 2.0, N).double()
        more = belief.add_precision(added).covariance_matrix()
        expected = torch.linalg.inv(torch.linalg.inv(covariance) + torch.diag(added))
        torch.testing.assert_close(more, expected, rtol=1e-9, atol=1e-11)

    def test_conditioning_lowers_every_variance_and_leaves_its_input(self, name):
        mean, variance = prior()
        before = STRUCTURES[name].from_variance(mean, variance)
        copies = [t.clone() for t in before]
        after = before.condition(observation())
        assert all(torch.equal(a, b) for a, b in zip(before, copies, strict=True))
        assert (after.marginal_variance() < variance).all()
        assert (after.marginal_variance() > 0).all()

    def test_accumulated_precision_does_not_depend_on_the_prior(self, name):
        mean, variance = prior()
        obs = observation()
        before = STRUCTURES[name].from_variance(mean, variance, rank=2, block_sizes=[2, N - 2])
        after = before.accumulate(obs)
        prec = torch.linalg.inv(after.covariance_matrix()).diagonal()
        torch.testing.assert_close(prec, 1 / variance + obs.dense().square().sum(0), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(after.mean, before.condition(obs).mean, rtol=1e-10, atol=1e-12)
        held = after.with_mean(mean)
        assert torch.equal(held.mean, mean)
        assert torch.equal(held.covariance_matrix(), after.covariance_matrix())

    def test_samples_have_the_belief_s_moments(self, name):
        belief = self.belief(name)
        count = 40_000
        noise = torch.randn(count, N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        draws = belief.mean + belief.root()(noise)
        covariance = belief.covariance_matrix()
        standard_error = (covariance.diagonal() / count).sqrt()
        assert ((draws.mean(0) - belief.mean).abs() < 5 * standard_error).all()
        centred = draws - belief.mean
        error = (covariance**2 + torch.outer(covariance.diagonal(), covariance.diagonal())).div(count).sqrt()
        assert ((centred.T @ centred / count - covariance).abs() < 5 * error).all()

    def test_prediction_step(self, name):
        belief = self.belief(name)
        assert all(torch.equal(a, b) for a, b in zip(belief.predict(1.0, 0.0), belief, strict=True))
        wider = belief.predict(0.5, 0.0)
        torch.testing.assert_close(wider.covariance_matrix(), 2 * belief.covariance_matrix(), rtol=1e-10, atol=1e-12)
        for added in (0.1, torch.linspace(0.0, 2.0, N).double()):
            drifted = belief.predict(0.8, added).covariance_matrix()
            expected = belief.covariance_matrix() / 0.8 + added * torch.eye(N).double()
            torch.testing.assert_close(drifted, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("d", "precision", "drift"), [(1.0, 1e6, 1e-8), (0.01, 1e4, 1e-6), (0.1, 1e4, 1e-6)])
def test_slow_drift_of_a_sharp_direction_is_not_rounded_away(d, precision, drift):
    """Variance 1/precision along one direction grows by the drift, also in float32."""
    direction = torch.full((4, 1), 0.5)
    belief = LowRankGaussian.from_precision(torch.zeros(4), torch.full((4,), d), direction * (precision - d) ** 0.5)
    for _ in range(100):
        belief = belief.predict(1.0, drift)
    along = 1 / (belief.diagonal[0].double() + belief.factor.double().square().sum())  # W lies along it, d is constant
    assert float(along) == pytest.approx(1 / precision + 100 * drift, rel=1e-4)


def test_blocks_keep_their_part_of_the_exact_posterior():
    mean, variance = prior()
    obs = observation()
    after = BlockDiagonalGaussian.from_variance(mean, variance, block_sizes=[2, N - 2]).condition(obs)
    expected_mean, expected = exact(mean, variance, obs)
    torch.testing.assert_close(after.mean, expected_mean, rtol=1e-10, atol=1e-10)
    expected[:2, 2:] = expected[2:, :2] = 0.0
    torch.testing.assert_close(after.covariance_matrix(), expected, rtol=1e-10, atol=1e-10)


def test_blocks_that_no_observation_joins_stay_exact():
    """Two regressions side by side: outputs share no parameter, so nothing is lost between the blocks."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(3, 1, bias=False), nn.Linear(2, 1, bias=False)]).double()
    model.forward = lambda x: torch.cat([model[0](x[:, :3]), model[1](x[:, 3:])], 1)
    x, y = torch.randn(30, 5).double(), torch.randn(30, 2).double()
    setting = {"likelihood": "gaussian", "noise_variance": NOISE, "initial_variance": 0.7}
    actual = {}
    for covariance in ("full", "block_diagonal"):
        kf = KalmanFilter(model, KalmanConfig(covariance=covariance, **setting))
        state = kf.init()
        for start in range(0, 30, 7):
            state, _ = kf.update(state, x[start : start + 7], y[start : start + 7])
        actual[covariance] = (state.belief.mean, state.belief.covariance_matrix())
    torch.testing.assert_close(actual["block_diagonal"], actual["full"], rtol=1e-9, atol=1e-10)


def test_blocks_are_tensors_or_adapted_layers():
    model = lora_digits_vit(rank=2)
    adapter = AdapterModel(model)
    modules = block_sizes(adapter, "modules")
    assert block_sizes(adapter, "tensors") == list(adapter.sizes)
    assert sum(modules) == adapter.num_parameters
    layers = {n.partition(".lora_")[0] if ".lora_" in n else n.rpartition(".")[0] for n in adapter.names}
    assert len(modules) == len(layers) < len(adapter.sizes)


def test_blocks_are_refused_above_their_size():
    with pytest.raises(ValueError, match=r"at most 400,000,000 numbers in all blocks, got 900,000,000 \(largest block"):
        BlockDiagonalGaussian.from_variance(torch.zeros(30_000), torch.ones(30_000), block_sizes=[30_000])


def test_pull_to_the_prior_leaves_the_prior_as_it_is_and_forgets_all_else():
    torch.manual_seed(0)
    model = nn.Linear(N, 1, bias=False).double()
    x, y = torch.randn(8, N).double(), torch.randn(8, 1).double()
    for covariance in STRUCTURES:
        config = KalmanConfig(likelihood="gaussian", covariance=covariance, initial_variance=0.7, prior_pull=0.3)
        kf = KalmanFilter(model, config)
        start = kf.init()
        matrix = config.structure.covariance_matrix
        torch.testing.assert_close(matrix(kf._predict(start).belief), matrix(start.belief), rtol=1e-12, atol=1e-12)
        state, _ = kf.update(start, x, y)
        moved = kf._predict(state).belief
        torch.testing.assert_close(moved.mean, 0.7 * state.belief.mean + 0.3 * start.belief.mean)
        expected = 0.49 * matrix(state.belief) + 0.51 * matrix(start.belief)
        torch.testing.assert_close(matrix(moved), expected, rtol=1e-9, atol=1e-12)
        for _ in range(60):
            state = kf._predict(state)
        torch.testing.assert_close(state.belief.mean, start.belief.mean, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(matrix(state.belief), matrix(start.belief), rtol=1e-7, atol=1e-7)


def test_full_covariance_is_refused_above_its_size():
    with pytest.raises(ValueError, match=r"`covariance` 'full' takes at most 20,000 parameters, got 30,000\."):
        FullGaussian.from_variance(torch.zeros(30_000), torch.ones(30_000))
