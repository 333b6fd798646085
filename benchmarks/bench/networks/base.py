"""What a network of the bench is, and how adapters and new classifiers are put on it.

Everything new (LoRA's A, a new classifier) is drawn from a seed alone, so that all optimizers start alike.
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
LoRA would adapt (for optimizers that are sparse in them), or everything. The classifier is trained along in all."""
RANK = 4
CIFAR_MEAN, CIFAR_SD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
IMAGENET_MEAN, IMAGENET_SD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Request(NamedTuple):
    """What a problem asks of a network.

    Attributes:
        classes: of the problem.
        fresh_head: whether the classifier is drawn afresh.
        adapter: one of :data:`KINDS`.
        seed: of everything that is drawn.
        random_weights: whether the network's own weights are drawn too, instead of loaded.
    """

    classes: int
    fresh_head: bool
    adapter: str
    seed: int
    random_weights: bool = False


class Network(NamedTuple):
    """A network: the kinds of adapters that it takes, how it is built, and its inputs from a problem's raw ones.

    Attributes:
        adapters: of :data:`KINDS`, first the one that rows without a wish get.
        build: from a request to a model in evaluation mode.
        prepare: images (N, C, H, W) in [0, 1], or texts (or pairs of them), as the network takes them.
        texts: whether it reads text.
        prepare_random: in place of ``prepare`` where weights are drawn and nothing may be downloaded; None: the same.
    """

    adapters: tuple[str, ...]
    build: Callable[[Request], nn.Module]
    prepare: Callable[[Any], Inputs]
    texts: bool = False
    prepare_random: Callable[[Any], Inputs] | None = None


def images(channels: int, side: int, scale: float = 1.0, shift: float = 0.0) -> Callable[[Tensor], Tensor]:
    """Images of any number of channels and any side as (N, channels, side, side): scale·x + shift."""

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
    """A network with the asked kind of trainable tensors on the modules named ``targets``, and its classifier ``head``.

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
    pattern = "|".join(re.escape(name) for name in targets)  # a string is matched whole
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=pattern, modules_to_save=[head], use_dora=kind == "dora")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(request.seed)
        return get_peft_model(base, lora).eval()


def named(base: nn.Module, pattern: str, kind: type[nn.Module] = nn.Module) -> list[str]:
    """Names of the modules of a kind whose names end as ``pattern`` says."""
    return [
        name for name, module in base.named_modules() if isinstance(module, kind) and re.search(f"{pattern}$", name)
    ]


def fresh(base: nn.Module, head: str, request: Request) -> None:
    """A new classifier in the place of ``head``, where asked, drawn as transformers does."""
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
    """A module whose weights are drawn from the request's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(request.seed)
        return make()
