"""Networks of the bench, with adapters and new classifiers.

New tensors (LoRA's A, a new classifier) depend only on a seed, so that all optimizers have the same start.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.common.learners import HEAD_SD, Inputs

KINDS = ("lora", "dora", "conv", "weights", "full")
"""Trainable tensors: LoRA or DoRA on linear layers, LoRA on convolutions, the weights themselves of the layers that
LoRA would adapt (for sparse optimizers), or all parameters. The classifier is trainable in all kinds."""
RANK = 4
CIFAR_MEAN, CIFAR_SD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
IMAGENET_MEAN, IMAGENET_SD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Request(NamedTuple):
    """The network that a problem needs.

    Attributes:
        classes: their number.
        fresh_head: whether the classifier is new.
        adapter: one of :data:`KINDS`.
        seed: of all random tensors.
        random_weights: whether the network's own weights are random, too.
    """

    classes: int
    fresh_head: bool
    adapter: str
    seed: int
    random_weights: bool = False


class Network(NamedTuple):
    """A network: its kinds of adapters, its constructor, and the function that prepares its inputs.

    Attributes:
        adapters: of :data:`KINDS`, the default first.
        build: returns a model in evaluation mode for a request.
        prepare: makes inputs of images (N, C, H, W) in [0, 1], or of texts or pairs of texts.
        texts: whether inputs are texts.
        prepare_random: in the place of ``prepare`` for random weights, without downloads; None: the same.
    """

    adapters: tuple[str, ...]
    build: Callable[[Request], nn.Module]
    prepare: Callable[[Any], Inputs]
    texts: bool = False
    prepare_random: Callable[[Any], Inputs] | None = None


def images(channels: int, side: int, scale: float = 1.0, shift: float = 0.0) -> Callable[[Tensor], Tensor]:
    """A function that maps images of any size and number of channels to (N, channels, side, side): scale·x + shift."""

    def prepare(raw: Tensor) -> Tensor:
        if raw.shape[1] != channels:
            raw = raw.mean(1, keepdim=True).expand(-1, channels, -1, -1)
        more = side - raw.shape[-1]
        if more < 0:
            raw = F.interpolate(raw, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
        elif more:
            raw = F.pad(raw, (more // 2, more - more // 2, more // 2, more - more // 2))
        return (scale * raw + shift).contiguous()

    return prepare


def adapted(base: nn.Module, targets: Sequence[str], head: str, request: Request) -> nn.Module:
    """A network with trainable tensors of the requested kind on the modules ``targets``, and a trainable ``head``.

    Raises:
        ValueError: for an unknown kind.
    """
    kind = request.adapter
    if kind not in KINDS:
        raise ValueError(f"`adapter` must be one of {', '.join(KINDS)}, got {kind!r}.")
    if kind == "full":
        return base.requires_grad_(True).eval()
    if kind == "weights":
        base.requires_grad_(False)
        for name in targets:
            base.get_submodule(name).weight.requires_grad_(True)
        base.get_submodule(head).requires_grad_(True)
        return base.eval()
    pattern = "|".join(re.escape(name) for name in targets)  # PEFT matches a string as a whole
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=pattern, modules_to_save=[head], use_dora=kind == "dora")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(request.seed)
        return get_peft_model(base, lora).eval()


def named(base: nn.Module, pattern: str, kind: type[nn.Module] = nn.Module) -> list[str]:
    """Names of the modules of a class whose names end with a match of ``pattern``."""
    return [
        name for name, module in base.named_modules() if isinstance(module, kind) and re.search(f"{pattern}$", name)
    ]


def fresh(base: nn.Module, head: str, request: Request) -> None:
    """Replace the classifier ``head`` if the request needs a new one, drawn as in transformers."""
    old = base.get_submodule(head)
    assert isinstance(old, nn.Linear)
    if not request.fresh_head and old.out_features == request.classes:
        return
    new = nn.Linear(old.in_features, request.classes)
    generator = torch.Generator().manual_seed(request.seed)
    new.weight.data.copy_(HEAD_SD * torch.randn(new.weight.shape, generator=generator))
    nn.init.zeros_(new.bias)
    parent, _, own = head.rpartition(".")
    setattr(base.get_submodule(parent), own, new)


def drawn(make: Callable[[], nn.Module], request: Request) -> Any:
    """A module with random weights of the request's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(request.seed)
        return make()
