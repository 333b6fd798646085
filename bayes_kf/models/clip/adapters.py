"""Trainable parts of a CLIP (feature adapters behind an encoder, LoRA inside), prompts, and local checkpoints."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayes_kf.validation import check_one_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import CLIPModel, CLIPProcessor

FORMS = ("residual", "blend")
ENCODERS = {"vision": "vision_model", "text": "text_model"}


class FeatureAdapter(nn.Module):
    """A bottleneck behind an encoder, from features (..., d) to features (..., d).

    "residual": f + U gelu(D f + b) + c, with U and c zero at first, so the features are those of the frozen model (the
    form of Houlsby et al. 2019, behind the encoder instead of inside it). "blend": (1 − α) f + α relu(U relu(D f)) with
    a random U (CLIP-Adapter, Gao et al. 2021, which uses a bottleneck of d/4 and α = 0.2).

    Args:
        width: the number of features, d.
        bottleneck: rows of D; a quarter of ``width`` by default.
        form: "residual" or "blend".
        blend: α of "blend", in (0, 1].
        seed: of the initial weights.

    Raises:
        ValueError: for a width or bottleneck below 1, an unknown form, or an α outside (0, 1].

    Example:
        >>> adapter = FeatureAdapter(8)
        >>> features = torch.randn(3, 8)
        >>> torch.equal(adapter(features), features), sum(p.numel() for p in adapter.parameters())
        (True, 42)
    """

    def __init__(
        self, width: int, bottleneck: int | None = None, *, form: str = "residual", blend: float = 0.2, seed: int = 0
    ) -> None:
        super().__init__()
        hidden = max(1, width // 4) if bottleneck is None else bottleneck
        if width < 1 or hidden < 1:
            raise ValueError(f"`width` and `bottleneck` must be at least 1, got {width} and {hidden}.")
        check_one_of("form", form, FORMS)
        if not 0 < blend <= 1:
            raise ValueError(f"`blend` must lie in (0, 1], got {blend!r}.")
        self.form, self.blend = form, blend
        bias = form == "residual"
        self.down, self.up = nn.Linear(width, hidden, bias=bias), nn.Linear(hidden, width, bias=bias)
        generator = torch.Generator().manual_seed(seed)
        for layer in (self.down, self.up):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)  # torch's default
        if bias:
            for tensor in (self.down.bias, self.up.bias, self.up.weight):
                nn.init.zeros_(tensor)

    def forward(self, features: Tensor) -> Tensor:
        """Adapted features, (..., d)."""
        if self.form == "residual":
            return features + self.up(F.gelu(self.down(features)))
        return (1 - self.blend) * features + self.blend * F.relu(self.up(F.relu(self.down(features))))


def clip_lora(
    clip: CLIPModel,
    rank: int = 2,
    encoders: Sequence[str] = ("vision", "text"),
    *,
    projections: Sequence[str] = ("q_proj", "k_proj", "v_proj"),
    alpha: float = 1.0,
    dropout: float = 0.25,
    seed: int = 0,
) -> PeftModel:
    """CLIP with LoRA on the attention of every layer, in eval mode: CLIP-LoRA (Zanella and Ben Ayed 2024).

    Each projection W becomes W + (α/√r) B A, with B zero at first. The defaults are CLIP-LoRA's settings. To train with
    AdamW as the paper does, call ``.train()``, which enables the dropout. The filter uses no dropout.

    Args:
        clip: a ``transformers.CLIPModel``; PEFT puts its layers into it.
        rank: r of B A.
        encoders: "vision", "text", or both.
        projections: linear layers by name: "q_proj", "k_proj", "v_proj", "out_proj", and of the MLP "fc1" and "fc2".
        alpha: α.
        dropout: of the input of A, in training mode.
        seed: of the initial A.

    Returns:
        A PEFT model; only A and B require gradients.

    Raises:
        ValueError: for a rank below 1, an unknown encoder, or none.

    Example:
        >>> from transformers import CLIPConfig, CLIPModel
        >>> small = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> vision = small | {"image_size": 8, "patch_size": 4}
        >>> clip = CLIPModel(CLIPConfig(text_config=small | {"vocab_size": 9}, vision_config=vision, projection_dim=4))
        >>> sum(p.numel() for p in clip_lora(clip, rank=2).parameters() if p.requires_grad)
        192
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if rank < 1:
        raise ValueError(f"`rank` must be at least 1, got {rank}.")
    if not encoders or not set(encoders) <= set(ENCODERS):
        raise ValueError(f"`encoders` must be some of {', '.join(ENCODERS)}, got {tuple(encoders)!r}.")
    towers = "|".join(ENCODERS[name] for name in encoders)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT only divides by it
        lora_dropout=dropout,
        use_rslora=True,
        target_modules=rf"(.*\.)?({towers})\..*\.({'|'.join(projections)})",
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators too
        model = get_peft_model(clip, config)
    assert isinstance(model, PeftModel)  # a mixed model needs mixed=True
    return model.eval()


def prompt_tokens(
    tokenizer: Any, names: Sequence[str], templates: str | Sequence[str] = "a photo of a {}."
) -> dict[str, Tensor]:
    """Tokens of every class's prompt, for ``ClipClassifier``.

    Args:
        tokenizer: of transformers, or any function of (texts, padding=True, return_tensors="pt") that returns
            ``input_ids`` and ``attention_mask``.
        names: of the m classes.
        templates: one template, or K of them, with {} for the name.

    Returns:
        ``input_ids`` and ``attention_mask``, (m, T), or (m, K, T) for a sequence of K templates.

    Raises:
        ValueError: if there are no names or no templates, or a template has no {}.

    Example:
        >>> class Words:
        ...     def __call__(self, texts, padding, return_tensors):
        ...         ids = torch.tensor([[len(word) for word in text.split()] for text in texts])
        ...         return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        >>> prompt_tokens(Words(), ["cat", "horse"])["input_ids"]
        tensor([[1, 5, 2, 1, 4],
                [1, 5, 2, 1, 6]])
    """
    used = [templates] if isinstance(templates, str) else list(templates)
    if not names or isinstance(names, str):
        raise ValueError(f"`names` must be a sequence of at least one name, got {names!r}.")
    if not used or any("{}" not in template for template in used):
        raise ValueError(f"`templates` must hold {{}} in the place of the name, got {templates!r}.")
    texts = [template.format(name) for name in names for template in used]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    tokens = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    if isinstance(templates, str):
        return tokens
    return {name: t.view(len(names), len(used), -1) for name, t in tokens.items()}


def load_clip(folder: str | os.PathLike[str]) -> tuple[CLIPModel, CLIPProcessor]:
    """A CLIP model of transformers and its processor (tokenizer and image preprocessing), from a local folder.

    Nothing is downloaded. The model is frozen and in evaluation mode.

    Args:
        folder: with ``config.json``, ``model.safetensors`` and the processor's files, as ``save_pretrained`` writes it.

    Raises:
        ValueError: if the folder does not exist or does not hold a readable checkpoint.
    """
    from transformers import CLIPModel, CLIPProcessor

    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"`folder` must hold a CLIP checkpoint with config.json, got {folder}.")
    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"`folder` must hold a readable CLIP checkpoint, got {folder}: {error}") from error
    return model.requires_grad_(False).eval(), processor
