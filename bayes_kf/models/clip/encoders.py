"""The two encoders of a CLIP, with adapters behind them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TwoTowers(nn.Module):
    """Image and text features of a CLIP as unit vectors, with adapters behind either encoder.

    Args:
        clip: ``transformers.CLIPModel``, with PEFT's adapters or without, or any module with its two encoders:
            ``get_image_features(pixel_values=...)`` and ``get_text_features(input_ids=..., attention_mask=...)`` return
            features (N, d), or an object that has them as ``pooler_output``. Its tensors are not changed: freeze those
            that should not learn (``clip.requires_grad_(False)``; PEFT does).
        image_adapter: from image features (N, d) to image features, see ``FeatureAdapter``; None for none.
        text_adapter: the same for text features, (..., d).

    Raises:
        ValueError: if ``clip`` lacks one of the two methods.
    """

    def __init__(
        self, clip: nn.Module, image_adapter: nn.Module | None = None, text_adapter: nn.Module | None = None
    ) -> None:
        super().__init__()
        for name in ("get_image_features", "get_text_features"):
            if not callable(getattr(clip, name, None)):
                raise ValueError(f"`clip` must have a method {name}, as CLIPModel has, got {type(clip).__name__}.")
        self.clip, self.image_adapter, self.text_adapter = clip, image_adapter, text_adapter

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Unit image features, (B, d)."""
        features = _as_features(self.clip.get_image_features(pixel_values=pixel_values))  # type: ignore[operator]
        return F.normalize(features if self.image_adapter is None else self.image_adapter(features), dim=-1)

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Unit text features, (N, d)."""
        features = self.encoded(input_ids, attention_mask)
        return F.normalize(features if self.text_adapter is None else self.text_adapter(features), dim=-1)

    def encoded(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Text features before the adapter, (N, d)."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return _as_features(self.clip.get_text_features(input_ids=input_ids, attention_mask=mask))  # type: ignore[operator]


def _as_features(outputs: Any) -> Tensor:
    """The features that an encoder returns, or that the object it returns holds."""
    return outputs if isinstance(outputs, Tensor) else outputs.pooler_output
