"""Parts of the rows: models on shared features or with LoRA, gradient descent, predictions."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel

from bayes_kf.models.clip import ClipClassifier, FeatureAdapter, clip_lora
from benchmarks.few_shot.images import Named
from benchmarks.few_shot.moments import SOFTMAX

BATCH = 32  # of gradient descent, as in CLIP-LoRA
AHEAD = 100  # images of a prediction batch
STEPS_PER_SHOT = 20  # CLIP-LoRA makes 500
LEAST_RATE = 1e-6  # at the end of the cosine
BOTTLENECK = 16

Predict = Callable[[Tensor], Mapping[str, Tensor]]
Choice = Mapping[str, Any]


class Setting(NamedTuple):
    """The model and data that all rows of a cell share.

    Attributes:
        clip: the frozen model; rows take copies.
        tokens: tokens and mask of the prompts.
        training: shots to learn.
        validation: shots to choose settings and temperatures.
        shots: of every class.
        seed: of adapters, orders and draws.
    """

    clip: CLIPModel
    tokens: dict[str, Tensor]
    training: Named
    validation: Named
    shots: int
    seed: int


class Learned(NamedTuple):
    """The result of a row.

    Attributes:
        predict: from images to probabilities (N, m), float64: the row's own under "", and those of its variants.
        facts: further numbers.
        later: further variants of the chosen setting: name -> function that returns the fields of a ``Learned``.
    """

    predict: Predict
    facts: Mapping[str, Any] = {}
    later: Mapping[str, Callable[[], dict[str, Any]]] = {}


Learn = Callable[[Setting, Choice], Learned]


class Row(NamedTuple):
    """A way to learn.

    Attributes:
        title: its name in tables.
        learn: function from a setting and a choice to the result.
        grid: its settings.
        tests_all: whether every setting is tested, not only the chosen one, for a table by setting.
    """

    title: str
    learn: Learn
    grid: tuple[Choice, ...]
    tests_all: bool = False


class FrozenFeatures(nn.Module):
    """A CLIP whose inputs are features of the frozen encoders: image features, and prompts by index."""

    def __init__(self, text: Tensor, logit_scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("text", text)
        self.register_buffer("logit_scale", logit_scale)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """The features themselves."""
        return pixel_values

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The features of the prompts with these indices."""
        return self.text[input_ids[:, 0]]


@torch.no_grad()
def image_features(clip: CLIPModel, images: Tensor) -> Tensor:
    """Features of the frozen image encoder before normalization, (N, d)."""
    return torch.cat([clip.get_image_features(pixel_values=part).pooler_output for part in images.split(AHEAD)])


def on_lora(setting: Setting, **options: Any) -> ClipClassifier:
    """CLIP-LoRA's model: by default rank 2 on queries, keys and values of every layer of both encoders."""
    return ClipClassifier(clip_lora(copy.deepcopy(setting.clip), seed=setting.seed, **options), **setting.tokens)


def on_features(setting: Setting, adapted: bool = True) -> ClipClassifier:
    """Residual bottlenecks behind both encoders; its inputs are image features."""
    with torch.no_grad():
        text = setting.clip.get_text_features(**setting.tokens).pooler_output
    frozen = FrozenFeatures(text, setting.clip.logit_scale.detach())
    numbers, seeds = torch.arange(len(text)).unsqueeze(1), (2 * setting.seed, 2 * setting.seed + 1)
    own = [FeatureAdapter(text.shape[1], BOTTLENECK, seed=seed) for seed in seeds] if adapted else [None, None]
    return ClipClassifier(frozen, numbers, image_adapter=own[0], text_adapter=own[1])


def descend(model: nn.Module, optimizer: Any, inputs: Tensor, setting: Setting) -> None:
    """Minimize the cross-entropy of the training shots with dropout and a cosine schedule."""
    torch.manual_seed(setting.seed)
    labels, steps = setting.training.labels, STEPS_PER_SHOT * setting.shots
    highest = [group["lr"] for group in optimizer.param_groups]
    model.train()
    for step, which in enumerate(orders(len(labels), steps, setting.seed)):
        for group, rate in zip(optimizer.param_groups, highest, strict=True):
            group["lr"] = LEAST_RATE + (rate - LEAST_RATE) * 0.5 * (1 + math.cos(math.pi * step / steps))
        outputs = model(inputs[which])
        loss = F.cross_entropy(outputs, labels[which])
        optimizer.zero_grad()
        optimizer.backward(loss, outputs) if hasattr(optimizer, "backward") else loss.backward()
        optimizer.step()
    model.eval()


def orders(size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Batches of indices; every epoch has its own order."""
    generator = torch.Generator().manual_seed(seed)
    done = 0
    while done < steps:
        for which in torch.randperm(size, generator=generator).split(BATCH)[: steps - done]:
            yield which
            done += 1


def probabilities(model: nn.Module, features_of: CLIPModel | None = None) -> Callable[[Tensor], Tensor]:
    """A function from images to log probabilities, (N, m), float64; ``features_of`` makes the model's inputs."""

    @torch.no_grad()
    def predict(images: Tensor) -> Tensor:
        inputs = images if features_of is None else image_features(features_of, images)
        return torch.cat([model(part) for part in inputs.split(AHEAD)]).double().log_softmax(1)

    return predict


def scaled_too(log_probs: Callable[[Tensor], Tensor], setting: Setting) -> Learned:
    """A softmax and, as "scaled", the same at the best temperature on the validation shots."""
    known, labels = log_probs(setting.validation.images), setting.validation.labels
    losses = {t: F.cross_entropy(known / t, labels).item() for t in SOFTMAX}
    best = min(losses, key=lambda t: losses[t])

    def predict(images: Tensor) -> dict[str, Tensor]:
        outputs = log_probs(images)
        return {"": outputs.softmax(1), "scaled": (outputs / best).softmax(1)}

    return Learned(predict, {"softmax_temperature": best})
