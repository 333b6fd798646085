"""CLIP with adapters as latent states: a classifier over prompts, and matched pairs of images and texts.

Two observation models of one adapter. *Class prompts*: logits = scale · cos(image, prompt of every class), observed as
a class label; an ordinary categorical filter. *Matched pairs*: for a batch of images and their own texts, the diagonal
S of the cosine similarities, observed as ones under Gaussian noise. The second follows the abstract and summaries of
the Kalman filter for CLIP of arXiv:2511.01694 (ŷ = diag(S), y ~ N(ŷ, R), adaptive observation noise, Mahalanobis
regulation). The first, and every constant, is ours.

Both are modules, so ``fit``, ``KalmanFilter`` and ``evaluate`` accept them like any other model. A posterior fitted to
pairs predicts classes through a :class:`ClipClassifier` around the same CLIP, whose tensors have the same names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayes_kf.models.clip.encoders import TwoTowers
from bayes_kf.validation import check_positive

VISION = ("vision", "visual", "image")  # first letters of the names of the image encoder's modules

Key = tuple[Any, ...]


class ClipClassifier(TwoTowers):
    """Class prompts as a classifier: pixel values (B, C, H, W) to logits (B, m), scale · cos(image, prompt).

    Without adapters it is the zero-shot classifier (Radford et al. 2021). The features of the prompts are cached if
    nothing that they depend on is trainable; else they are part of the graph. A text adapter is applied to the cached
    features. If a class has several prompts, their unit features are averaged.

    Args:
        clip: see :class:`TwoTowers`.
        input_ids: the prompts' tokens, (m, T), or (m, K, T) for K prompts a class; see ``prompt_tokens``.
        attention_mask: of the same shape; all ones by default.
        image_adapter: see :class:`TwoTowers`.
        text_adapter: see :class:`TwoTowers`; its input is (B, m, d), the same for every image, so its
            tensors are linearized as fast as the image adapter's.
        logit_scale: the factor on cosines; by default exp of CLIP's own ``logit_scale``.

    Raises:
        ValueError: for tokens of another shape, or if neither the CLIP nor ``logit_scale`` gives a scale.

    Example:
        >>> from transformers import CLIPConfig, CLIPModel
        >>> small = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> vision = small | {"image_size": 8, "patch_size": 4}
        >>> text = small | {"vocab_size": 9, "max_position_embeddings": 6, "eos_token_id": 8}
        >>> clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=4))
        >>> classifier = ClipClassifier(clip.requires_grad_(False), torch.tensor([[1, 3, 8], [1, 4, 8]]))
        >>> classifier(torch.randn(5, 3, 8, 8)).shape
        torch.Size([5, 2])
    """

    input_ids: Tensor
    attention_mask: Tensor

    def __init__(
        self,
        clip: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        image_adapter: nn.Module | None = None,
        text_adapter: nn.Module | None = None,
        logit_scale: float | None = None,
    ) -> None:
        super().__init__(clip, image_adapter, text_adapter)
        mask = _check_tokens(input_ids, attention_mask)
        if logit_scale is None and not isinstance(getattr(clip, "logit_scale", None), Tensor):
            raise ValueError("`logit_scale` must be given for a `clip` without its own, got None.")
        if logit_scale is not None:
            check_positive("logit_scale", logit_scale)
        self.register_buffer("input_ids", input_ids.detach().clone())
        self.register_buffer("attention_mask", mask.detach().clone())
        self.logit_scale = logit_scale
        self._cached: tuple[Key, Tensor] | None = None

    @property
    def num_classes(self) -> int:
        """The number of classes, m."""
        return len(self.input_ids)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits, (B, m)."""
        image, prompts = self.image_features(pixel_values), self.prompt_features()
        scale = self.clip.logit_scale.exp() if self.logit_scale is None else self.logit_scale  # type: ignore[operator]
        if self.text_adapter is None:
            return scale * image @ F.normalize(prompts, dim=-1).mT
        adapted = self.text_adapter(prompts.expand(len(image), -1, -1))  # (B, m, d)
        return scale * (F.normalize(adapted, dim=-1) @ image.unsqueeze(-1)).squeeze(-1)

    def prompt_features(self) -> Tensor:
        """The text encoder's features of each class, before the adapter, (m, d)."""
        key = self._key()
        if key is None:
            return self._encoded_prompts()
        if self._cached is None or self._cached[0] != key:
            with torch.inference_mode(False), torch.no_grad(), _evaluating(self.clip):
                self._cached = (key, self._encoded_prompts())
        return self._cached[1]

    def forget_prompts(self) -> None:
        """Clears the cached prompt features; needed after weights were changed through ``.data``."""
        self._cached = None

    def matched(self, pixel_values: Tensor, labels: Tensor, scale: float = 1.0) -> tuple[dict[str, Tensor], Tensor]:
        """A batch for :class:`MatchedPairs`: images, each with its class's first prompt, and the targets.

        Args:
            pixel_values: (B, C, H, W).
            labels: (B,), in 0..m−1.
            scale: of the pairs.

        Returns:
            The inputs, and the targets (B, 1), all equal to ``scale``.
        """
        pairs = {"pixel_values": pixel_values}
        for name in ("input_ids", "attention_mask"):
            tokens = getattr(self, name)
            pairs[name] = (tokens if tokens.ndim == 2 else tokens[:, 0])[labels.to(tokens.device)]
        return pairs, torch.full((len(labels), 1), scale, device=labels.device)

    def _encoded_prompts(self) -> Tensor:
        length = self.input_ids.shape[-1]
        features = self.encoded(self.input_ids.view(-1, length), self.attention_mask.view(-1, length))
        if self.input_ids.ndim == 2:
            return features
        return F.normalize(features, dim=-1).view(*self.input_ids.shape[:2], -1).mean(1)

    def _key(self) -> Key | None:
        """The state of the tensors that cached features depend on; None if it may change from call to call."""
        tensors = [t for name, t in self.clip.named_parameters() if not _of_images(name)]
        if any(not isinstance(t, nn.Parameter) or t.requires_grad for t in tensors):  # substituted, or trainable
            return None
        kind = self.input_ids.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        states = tuple((t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype, t.device) for t in tensors)
        return (*states, autocast)


class MatchedPairs(TwoTowers):
    """Images with their own texts: the diagonal of the similarity matrix, (B, 1), scale · cos(image b, text b).

    The targets are ``scale`` · 1 with Gaussian noise (``ClipClassifier.matched`` makes such batches). R is that of the
    filter's Gaussian likelihood: a number, "estimated", or with ``noise="ema_taylor"`` the adaptive one, which starts
    from 1. Choose ``scale`` so that 1/scale is a realistic error of a cosine. An image that does not match its text is
    an outlier, which ``gate_quantile`` down-weights.

    Args:
        clip: see :class:`TwoTowers`.
        image_adapter: see :class:`TwoTowers`.
        text_adapter: see :class:`TwoTowers`.
        scale: of the cosines; noise of variance 1 is noise of variance 1/scale² in a cosine.

    Raises:
        ValueError: if the scale is not positive.

    Example:
        Learn from pairs, then predict classes with the same adapter:

        >>> import bayes_kf as bkf
        >>> from bayes_kf.models.clip import FeatureAdapter
        >>> from transformers import CLIPConfig, CLIPModel
        >>> small = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> vision = small | {"image_size": 8, "patch_size": 4}
        >>> text = small | {"vocab_size": 9, "max_position_embeddings": 6, "eos_token_id": 8}
        >>> clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=4)).eval()
        >>> adapter = FeatureAdapter(4, 2)
        >>> pairs = MatchedPairs(clip.requires_grad_(False), adapter)
        >>> classifier = ClipClassifier(clip, torch.tensor([[1, 3, 8], [1, 4, 8]]), image_adapter=adapter)
        >>> batch = classifier.matched(torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 0, 1, 0, 1]))
        >>> config = bkf.KalmanConfig(likelihood="gaussian", noise="ema_taylor", gate_quantile=0.99)
        >>> learned = bkf.fit(pairs, [batch], config, progress=False)
        >>> posterior = bkf.Posterior(bkf.KalmanFilter(classifier, bkf.KalmanConfig(temperature=1.0)), learned.state)
        >>> posterior.predict(torch.randn(2, 3, 8, 8)).probs.shape
        torch.Size([2, 2])
    """

    def __init__(
        self,
        clip: nn.Module,
        image_adapter: nn.Module | None = None,
        text_adapter: nn.Module | None = None,
        *,
        scale: float = 1.0,
    ) -> None:
        super().__init__(clip, image_adapter, text_adapter)
        check_positive("scale", scale)
        self.scale = scale

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Similarities of image b and text b, (B, 1)."""
        image, text = self.image_features(pixel_values), self.text_features(input_ids, attention_mask)
        return self.scale * (image * text).sum(-1, keepdim=True)


def _check_tokens(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The mask of prompts; ValueError unless they are integers (m, T) or (m, K, T) for at least one class."""
    if not isinstance(input_ids, Tensor) or input_ids.is_floating_point():
        got = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ValueError(f"`input_ids` must be a tensor of token numbers, got {got}.")
    if input_ids.ndim not in (2, 3) or input_ids.numel() == 0:
        raise ValueError(f"`input_ids` must have shape (classes, [prompts,] tokens), got {tuple(input_ids.shape)}.")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape:
        raise ValueError(f"`attention_mask` must have shape {tuple(input_ids.shape)}, got {tuple(mask.shape)}.")
    return mask


def _of_images(name: str) -> bool:
    """Whether a tensor belongs to the image encoder, by its name; others may belong to the text encoder."""
    return any(part.startswith(VISION) for part in name.split("."))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, every module is in eval mode, since a frozen encoder has no dropout; afterwards each has its own mode."""
    in_training = [module for module in model.modules() if module.training]
    try:
        for module in in_training:
            module.training = False
        yield
    finally:
        for module in in_training:
            module.training = True
