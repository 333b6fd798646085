"""Independent answers that the tests compare with: dense, float64, written out plainly."""

import math

import torch
from torch import nn


def dense_jacobian(model: nn.Module, call) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs (B, m) and Jacobian (B, m, n) over trainable parameters, one backward pass a number."""
    model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    outputs = call(model)
    rows = []
    for value in outputs.reshape(-1):
        gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return outputs.detach(), torch.stack(rows).view(*outputs.shape, -1).detach()


def linear_posterior(x, y, prior_mean, prior_cov, noise_var):
    """Mean and covariance of Bayesian linear regression y = xw + ε, all data at once."""
    precision = torch.linalg.inv(prior_cov) + x.T @ x / noise_var
    covariance = torch.linalg.inv(precision)
    mean = covariance @ (torch.linalg.solve(prior_cov, prior_mean) + x.T @ y / noise_var)
    return mean, covariance


def log_evidence(x, y, prior_mean, prior_cov, noise_var):
    """log N(y; x μ₀, x P₀ xᵀ + σ²I)."""
    cov = x @ prior_cov @ x.T + noise_var * torch.eye(len(y), dtype=x.dtype)
    return torch.distributions.MultivariateNormal(x @ prior_mean, cov).log_prob(y)


def naive_loko(jacobian_of, outputs_of, theta, p, stream, beta=0.95, taylor=True):
    """Algorithm 1 of the LoKO paper as printed, in full m-dimensional probability space; yields (θ, p) per step.

    With ``taylor`` R is estimated by its equation 12, else by 7.
    """
    r = None
    for x, y in stream:
        eta = outputs_of(theta, x)
        prob = eta.softmax(-1)
        h = (torch.diag(prob) - torch.outer(prob, prob)) @ jacobian_of(theta, x)
        e = torch.nn.functional.one_hot(y, len(prob)).to(prob) - prob
        r = torch.eye(len(prob), dtype=prob.dtype) if r is None else r
        ph = p[:, None] * h.T
        r_hat = torch.outer(e, e) + (h @ ph if taylor else 0.0)
        r = beta * r + (1 - beta) * r_hat
        gain = ph @ torch.linalg.inv(h @ ph + r)
        theta = theta + gain @ e
        p = p - torch.einsum("ij,ji,i->i", gain, h, p)
        yield theta, p


def against_the_rest(outputs, covariance):
    """MacKay's approximation for each class against the rest, written out."""
    actual = []
    for c in range(outputs.shape[1]):
        others = outputs.clone()
        others[:, c] = -math.inf
        slope = torch.eye(outputs.shape[1]).to(outputs)[c] - others.softmax(1)
        variance = (slope.unsqueeze(1) @ covariance @ slope.unsqueeze(2)).flatten()
        odds = outputs[:, c] - others.logsumexp(1)
        actual.append((odds / (1 + math.pi / 8 * variance).sqrt()).sigmoid())
    probs = torch.stack(actual, 1)
    return probs / probs.sum(1, keepdim=True)
