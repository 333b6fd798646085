"""ArviZ data of a posterior: values computed by hand on every draw, and ArviZ's own functions on them."""

import importlib.metadata

import arviz
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bayes_kf as bkf
from bayes_kf.inference.predictive.arviz_export import draw_targets
from bayes_kf.models.likelihood import Bernoulli, Categorical, Gaussian, Poisson

OLD = int(importlib.metadata.version("arviz").split(".")[0]) < 1
DRAWS = 300
G = torch.Generator().manual_seed(0)
X = torch.randn(60, 3, generator=G).double()
NOISE_SD = 0.7


def problem(likelihood: str, outputs: int) -> tuple[bkf.Posterior, DataLoader]:
    """A linear model fitted on batches of 16, the last one smaller."""
    torch.manual_seed(0)
    model = nn.Linear(3, outputs).double()
    eta = 1.5 * X @ torch.randn(3, outputs, generator=torch.Generator().manual_seed(1)).double()
    generator = torch.Generator().manual_seed(2)
    family = {"gaussian": Gaussian(torch.tensor(NOISE_SD**2)), "categorical": Categorical(), "bernoulli": Bernoulli()}
    targets = draw_targets(family.get(likelihood, Poisson()), 0.5 * eta[None], generator)[0]
    loader = DataLoader(TensorDataset(X, targets), batch_size=16)
    settings = {"likelihood": likelihood, "covariance": "full", "initial_variance": 1.0, "temperature": 1.0}
    if likelihood == "gaussian":
        settings["noise_variance"] = NOISE_SD**2
    return bkf.fit(model, loader, bkf.KalmanConfig(**settings), progress=False), loader


KINDS = [("gaussian", 1), ("gaussian", 2), ("bernoulli", 1), ("bernoulli", 2), ("categorical", 4), ("poisson", 1)]


@pytest.fixture(scope="module", params=KINDS, ids=[f"{kind}-{outputs}" for kind, outputs in KINDS])
def exported(request):
    posterior, loader = problem(*request.param)
    return (*request.param, posterior, loader, posterior.to_arviz(DRAWS, loader=loader))


@pytest.fixture(scope="module")
def regression():
    posterior, loader = problem("gaussian", 1)
    return posterior.to_arviz(DRAWS, loader=loader)


@pytest.fixture
def figures():
    before = plt.get_fignums()
    yield
    for number in set(plt.get_fignums()) - set(before):
        plt.close(number)


def values(data, group: str, name: str = "target") -> np.ndarray:
    return data[group][name].values


def joined(data, group: str, name: str = "target") -> np.ndarray:
    """The draws of all chains, (S, ...)."""
    return np.concatenate(values(data, group, name))


def test_shapes(exported):
    kind, outputs, _, _, data = exported
    last = () if kind == "categorical" or outputs == 1 else (outputs,)
    assert values(data, "observed_data").shape == (60, *last)
    assert values(data, "posterior_predictive").shape == (2, DRAWS // 2, 60, *last)
    assert values(data, "log_likelihood").shape == (2, DRAWS // 2, 60)
    assert values(data, "posterior", "weight").shape == (2, DRAWS // 2, outputs, 3)


def test_log_likelihood_is_that_of_every_draw(exported):
    """Each density written out in NumPy from the draws in the posterior group."""
    kind, _, _, _, data = exported
    weight, bias = (joined(data, "posterior", name) for name in ("weight", "bias"))
    eta = np.einsum("nd,smd->snm", X.numpy(), weight) + bias[:, None]  # (S, N, m)
    y = values(data, "observed_data").reshape(60, -1)
    if kind == "gaussian":
        each = -0.5 * np.log(2 * np.pi * NOISE_SD**2) - (y - eta) ** 2 / (2 * NOISE_SD**2)
    elif kind == "bernoulli":
        each = np.where(y == 1, -np.log1p(np.exp(-eta)), -np.log1p(np.exp(eta)))
    elif kind == "poisson":
        each = y * eta - np.exp(eta) - np.array([np.log(np.arange(1, int(k) + 1)).sum() for k in y[:, 0]])[:, None]
    else:
        each = np.take_along_axis(eta, y.astype(int)[None], 2) - np.log(np.exp(eta).sum(2, keepdims=True))
    np.testing.assert_allclose(joined(data, "log_likelihood"), each.sum(2), rtol=0, atol=1e-9)


def test_observed_data_are_the_targets_in_order(exported):
    *_, loader, data = exported
    targets = torch.cat([targets for _, targets in loader]).numpy()
    assert np.array_equal(values(data, "observed_data").ravel(), targets.ravel())


def test_posterior_group_is_the_same_with_and_without_a_loader(exported):
    *_, posterior, _, data = exported
    alone = posterior.to_arviz(DRAWS)
    for name in posterior.mean:
        assert np.array_equal(values(alone, "posterior", name), values(data, "posterior", name))


def test_draws_have_the_mean_and_variance_of_the_belief(exported):
    """Within five standard errors, of a mean and of a variance of 300 normal draws."""
    *_, posterior, _, data = exported
    for name, mean in posterior.mean.items():
        draws, variance = joined(data, "posterior", name), posterior.variance[name].numpy()
        assert (np.abs(draws.mean(0) - mean.numpy()) < 5 * np.sqrt(variance / DRAWS)).all()
        assert (np.abs(draws.var(0) / variance - 1) < 5 * np.sqrt(2 / DRAWS)).all()


def test_predictive_draws_come_from_every_draws_likelihood(exported):
    """Their sum over draws and examples lies within five standard errors of the sum of the means."""
    kind, outputs, _, _, data = exported
    drawn = values(data, "posterior_predictive").reshape(DRAWS, 60, -1)
    weight, bias = (torch.as_tensor(joined(data, "posterior", name)) for name in ("weight", "bias"))
    eta = torch.einsum("nd,smd->snm", X, weight) + bias[:, None]
    if kind == "categorical":
        drawn = drawn == np.arange(outputs)  # each class by itself
        mean = eta.softmax(-1)
        variance = mean * (1 - mean)
    elif kind == "bernoulli":
        mean = eta.sigmoid()
        variance = mean * (1 - mean)
    elif kind == "poisson":
        mean = variance = eta.exp()
    else:
        mean, variance = eta, torch.full_like(eta, NOISE_SD**2)
    apart = drawn.sum((0, 1)) - mean.sum((0, 1)).numpy()
    assert (np.abs(apart) < 5 * variance.sum((0, 1)).sqrt().numpy()).all()
    squares = ((drawn - mean.numpy()) ** 2).mean()
    assert squares == pytest.approx(variance.mean().item(), rel=0.05)


def test_arviz_loo_agrees_with_exact_leave_one_out(regression):
    """The posterior without example i is exact here: PSIS-LOO estimates its predictive density."""
    actual = arviz.loo(regression, pointwise=True)
    assert (actual.pareto_k.values < 0.7).all()
    each = (actual.loo_i if OLD else actual.elpd_i).values
    posterior, loader = problem("gaussian", 1)
    targets = torch.cat([targets for _, targets in loader])
    for left_out in (0, 17, 59):
        kept = torch.arange(60) != left_out
        torch.manual_seed(0)
        model = nn.Linear(3, 1).double()
        one = bkf.fit(
            model, DataLoader(TensorDataset(X[kept], targets[kept]), batch_size=16), posterior.config, progress=False
        )
        exact = one.predict(X[~kept], targets=targets[~kept]).log_prob.item()
        assert each[left_out] == pytest.approx(exact, abs=0.05)


@pytest.mark.filterwarnings("ignore::matplotlib.MatplotlibDeprecationWarning")  # ArviZ 0.23 with matplotlib 3.11
def test_arviz_plots(regression, figures):
    trace, forest = (
        arviz.plot_trace(regression, var_names=["bias"]),
        arviz.plot_forest(regression, var_names=["weight"]),
    )
    if not OLD:
        arviz.plot_loo_pit(regression)
        arviz.plot_ppc_pit(regression)
        return
    assert trace.shape == (1, 2)
    assert len(forest) == 1
    ax = arviz.plot_loo_pit(regression, y="target", ecdf=True)
    assert len(ax.get_lines()) > 0
    pit = arviz.loo_pit(regression, y="target")
    assert pit.shape == (60,)
    assert ((pit >= 0) & (pit <= 1)).all()
    arviz.plot_ppc(regression, num_pp_samples=20, random_seed=0)
    arviz.plot_bpv(regression)


@pytest.mark.filterwarnings("ignore::matplotlib.MatplotlibDeprecationWarning")
def test_summary_loo_and_plot_of_classes(figures):
    posterior, loader = problem("categorical", 4)
    data = posterior.to_arviz(1000, loader=loader)  # with 300 one example's Pareto shape cannot be told
    assert len(arviz.summary(data, var_names=["weight"], kind="stats")) == 12
    actual = arviz.loo(data)
    assert np.isfinite(actual.elpd_loo if OLD else actual.elpd)
    if OLD:
        arviz.plot_ppc(data, num_pp_samples=20, random_seed=0)


def test_the_same_generator_gives_the_same_data():
    posterior, loader = problem("gaussian", 1)
    first, second = (posterior.to_arviz(20, torch.Generator().manual_seed(4), loader) for _ in range(2))
    other = posterior.to_arviz(20, torch.Generator().manual_seed(5), loader)
    assert np.array_equal(values(first, "posterior_predictive"), values(second, "posterior_predictive"))
    assert not np.array_equal(values(first, "posterior_predictive"), values(other, "posterior_predictive"))


def test_draws_of_a_nonlinear_model_are_compared_with_the_linearized_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    data = DataLoader(TensorDataset(X[:30], X[:30].argmax(1)), batch_size=4)
    config = bkf.KalmanConfig(initial_variance=1.0, bound_prior=False, temperature=1.0)
    posterior = bkf.fit(model, data, config, progress=False)
    with pytest.warns(UserWarning, match=r"`method` 'sampled' and 'linearized' disagree: 0\.\d+") as caught:
        posterior.to_arviz(64, loader=DataLoader(TensorDataset(X[:30], X[:30].argmax(1)), batch_size=30))
    assert caught[0].filename == __file__  # the line that called
    assert len(caught) == 1


def test_bad_loaders_are_refused():
    posterior, _ = problem("gaussian", 1)
    with pytest.raises(ValueError, match=r"^`loader` must yield at least one batch, got none\.$"):
        posterior.to_arviz(5, loader=[])
    with pytest.raises(
        ValueError, match=r"^`loader` must yield tensors of targets with every batch, got none in batch 0\.$"
    ):
        posterior.to_arviz(5, loader=[X])
    with pytest.raises(
        ValueError, match=r"^`loader` must yield tensors of targets with every batch, got list in batch 0\.$"
    ):
        posterior.to_arviz(5, loader=[(X, [0.0] * 60)])
    with pytest.raises(ValueError, match=r"^`targets` must have shape \(60, 1\), got \(3,\)\.$"):
        posterior.to_arviz(5, loader=[(X, torch.zeros(3))])


def test_counts_at_rates_above_the_range_of_torch():
    outputs = torch.tensor([[[2.0], [20.0], [60.0]]]).expand(2000, -1, -1)
    drawn = draw_targets(Poisson(), outputs, torch.Generator().manual_seed(0))[..., 0].double()
    rate = outputs[0, :, 0].double().exp()
    assert (drawn >= 0).all()
    assert ((drawn.mean(0) - rate).abs() < 5 * (rate / 2000).sqrt() + 1e-6 * rate).all()


def test_summaries_have_an_r_hat_and_no_warning():
    """Independent draws: R̂ is 1 to its error; warnings are errors in these tests."""
    posterior, _ = problem("gaussian", 2)
    summary = arviz.summary(posterior.to_arviz(1000), round_to="none")
    assert np.isfinite(summary["r_hat"].astype(float)).all()
    assert (summary["r_hat"].astype(float) < 1.02).all()
    odd = posterior.to_arviz(999)
    assert values(odd, "posterior", "weight").shape[:2] == (3, 333)
