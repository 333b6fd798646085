"""Newton's inverses and their lazy correction against ``linalg.inv``."""

import math

import pytest
import torch

from bayes_kf.inference.baselines.newton_inverse import newton_inverse, shift_error, shifted


def matrix(condition, size=12, dtype=torch.float64, seed=0):
    """Symmetric positive definite, eigenvalues spread evenly in their logarithm between 1 and 1/condition."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(0.0, -math.log10(condition), size, dtype=torch.float64)
    return ((vectors * values) @ vectors.mT).to(dtype)


@pytest.mark.parametrize("size", [12, 150])
@pytest.mark.parametrize("condition", [1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e8, 1e10])
def test_inverse_in_float64(condition, size):
    """Within rounding times the condition number; the number of steps grows with its logarithm."""
    given = matrix(condition, size)
    computed, steps = newton_inverse(given)
    exact = torch.linalg.inv(given)
    assert float((computed - exact).norm() / exact.norm()) < 1e-15 * condition * 10
    assert torch.equal(computed, computed.mT)
    # the smallest eigenvalue of X₀A, 1/(condition·‖A‖_F), doubles a step until it is near 1; a few more square the rest
    doublings = math.log2(condition * float(torch.linalg.matrix_norm(given)))
    assert doublings < steps < doublings + 8


def test_steps_as_stated():
    assert [newton_inverse(matrix(condition)).steps for condition in (1e1, 1e6)] == [10, 26]


@pytest.mark.parametrize("condition", [1e1, 1e2, 1e3, 1e4])
def test_float32_does_well_conditioned_matrices(condition):
    given = matrix(condition, dtype=torch.float32)
    exact = torch.linalg.inv(given.double())
    missed = float((newton_inverse(given).matrix.double() - exact).norm() / exact.norm())
    assert missed < min(6e-7 * condition, 1e-3)


@pytest.mark.parametrize("condition", [1e5, 1e6, 1e9])
def test_float32_refuses_others_until_they_are_damped(condition):
    bad = matrix(condition, dtype=torch.float32)
    with pytest.raises(FloatingPointError, match=r"Newton's inverse of a 12 x 12 matrix has .* use more damping"):
        newton_inverse(bad)
    assert newton_inverse(bad.double()).matrix.dtype == torch.float64
    damped = bad + 1e-2 * torch.eye(12)
    exact = torch.linalg.inv(damped.double())
    assert float((newton_inverse(damped).matrix.double() - exact).norm() / exact.norm()) < 1e-4


def test_float64_has_a_limit_too():
    with pytest.raises(FloatingPointError, match=r"in torch.float64; use more damping"):
        newton_inverse(matrix(1e15))


def test_an_indefinite_matrix_is_refused():
    with pytest.raises(FloatingPointError, match="use more damping or float64"):
        newton_inverse(torch.diag(torch.tensor([1.0, -0.5], dtype=torch.float64)))


@pytest.mark.parametrize("share", [-0.9, -0.3, -0.01, 0.001, 0.1, 0.5, 0.9])
def test_lazy_correction_keeps_its_bound(share):
    """Whatever the shift below the smallest eigenvalue, as far as the bound by ‖X‖_F reaches."""
    given = matrix(1e3)
    inverse = torch.linalg.inv(given)
    shift = share / float(torch.linalg.matrix_norm(inverse))
    exact = torch.linalg.inv(given + shift * torch.eye(12, dtype=torch.float64))
    missed = torch.linalg.matrix_norm(shifted(inverse, shift) - exact, 2) / torch.linalg.matrix_norm(inverse, 2)
    bound = shift_error(inverse, shift)
    assert 0 < float(missed) <= bound
    assert bound == pytest.approx(share**2 / (1 - abs(share)))


def test_lazy_correction_has_no_bound_beyond_the_smallest_eigenvalue():
    given = matrix(1e3)
    inverse, smallest = torch.linalg.inv(given), 1e-3
    assert shift_error(inverse, 1.01 * smallest) == math.inf
    assert shift_error(inverse, -1.01 * smallest) == math.inf
    wrong = shifted(inverse, 10 * smallest)
    assert float(torch.linalg.eigvalsh(wrong)[0]) < 0  # no inverse of anything positive: this is what the rule is for
