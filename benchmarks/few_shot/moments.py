"""Mean and covariance of a CLIP classifier's logits under a posterior, exact for the linearized model, and fast.

With LoRA in the text encoder, the package's Jacobian takes a backward pass for every image and class, because prompts
are not examples. But logits are scale · cos(image, prompt). Their derivative with respect to the prompts' parameters is
that of the prompts' unit features, the same for all images, times the image's feature. The prompts' Jacobian is
therefore computed once, with prompts as examples, and images are linearized with fixed prompts.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import bayes_kf as bkf
from bayes_kf.inference.covariance.gaussian_sampling import gaussian_draws
from bayes_kf.inference.filtering.prequential_temperature import GRID
from bayes_kf.inference.linearization.jacobian import Jacobian
from bayes_kf.inference.linearization.linearizer import Linearizer
from bayes_kf.models.clip import ClipClassifier

AT_ONCE = 100  # images
SOFTMAX = tuple(2.0 ** (k / 4) for k in range(-4, 14))  # divisors of logits, 0.5 to 9.5


class Prompts(nn.Module):
    """A classifier's text side: tokens (N, T) to unit features (N, d)."""

    def __init__(self, classifier: ClipClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.classifier.text_features(input_ids, attention_mask)


class Moments:
    """The mean (N, m) and covariance (N, m, m) of the logits of images, or of other inputs of the classifier.

    Args:
        posterior: over the classifier's tensors.
        classifier: with one prompt for each class.
    """

    def __init__(self, posterior: bkf.Posterior, classifier: ClipClassifier) -> None:
        self._belief = posterior.state.belief
        self._slices, self._size = posterior.adapter.slices(), posterior.adapter.num_parameters
        held = copy.deepcopy(classifier)
        posterior.apply_to(held)
        names = [name for name in posterior.adapter.names if ".text_model." in name]
        self._prompts = self._of_prompts(held, names) if names else None
        for name in names:
            held.get_parameter(name).requires_grad_(False)
        self._classifier = held
        others = [name for name in posterior.adapter.names if name not in names]
        self._images = Linearizer(bkf.AdapterModel(held)) if others else None

    def __call__(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Logits at the mean, (N, m), and their covariance, (N, m, m), in float64."""
        pieces = [self._piece(part) for part in inputs.split(AT_ONCE)]
        return torch.cat([mean for mean, _ in pieces]), torch.cat([covariance for _, covariance in pieces])

    def _of_prompts(self, classifier: ClipClassifier, names: list[str]) -> tuple[Tensor, list[str]]:
        """The Jacobian of the prompts' unit features, (m, d, n), and the names of its tensors."""
        model = Prompts(copy.deepcopy(classifier))
        for name, tensor in model.classifier.named_parameters():
            tensor.requires_grad_(name in names)
        adapter = bkf.AdapterModel(model)
        tokens = {"input_ids": classifier.input_ids, "attention_mask": classifier.attention_mask}
        rows = Linearizer(adapter)(adapter.vector(), tokens).jacobian().dense()
        return rows, [name.removeprefix("classifier.") for name in adapter.names]

    def _piece(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits = self._classifier(inputs)
        jacobian = logits.new_zeros(*logits.shape, self._size)
        if self._images is not None:
            adapter = self._images.adapter
            rows = self._images(adapter.vector(), inputs).jacobian().dense()
            _place(jacobian, rows, adapter.names, self._slices)
        if self._prompts is not None:
            with torch.no_grad():
                unit = self._classifier.image_features(inputs)
                scale = self._classifier.clip.logit_scale.exp()
                rows = scale * torch.einsum("bd,mdn->bmn", unit, self._prompts[0])
            _place(jacobian, rows, self._prompts[1], self._slices)
        operator = Jacobian.from_rows(jacobian)
        return logits.double(), self._belief.output_covariance(operator).double()


def _place(jacobian: Tensor, rows: Tensor, names: list[str] | tuple[str, ...], slices: dict[str, slice]) -> None:
    """The columns of some tensors, consecutive in ``rows``, placed in the columns of all tensors."""
    start = 0
    for name in names:
        width = slices[name].stop - slices[name].start
        jacobian[..., slices[name]] = rows[..., start : start + width]
        start += width


class Temperatures(NamedTuple):
    """The factor on the covariance, and the divisor of the logits after it."""

    belief: float
    softmax: float


def averaged(mean: Tensor, covariance: Tensor, chosen: Temperatures, draws: int, seed: int) -> Tensor:
    """The mean softmax of draws from N(mean, T · covariance) divided by t, (N, m)."""
    generator = torch.Generator().manual_seed(seed)
    outputs = gaussian_draws(mean, chosen.belief * covariance, draws, generator)
    return (outputs / chosen.softmax).softmax(-1).mean(0)


def best_temperatures(
    mean: Tensor, covariance: Tensor, labels: Tensor, draws: int, seed: int, softmax: Sequence[float] = SOFTMAX
) -> Temperatures:
    """The temperatures of the package's grid and of ``softmax`` with the least log loss of ``labels``."""

    def loss(chosen: Temperatures) -> float:
        probs = averaged(mean, covariance, chosen, draws, seed)
        return -probs.gather(1, labels[:, None]).log().sum().item()

    return min(itertools.starmap(Temperatures, itertools.product(GRID, softmax)), key=loss)
