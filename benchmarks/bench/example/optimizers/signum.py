"""Signum: a step of constant size along the sign of the averaged gradient. Bernstein et al. 2018."""

import torch

from benchmarks.bench.learners import GradientLearner, trainable

TITLE = "Signum"
GRID = ({"lr": 1e-4}, {"lr": 3e-4}, {"lr": 1e-3}, {"lr": 3e-3})  # as many settings as every row


class Signum(torch.optim.Optimizer):
    """m ← 0.9 m + 0.1 g, θ ← θ − lr sign(m)."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        """Move every parameter."""
        for group in self.param_groups:
            for parameter in group["params"]:
                mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                mean.lerp_(parameter.grad, 0.1)
                parameter.sub_(group["lr"] * mean.sign())


def make(model, choice, seed, num_steps, inputs):
    """A learner."""
    return GradientLearner(model, Signum(trainable(model), choice["lr"]), decay_over=num_steps)
