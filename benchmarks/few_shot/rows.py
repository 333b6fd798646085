"""The rows of the few-shot bench: methods from a CLIP and a few labelled images to predictions.

All start with the same weights, the same adapter for a seed, and the same shots. Each has a grid of settings; the one
that classifies most validation shots correctly (then the one with the least log loss) is tested. A new row is a
function from a :class:`Setting` and a choice to :class:`Learned`, and a line in ``ROWS``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bayes_kf as bkf
from bayes_kf.inference.baselines import SparseOptimization
from bayes_kf.models.clip import ClipClassifier, MatchedPairs
from benchmarks.few_shot.learn import (
    Choice,
    Learn,
    Learned,
    Row,
    Setting,
    descend,
    image_features,
    on_features,
    on_lora,
    probabilities,
    scaled_too,
)
from benchmarks.few_shot.moments import Moments, averaged, best_temperatures

DRAWS, FEW_DRAWS = 256, 64  # draws of the logits, in predictions and for the choice of temperatures
FEATURE_BATCH, LORA_BATCH = 2, 4  # images of an update
FEATURE_STEPS, LORA_STEPS = 800, 200  # passes of the mean after the filter's pass
RATES = tuple({"lr": lr} for lr in (1e-3, 3e-3, 1e-2))
DECAY = 1e-2
MATRICES = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")  # share of weights that Sparse Optimization changes


def zero_shot(setting: Setting, choice: Choice) -> Learned:
    """The frozen model."""
    return scaled_too(probabilities(ClipClassifier(setting.clip, **setting.tokens)), setting)


def clip_lora_adamw(setting: Setting, choice: Choice) -> Learned:
    """CLIP-LoRA, and this package's posterior around its mean."""
    model = on_lora(setting)
    _adamw(model, setting.training.images, choice, setting)
    learned = scaled_too(probabilities(model), setting)
    shots = list(zip(setting.training.images.split(8), setting.training.labels.split(8), strict=True))

    def post_hoc() -> dict[str, Any]:
        posterior = bkf.fit(model, shots, bkf.KalmanConfig(seed=setting.seed), start="trained", progress=False)
        return _bayesian(posterior, model, setting, read=True)

    return learned._replace(later={"post hoc": post_hoc})


def feature_adamw(setting: Setting, choice: Choice) -> Learned:
    """Bottlenecks behind both encoders."""
    model = on_features(setting)
    _adamw(model, image_features(setting.clip, setting.training.images), choice, setting)
    return scaled_too(probabilities(model, setting.clip), setting)


def sparse(setting: Setting, choice: Choice) -> Learned:
    """Sparse Optimization of the matrices of attention and MLPs in both encoders."""
    clip = copy.deepcopy(setting.clip)
    for name, tensor in clip.named_parameters():
        tensor.requires_grad_(name.endswith("weight") and name.split(".")[-2] in MATRICES)
    model = ClipClassifier(clip, **setting.tokens)
    optimizer = SparseOptimization(model, lr=choice["lr"], density=choice["density"], seed=setting.seed)
    descend(model, optimizer, setting.training.images, setting)
    optimizer.close()
    return scaled_too(probabilities(model), setting)


class Cache(nn.Module):
    """Tip-Adapter: logits of the prompts plus similarities to the training shots, whose features are the keys."""

    def __init__(self, classifier: ClipClassifier, features: Tensor, labels: Tensor, share: float, sharpness: float):
        super().__init__()
        self.classifier, self.share, self.sharpness = classifier, share, sharpness
        self.keys = nn.Parameter(F.normalize(features, dim=-1))
        self.values = F.one_hot(labels, classifier.num_classes).to(features)

    def forward(self, features: Tensor) -> Tensor:
        near = torch.exp(-self.sharpness * (1 - F.normalize(features, dim=-1) @ self.keys.T))
        return self.classifier(features) + self.share * near @ self.values


def tip_adapter(setting: Setting, choice: Choice) -> Learned:
    """Tip-Adapter-F (Zhang et al. 2022): AdamW on the keys, here with as many steps as the other rows."""
    features = image_features(setting.clip, setting.training.images)
    plain = on_features(setting, adapted=False)
    model = Cache(plain, features, setting.training.labels, choice["share"], choice["sharpness"])
    _adamw(model, features, choice, setting)
    return scaled_too(probabilities(model, setting.clip), setting)


def kalman(lora: bool, adapter: Mapping[str, Any] | None = None, **settings: Any) -> Learn:
    """A categorical filter on class prompts, over LoRA in both encoders or bottlenecks behind them."""

    def learn(setting: Setting, choice: Choice) -> Learned:
        model = on_lora(setting, **(adapter or {})) if lora else on_features(setting)
        shots = _batches(setting, lora)
        steps = {"mean_passes": math.ceil((LORA_STEPS if lora else FEATURE_STEPS) / len(shots)), "seed": setting.seed}
        config = bkf.KalmanConfig.dataset(**steps | settings | dict(choice))
        posterior = bkf.fit(model, shots, config, progress=False)
        return Learned(**_bayesian(posterior, model, setting, read=lora))

    return learn


def pairs(lora: bool, **settings: Any) -> Learn:
    """A filter on matched pairs: similarities of images and own prompts, observed as ones; classified at the mean.

    The posterior is about similarities, in units of their noise; it has no information on the noise of a class label.
    """

    def learn(setting: Setting, choice: Choice) -> Learned:
        model = on_lora(setting) if lora else on_features(setting)
        scale = float(setting.clip.logit_scale.exp())
        observed = MatchedPairs(model.clip, model.image_adapter, model.text_adapter, scale=scale)
        data = [model.matched(images, labels, scale) for images, labels in _batches(setting, lora)]
        config = bkf.KalmanConfig(**{"likelihood": "gaussian", "seed": setting.seed} | settings | dict(choice))
        bkf.fit(observed, data, config, progress=False).apply_to(observed)
        return scaled_too(probabilities(model, None if lora else setting.clip), setting)

    return learn


def _adamw(model: nn.Module, inputs: Tensor, choice: Choice, setting: Setting) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    descend(model, torch.optim.AdamW(parameters, lr=choice["lr"], weight_decay=DECAY), inputs, setting)


def _batches(setting: Setting, lora: bool) -> list[tuple[Tensor, Tensor]]:
    """The training shots in batches: images, or their features from the frozen encoder."""
    images, labels = setting.training.images, setting.training.labels
    inputs, size = (images, LORA_BATCH) if lora else (image_features(setting.clip, images), FEATURE_BATCH)
    return list(zip(inputs.split(size), labels.split(size), strict=True))


def _bayesian(posterior: bkf.Posterior, model: ClipClassifier, setting: Setting, read: bool) -> dict[str, Any]:
    """Predictions of a posterior at the best temperatures on the validation shots, and of its mean."""
    moments = Moments(posterior, model)

    def logits(images: Tensor) -> tuple[Tensor, Tensor]:
        return moments(images if read else image_features(setting.clip, images))

    known = (*logits(setting.validation.images), setting.validation.labels, FEW_DRAWS, setting.seed)
    chosen = {"": best_temperatures(*known, softmax=(1.0,)), "scaled": best_temperatures(*known)}

    def predict(images: Tensor) -> Mapping[str, Tensor]:
        mean, covariance = logits(images)
        probs = {name: averaged(mean, covariance, at, DRAWS, setting.seed) for name, at in chosen.items()}
        return probs | {"mean": mean.softmax(-1)}

    temperatures = {name or "alone": at._asdict() for name, at in chosen.items()}
    return {"predict": predict, "facts": {"temperatures": temperatures, "streamed": posterior.temperature}}


ONE_PASS = {"mean_passes": 0}
ADAPTIVE = {"noise": "ema_taylor", "beta": 0.8}  # R starts at I and has 20 updates to adapt
GATED = {"gate_quantile": 0.99}
ROBUST = ADAPTIVE | GATED
WIDE_LORA = {"rank": 8, "projections": MATRICES}  # modules of Sparse Optimization
PAIRED = {"initial_spread": "modules", "rank": 60}

TIP = tuple({"lr": 1e-3, "share": share, "sharpness": 5.5} for share in (1.0, 3.0, 10.0))
SPARSE = ({"lr": 1e-2, "density": 5e-4}, {"lr": 2e-3, "density": 2e-2}, {"lr": 1e-2, "density": 2e-2})
WIDE = tuple({"initial_spread": "constant", "initial_logit_sd": sd} for sd in (3.0, 10.0))
BY_MODULES = ({"initial_spread": "modules", "initial_logit_sd": 10.0},)
# On letters the adaptive R is about 250; a prior of 1 logit then hardly learns, one of 3 logits does.
SPREADS = tuple({"initial_logit_sd": sd} for sd in (0.3, 1.0, 3.0))

MEASURED_BEFORE: dict[str, Row] = {  # rows with existing results that are no longer measured
    "narrow-pairs-lora": Row("ours: LoRA, matched pairs, earlier grid", pairs(True, **PAIRED), SPREADS[:2]),
    "narrow-robust-pairs-lora": Row(
        "ours: LoRA, matched pairs, robust, earlier grid", pairs(True, **PAIRED | ROBUST), SPREADS[:2]
    ),
}
ROWS: dict[str, Row] = {
    "zero-shot": Row("zero-shot", zero_shot, ({},)),
    "clip-lora": Row("CLIP-LoRA (AdamW)", clip_lora_adamw, RATES),
    "so": Row("Sparse Optimization", sparse, SPARSE),
    "tip-adapter": Row("Tip-Adapter-F", tip_adapter, TIP),
    "features": Row("feature adapters, AdamW", feature_adamw, RATES),
    "kalman-features": Row("**ours**: feature adapters, class prompts", kalman(False), WIDE),
    "online-features": Row("ours: feature adapters, class prompts, one pass", kalman(False, **ONE_PASS), WIDE),
    "robust-features": Row(
        "ours: feature adapters, class prompts, one pass, robust", kalman(False, **ONE_PASS | ROBUST), WIDE
    ),
    "kalman-lora": Row("**ours**: LoRA, class prompts", kalman(True), BY_MODULES),
    "kalman-wide": Row("**ours**: LoRA on all matrices, class prompts", kalman(True, WIDE_LORA), BY_MODULES),
    "pairs-lora": Row("ours: LoRA, matched pairs", pairs(True, **PAIRED), SPREADS, True),
    "adaptive-pairs-lora": Row(
        "ours: LoRA, matched pairs, adaptive noise", pairs(True, **PAIRED | ADAPTIVE), SPREADS, True
    ),
    "gated-pairs-lora": Row("ours: LoRA, matched pairs, gated", pairs(True, **PAIRED | GATED), SPREADS, True),
    "robust-pairs-lora": Row(
        "ours: LoRA, matched pairs, robust (adaptive and gated)", pairs(True, **PAIRED | ROBUST), SPREADS, True
    ),
}
