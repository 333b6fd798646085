"""The papers' architectures, whose weights torchvision and transformers download.

DenseNet-121 and ResNet-18 with LoRA on their convolutions, ViT-B/16 (DINO's, as LoKO has) and RoBERTa-base with LoRA on
their queries. ``random_weights`` needs no download, to try the code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models
from transformers import (
    AutoTokenizer,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from bayes_kf.models.zoo import quiet_transformers
from benchmarks.bench.networks.base import (
    IMAGENET_MEAN,
    IMAGENET_SD,
    Network,
    Request,
    adapted,
    drawn,
    fresh,
    images,
    named,
)
from benchmarks.common.backbones import Normalized
from benchmarks.common.text import MAX_TOKENS, tokenized

SIDE = 224
DINO, ROBERTA = "facebook/dino-vitb16", "FacebookAI/roberta-base"


class Enlarged(nn.Module):
    """A network whose images are resized to 224 pixels."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Any:
        """Its outputs for (B, 3, H, W)."""
        size = (SIDE, SIDE)
        return self.network(F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=True))


def downloaded(name: str, load: Callable[[], Any]) -> Any:
    """The result of ``load``, or one sentence if weights are missing.

    Raises:
        FileNotFoundError: if the weights are not on this machine and cannot be downloaded.
    """
    try:
        with quiet_transformers():
            return load()
    except OSError as error:  # urllib's and huggingface_hub's errors are
        raise FileNotFoundError(
            f"`--backbone` {name} needs weights that its library downloads, or `--random-weights`, got"
            f" {type(error).__name__}: {str(error).splitlines()[0].rstrip('.')}."
        ) from error


def _torchvision(name: str, head: str) -> Callable[[Request], nn.Module]:
    def build(request: Request) -> nn.Module:
        if request.random_weights:
            bare = drawn(lambda: models.get_model(name), request)
        else:
            bare = downloaded(name, lambda: models.get_model(name, weights="DEFAULT"))
        base = Normalized(Enlarged(bare), IMAGENET_MEAN, IMAGENET_SD)
        fresh(base, f"network.network.{head}", request)
        return adapted(base, named(base, "", nn.Conv2d), f"network.network.{head}", request)

    return build


def _vit(request: Request) -> nn.Module:
    if request.random_weights:
        bare = drawn(lambda: ViTForImageClassification(ViTConfig(num_labels=request.classes)), request)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(request.seed)
            bare = downloaded(
                "vit_b_16", lambda: ViTForImageClassification.from_pretrained(DINO, num_labels=request.classes)
            )
    base = Normalized(Enlarged(bare), IMAGENET_MEAN, IMAGENET_SD)
    targets = named(base, r"attention.*\.(query|q_proj)")
    return adapted(base, targets, "network.network.classifier", request)


def _roberta(request: Request) -> nn.Module:
    if request.random_weights:
        small = RobertaConfig(  # MiniLM's vocabulary, whose tokenizer is installed
            vocab_size=30_522,
            pad_token_id=0,
            max_position_embeddings=514,
            type_vocab_size=1,
            num_labels=request.classes,
        )
        base = drawn(lambda: RobertaForSequenceClassification(small), request)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(request.seed)
            base = downloaded(
                "roberta-base",
                lambda: RobertaForSequenceClassification.from_pretrained(ROBERTA, num_labels=request.classes),
            )
    return adapted(base, named(base, r"attention\.self\.query"), "classifier", request)


def _roberta_tokens(texts: Sequence[Any]) -> dict[str, Tensor]:
    """RoBERTa's own tokens."""
    tokenizer = downloaded("roberta-base", lambda: AutoTokenizer.from_pretrained(ROBERTA))
    tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}


LARGE: dict[str, Network] = {
    "densenet121": Network(("conv", "weights"), _torchvision("densenet121", "classifier"), images(3, 32)),
    "resnet18": Network(("conv", "weights"), _torchvision("resnet18", "fc"), images(3, 32)),
    "vit_b_16": Network(("lora", "dora", "weights"), _vit, images(3, 32)),
    "roberta-base": Network(
        ("lora", "dora", "weights"), _roberta, _roberta_tokens, texts=True, prepare_random=tokenized
    ),
}
