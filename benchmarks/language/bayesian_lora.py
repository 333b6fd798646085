"""BLoB and TFB in their smallest form, after the equations of their papers; this code is ours.

BLoB (Wang et al. 2024, "BLoB: Bayesian Low-Rank Adaptation by Backpropagation for Large Language Models"): the factors
A are independent Gaussians with means M and standard deviations G², B is a number; one sample a step for the
likelihood, and the divergence from N(0, σ_p²) in closed form. Not taken over: Flipout, and the paper's schedule of the
divergence's weight, which is constant here.

TFB (Shi et al. 2024, "Training-Free Bayesianization for Low-Rank Adapters of Large Language Models"): with B = U
diag(d) Vᵀ a trained adapter is B' = U diag(d), A' = Vᵀ A; A' gets standard deviations σ/d_i. σ is the largest at
which the loss of held-out questions, whose labels are the adapter's own answers, changes by at most ``LOSS`` times
their number, relatively: so does the authors' released code. Its search ends at 0.015 for a model of 8 B parameters;
here it goes up to 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.learners import Inputs, Stream
from benchmarks.quality.rows import raw

BATCH, DRAWS = 16, 10
PRIOR_SD, START_SD = 0.2, 0.05  # BLoB's σ_p, and the largest standard deviation at the start
LOSS, STEPS = 0.003, 8  # TFB's allowed change of the loss, for each question, and halvings of its search


def lora_factors(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """The factors A (r, in) and B (out, r) of every LoRA layer."""
    return [
        (module.lora_A["default"].weight, module.lora_B["default"].weight)  # type: ignore[index, union-attr]
        for module in model.modules()
        if hasattr(module, "lora_A")
    ]


class Blob:
    """A model whose factors A are Gaussian.

    Args:
        model: with LoRA; it is changed.
        seed: of the standard deviations at the start.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.model, self.factors = model, lora_factors(model)
        generator = torch.Generator().manual_seed(seed)
        self.means = [a.detach().clone().requires_grad_() for a, _ in self.factors]
        self.roots = [
            (START_SD**0.5 * (0.7 + 0.3 * torch.rand(a.shape, generator=generator))).requires_grad_()
            for a, _ in self.factors
        ]

    def learn(self, stream: Stream, seed: int, rate: float, epochs: int) -> None:
        """Adam on means, standard deviations and B, with batches of 16 and a rate that falls to zero."""
        others = [p for p in self.model.parameters() if p.requires_grad and all(p is not a for a, _ in self.factors)]
        optimizer = torch.optim.AdamW([*self.means, *self.roots, *others], lr=rate, weight_decay=0.0)
        count = len(stream.labels)
        total = epochs * math.ceil(count / BATCH)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            for inputs, labels in stream.at(torch.randperm(count, generator=generator)).batches(BATCH):
                optimizer.zero_grad(set_to_none=True)
                loss = F.cross_entropy(self._sampled(inputs, generator), labels) + self._divergence() / count
                loss.backward()
                optimizer.step()
                schedule.step()

    def _sampled(self, inputs: Inputs, generator: torch.Generator) -> Tensor:
        """Logits under one draw, which can be differentiated."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        tensors = {
            names[id(a)]: mean + root.square() * torch.randn(a.shape, generator=generator)
            for (a, _), mean, root in zip(self.factors, self.means, self.roots, strict=True)
        }
        outputs: Tensor = torch.func.functional_call(self.model, tensors, kwargs=dict(inputs))  # type: ignore[arg-type]
        return outputs

    def _divergence(self) -> Tensor:
        """KL(q(A) ‖ N(0, σ_p²)), in nats."""
        total = torch.zeros(())
        for mean, root in zip(self.means, self.roots, strict=True):
            sd = root.square()
            ratio = (sd.square() + mean.square()) / PRIOR_SD**2
            total = total + 0.5 * (ratio - 1.0 - 2.0 * (sd / PRIOR_SD).log()).sum()
        return total

    def draws(self, seed: int) -> Iterator[nn.Module]:
        """The model under each draw."""
        deviations = [root.detach().square() for root in self.roots]
        yield from drawn(self.model, [mean.detach() for mean in self.means], deviations, seed)


def tfb(model: nn.Module, heldout: Stream, seed: int) -> tuple[list[Tensor], list[Tensor], float]:
    """Means and standard deviations of A' and σ; the factors of ``model`` are replaced by B' and A'."""
    factors, scales = lora_factors(model), []
    with torch.no_grad():
        for a, b in factors:
            u, d, vt = torch.linalg.svd(b, full_matrices=False)
            b.copy_(u * d)
            a.copy_(vt @ a)
            scales.append((1.0 / d.clamp_min(1e-6)).unsqueeze(1).expand_as(a))
    means = [a.detach().clone() for a, _ in factors]
    at_mean = raw(model, heldout).log_softmax(1)
    answers = at_mean.argmax(1, keepdim=True)
    wanted = -at_mean.gather(1, answers).mean().item()
    allowed = LOSS * len(answers) * wanted

    def loss(sigma: float) -> float:
        probs = [raw(one, heldout).softmax(1) for one in drawn(model, means, [sigma * s for s in scales], seed)]
        return -torch.stack(probs).mean(0).gather(1, answers).log().mean().item()

    low, high = math.log(1e-4), math.log(1.0)
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if abs(loss(math.exp(middle)) - wanted) <= allowed else (low, middle)
    sigma = math.exp(low)
    return means, [sigma * s for s in scales], sigma


@torch.no_grad()
def drawn(model: nn.Module, means: list[Tensor], deviations: list[Tensor], seed: int) -> Iterator[nn.Module]:
    """The model with each of ``DRAWS`` draws of its factors A; the means are put back."""
    generator, factors = torch.Generator().manual_seed(seed), lora_factors(model)
    for _ in range(DRAWS):
        for (a, _), mean, deviation in zip(factors, means, deviations, strict=True):
            a.copy_(mean + deviation * torch.randn(a.shape, generator=generator))
        yield model
    for (a, _), mean in zip(factors, means, strict=True):
        a.copy_(mean)
