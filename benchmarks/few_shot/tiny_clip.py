"""A CLIP in miniature trained on Fashion-MNIST, of ``$BAYES_KF_WEIGHTS`` (or ../shared/weights): tiny-clip-fashion.

66 thousand parameters with an architecture of its own (caohuythinh2005/self_study); its two encoders are called as
CLIPModel's are, so that ``ClipClassifier`` takes it. Images are grey, (B, 1, 28, 28), in [0, 1]; tokens are bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.common.backbones import weights_file

CAPTIONS = (
    "An image of a t-shirt/top",
    "An image of trousers",
    "An image of a pullover",
    "An image of a dress",
    "An image of a coat",
    "An image of a sandal",
    "An image of a shirt",
    "An image of a sneaker",
    "An image of a bag",
    "An image of an ankle boot",
)
TOKENS, START, END = 32, 2, 3  # length of every text, and the marks at its ends


class Head(nn.Module):
    """One attention head."""

    def __init__(self, width: int, own: int) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(width, own), nn.Linear(width, own), nn.Linear(width, own)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x), attn_mask=mask)


class Attention(nn.Module):
    """Heads side by side."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(width, width // heads) for _ in range(heads))
        self.W_o = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.W_o(torch.cat([head(x, mask) for head in self.heads], -1))


class Block(nn.Module):
    """A pre-norm layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mha = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.mha(self.ln1(x), mask)
        return x + self.mlp(self.ln2(x))


class Positions(nn.Module):
    """What is added to the tokens."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.register_buffer("pe", torch.zeros(1, length, width))


class ImageEncoder(nn.Module):
    """Four patches of 14x14 and a class token: (B, 1, 28, 28) to (B, 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear_project = nn.Conv2d(1, 9, 14, 14)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 9))
        self.positional_embedding = Positions(5, 9)
        self.encoder = nn.ModuleList(Block(9, 3) for _ in range(3))
        self.projection = nn.Parameter(torch.zeros(9, 32))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.linear_project(images).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], 1) + self.positional_embedding.pe
        for block in self.encoder:
            x = block(x)
        return x[:, 0] @ self.projection


class TextEncoder(nn.Module):
    """Bytes to the features of the last of them: (N, 32) tokens to (N, 32) features."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder_embedding = nn.Embedding(256, 32)
        self.positional_embedding = Positions(TOKENS, 32)
        self.encoder = nn.ModuleList(Block(32, 8) for _ in range(4))
        self.projection = nn.Parameter(torch.zeros(32, 32))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.encoder_embedding(input_ids) + self.positional_embedding.pe
        mask = attention_mask.bool().unsqueeze(1)  # keys beyond the text are not seen
        for block in self.encoder:
            x = block(x, mask)
        last = attention_mask.sum(1) - 1
        return x[torch.arange(len(x)), last] @ self.projection


class TinyClip(nn.Module):
    """Both encoders, called as CLIPModel's are."""

    def __init__(self) -> None:
        super().__init__()
        self.image_encoder, self.text_encoder = ImageEncoder(), TextEncoder()
        self.temperature = nn.Parameter(torch.zeros(()))

    @property
    def logit_scale(self) -> Tensor:
        """Log of the factor on cosines."""
        return self.temperature

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Features (B, 32)."""
        return self.image_encoder(pixel_values)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Features (N, 32)."""
        return self.text_encoder(input_ids, attention_mask)


def byte_tokens(texts: Sequence[str], padding: bool = True, return_tensors: str = "pt") -> dict[str, Tensor]:
    """Texts as bytes between marks, padded with zeros to 32, as transformers' tokenizers return them."""
    rows = [[START, *text.encode(), END] for text in texts]
    if max(len(row) for row in rows) > TOKENS:
        raise ValueError(f"`texts` must have at most {TOKENS - 2} bytes, got {max(len(row) for row in rows) - 2}.")
    ids = torch.tensor([row + [0] * (TOKENS - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def tiny_clip() -> TinyClip:
    """The trained model, frozen, in evaluation mode."""
    model = TinyClip()
    model.load_state_dict(load_file(weights_file("tiny-clip-fashion/clip.safetensors")))
    return model.requires_grad_(False).eval()
