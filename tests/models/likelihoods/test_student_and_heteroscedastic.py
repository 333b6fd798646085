"""Student-t and heteroscedastic Gaussian targets: score, Fisher information, draws, against autograd and SciPy."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from torch.autograd.functional import jacobian

from bayes_kf.models.likelihood import LIKELIHOODS, NUMERIC, HeteroscedasticGaussian, StudentT

G = torch.Generator().manual_seed(0)
VARIANCE, DOF = torch.tensor([0.3, 2.0]).double(), 3.5
FAMILIES = {"student_t": StudentT(VARIANCE, DOF), "heteroscedastic_gaussian": HeteroscedasticGaussian()}
OUTPUTS = {
    "student_t": torch.randn(5, 2, generator=G).double(),
    "heteroscedastic_gaussian": 0.7 * torch.randn(5, 4, generator=G).double(),
}
TARGETS = torch.tensor([[0.2, -1.0], [3.0, 40.0], [-5.0, 0.1], [0.0, 0.0], [1.0, 1e4]]).double()


def scipy_distribution(name, outputs):
    """SciPy's distributions of two targets, written out."""
    outputs = outputs.numpy()
    if name == "student_t":
        return scipy.stats.t(DOF, outputs, VARIANCE.sqrt().numpy())
    return scipy.stats.norm(outputs[..., :2], np.exp(0.5 * outputs[..., 2:]))


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


def test_density_and_distribution_function_are_scipy_s(name):
    family, outputs = FAMILIES[name], OUTPUTS[name]
    expected = scipy_distribution(name, outputs)
    log_prob = torch.as_tensor(expected.logpdf(TARGETS.numpy()).sum(-1))
    torch.testing.assert_close(family.log_prob(outputs, TARGETS), log_prob, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(family.cdf(outputs, TARGETS), torch.as_tensor(expected.cdf(TARGETS.numpy())))
    torch.testing.assert_close(family.target_variance(outputs), torch.as_tensor(expected.var()))
    torch.testing.assert_close(family.mean(outputs), torch.as_tensor(expected.mean()))
    torch.testing.assert_close(family.distribution(outputs).log_prob(TARGETS), log_prob, rtol=1e-12, atol=1e-12)


def test_whitening_gives_the_score(name):
    family, outputs = FAMILIES[name], OUTPUTS[name]
    pairs = [family.whiten(outputs, TARGETS)]
    if name == "heteroscedastic_gaussian":
        pairs.append(family.newton_factor(outputs, TARGETS))
    for factor, residual in pairs:
        for b in range(len(outputs)):
            one = TARGETS[b : b + 1]
            gradient = jacobian(lambda eta: family.log_prob(eta[None], one)[0], outputs[b])  # noqa: B023
            torch.testing.assert_close(family.residual(outputs, TARGETS)[b], gradient, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(factor[b].T @ residual[b], gradient, rtol=1e-12, atol=1e-12)


def test_whitening_gives_the_fisher_information_which_is_the_mean_square_of_the_score(name):
    """By quadrature over the target of each output, and the scores of different targets are independent."""
    family, outputs = FAMILIES[name], OUTPUTS[name][:1]
    factor, _ = family.whiten(outputs, TARGETS[:1])
    fisher = factor[0].T @ factor[0]
    frozen, width = scipy_distribution(name, outputs[0]), len(outputs[0]) // 2
    for target in range(2):
        scale = float(frozen.std()[target])

        def squares(y, target=target):
            row = torch.zeros(1, 2).double()
            row[0, target] = y
            score = family.residual(outputs, row)[0, target::2]
            return torch.outer(score, score)

        for i in range(width):
            for j in range(width):
                expected, _ = scipy.integrate.quad(
                    lambda y: float(squares(y)[i, j]) * frozen.pdf(y)[target],  # noqa: B023
                    *(float(frozen.mean()[target]) + scale * np.array([-400.0, 400.0])),
                    points=[float(frozen.mean()[target])],
                    limit=400,
                )
                actual = float(fisher[target::2, target::2][i, j])
                assert actual == pytest.approx(expected, rel=2e-5, abs=1e-6)


@pytest.mark.parametrize(("target", "variance"), [(0.3, 0.5), (4.0, 2.0), (30.0, 0.1), (1.0, 0.0)])
def test_the_evidence_s_derivatives_are_autograd_s(target, variance):
    family = StudentT(torch.tensor(0.3).double(), DOF)

    def evidence(f):
        c, y = torch.tensor([[variance]]).double(), torch.tensor([[target]]).double()
        return family.normal_mixture(f.view(1, 1, 1), c.view(1, 1, 1, 1), 9.0).log_density(y).sum()

    f = torch.tensor(0.2).double()
    actual = family.evidence_derivatives(f, torch.tensor(variance).double(), torch.tensor(target).double())
    torch.testing.assert_close(actual[0], jacobian(evidence, f), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(actual[1], -torch.autograd.functional.hessian(evidence, f), rtol=1e-8, atol=1e-9)


def test_the_scale_of_each_output():
    family = StudentT(VARIANCE, DOF)
    assert [float(family.of_output(k).noise_variance) for k in (0, 1)] == VARIANCE.tolist()
    assert float(StudentT(torch.tensor([0.5])).of_output(3).noise_variance) == 0.5


def test_draws_follow_the_distribution(name):
    family, outputs = FAMILIES[name], OUTPUTS[name][:1]
    drawn = family.sample(outputs.expand(4000, -1), torch.Generator().manual_seed(3))
    frozen = scipy_distribution(name, outputs)
    for target in range(2):
        values = frozen.cdf(drawn.numpy())[:, target]
        assert scipy.stats.kstest(values, "uniform").pvalue > 1e-3


def test_the_student_t_divergence_is_that_of_the_predictions_for_small_changes():
    family, one = StudentT(torch.tensor(0.5).double(), 5.0), torch.zeros(1, 1).double()
    for change in (0.02, 0.1):
        p, q = scipy.stats.t(5.0, 0.0, 0.5**0.5), scipy.stats.t(5.0, change, 0.5**0.5)
        expected, _ = scipy.integrate.quad(
            lambda y: (p.pdf(y) - q.pdf(y)) * (p.logpdf(y) - q.logpdf(y)),  # noqa: B023
            -80,
            80,
            points=[0.0],
            limit=400,
        )
        actual = float(family.divergence(one, one + change))
        assert actual == pytest.approx(expected, rel=0.02)


def test_a_mixture_of_predictions_has_its_mean_and_variance():
    weights = torch.tensor([0.2, 0.5, 0.3]).double()
    outputs = torch.randn(3, 4, 2, generator=G).double()
    mixed = HeteroscedasticGaussian().mixture(outputs, weights.log())
    mean = (weights[:, None] * outputs[..., 0]).sum(0)
    second = (weights[:, None] * (outputs[..., 1].exp() + outputs[..., 0].square())).sum(0)
    torch.testing.assert_close(mixed[:, 0], mean)
    torch.testing.assert_close(mixed[:, 1].exp(), second - mean.square())
    torch.testing.assert_close(StudentT().mixture(outputs, weights.log())[:, 0], mean)


@pytest.mark.parametrize("reach", [9.0, 38.0])
def test_normal_mixtures_are_the_convolution_with_the_outputs(name, reach):
    """Density and distribution function under η ~ N(f, C), against adaptive quadrature over η."""
    family = StudentT(torch.tensor(0.3).double(), DOF) if name == "student_t" else HeteroscedasticGaussian()
    if name == "student_t":
        f, C = torch.tensor([[0.4]]).double(), torch.tensor([[[0.5]]]).double()
    else:
        f, C = torch.tensor([[0.4, -0.5]]).double(), torch.tensor([[[0.5, 0.2], [0.2, 0.4]]]).double()
    mixture = family.normal_mixture(f[:, None], C[:, None], reach)
    assert float(mixture.log_weights.exp().sum()) == pytest.approx(1.0, abs=1e-9)
    for y in (-3.0, 0.0, 0.7, 6.0):
        value = torch.tensor([[y]]).double()
        density, below = (_convolved(name, f[0].numpy(), C[0].numpy(), y, kind) for kind in ("pdf", "cdf"))
        assert float(mixture.log_density(value)) == pytest.approx(math.log(density), abs=1e-7)
        assert float(mixture.cdf(value)) == pytest.approx(below, abs=1e-7)


def _convolved(name, f, C, y, kind):
    if name == "student_t":
        inner = scipy.stats.norm(f[0], C[0, 0] ** 0.5)
        function = lambda m: getattr(scipy.stats.t(DOF, m, 0.3**0.5), kind)(y) * inner.pdf(m)  # noqa: E731
        return scipy.integrate.quad(function, f[0] - 9, f[0] + 9, points=[f[0], y], limit=300, epsabs=1e-12)[0]
    log_sd = C[1, 1] ** 0.5

    def given(s):  # the mean is normal given the log variance
        loc = f[0] + C[0, 1] / C[1, 1] * (s - f[1])
        scale = (C[0, 0] - C[0, 1] ** 2 / C[1, 1] + math.exp(s)) ** 0.5
        return getattr(scipy.stats.norm(loc, scale), kind)(y) * scipy.stats.norm(f[1], log_sd).pdf(s)

    return scipy.integrate.quad(given, f[1] - 12 * log_sd, f[1] + 12 * log_sd, limit=300, epsabs=1e-13)[0]


# with 1,000 degrees of freedom the log density at 1e6 is below −10,000, far beyond where the nodes end
@pytest.mark.parametrize(
    ("dof", "distance"),
    [(dof, far) for dof in (2.1, 4.0, 30.0, 1000.0) for far in (0.0, 1.0, 30.0, 1e6) if (dof, far) != (1000.0, 1e6)],
)
def test_the_nodes_of_the_student_t_density_reach_outliers(dof, distance):
    """Without uncertainty of the mean it is the Student-t density itself."""
    family = StudentT(torch.tensor(1.0).double(), dof)
    mixture = family.normal_mixture(torch.zeros(1, 1, 1).double(), torch.zeros(1, 1, 1, 1).double(), 9.0)
    value = torch.tensor([[distance]]).double()
    expected = float(family.log_prob(torch.zeros(1, 1).double(), value))
    assert float(mixture.log_density(value)) == pytest.approx(expected, abs=1e-6)


def test_targets_that_do_not_fit():
    with pytest.raises(ValueError, match=r"heteroscedastic_gaussian needs two outputs a target, .* got 3 outputs\.$"):
        HeteroscedasticGaussian().check(torch.zeros(4, 3), torch.zeros(4, 1))
    with pytest.raises(ValueError, match=r"^`targets` must have shape \(4, 2\), got \(4, 4\)\.$"):
        HeteroscedasticGaussian().check(torch.zeros(4, 4), torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"^`targets` must have shape \(4, 2\), got \(3, 2\)\.$"):
        StudentT().check(torch.zeros(4, 2), torch.zeros(3, 2))
    assert HeteroscedasticGaussian().check(torch.zeros(4, 2), torch.zeros(4)).shape == (4, 1)


def test_the_likelihoods_of_numbers():
    assert NUMERIC == ("gaussian", "poisson", "student_t", "heteroscedastic_gaussian")
    assert set(LIKELIHOODS) - set(NUMERIC) == {"categorical", "bernoulli", "ordinal", "tokens"}
