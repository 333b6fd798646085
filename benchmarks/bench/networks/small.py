"""Small networks whose weights are in the package or in the folder of weights, and the table of all networks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification

from bayes_kf.models.zoo import digits_vit, lenet5, quiet_transformers
from benchmarks.bench.networks.base import (
    CIFAR_MEAN,
    CIFAR_SD,
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
from benchmarks.bench.networks.large import LARGE
from benchmarks.common.backbones import CifarResNet, CifarViT, Normalized, weights_file
from benchmarks.common.text import encoder_folder, tokenized


def _digits_vit(request: Request) -> nn.Module:
    seed = request.seed if request.random_weights else None
    base = digits_vit(not request.random_weights, seed=seed)
    fresh(base, "classifier", request)
    return adapted(base, named(base, r"attention.*\.(query|value|q_proj|v_proj)"), "classifier", request)


def _lenet5(request: Request) -> nn.Module:
    if request.classes != 10:
        raise ValueError(f"`lenet5` has 10 classes, got a problem of {request.classes}.")
    return adapted(lenet5(request.seed), [], "", request)


def _cifar_vit(request: Request) -> nn.Module:
    torch.backends.mha.set_fastpath_enabled(False)  # the fast path would ignore LoRA
    network = drawn(CifarViT, request)
    if not request.random_weights:
        network.load_state_dict(load_file(weights_file("vit-cifar10/vit_cifar10.safetensors")))
    base = Normalized(network, CIFAR_MEAN, CIFAR_SD)
    fresh(base, "network.mlp_head.1", request)
    return adapted(base, named(base, r"layers\.\d\.linear[12]"), "network.mlp_head.1", request)


def _cifar_resnet(blocks: int) -> Callable[[Request], nn.Module]:
    def build(request: Request) -> nn.Module:
        network = drawn(lambda: CifarResNet(blocks), request)
        if not request.random_weights:
            tensors = load_file(weights_file(f"resnet-cifar10/resnet{6 * blocks + 2}.safetensors"))
            network.load_state_dict(tensors, strict=False)  # batch norm's counts are not in the file
        base = Normalized(network, IMAGENET_MEAN, IMAGENET_SD)
        fresh(base, "network.linear", request)
        return adapted(base, named(base, r"layer3\.\d\.conv\d"), "network.linear", request)

    return build


def _minilm(request: Request) -> nn.Module:
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(request.seed)  # of the classifier
        base = AutoModelForSequenceClassification.from_pretrained(
            encoder_folder(), num_labels=request.classes, local_files_only=True
        )
    return adapted(base, named(base, r"attention\.self\.(query|value)"), "classifier", request)


NETWORKS: dict[str, Network] = {
    "digits-vit": Network(("lora", "dora", "weights"), _digits_vit, images(1, 28, 2.0, -1.0)),
    "lenet5": Network(("full",), _lenet5, images(1, 28, 2.0, -1.0)),
    "vit-cifar10": Network(("lora", "dora", "weights"), _cifar_vit, images(3, 32)),
    "resnet20": Network(("conv", "weights"), _cifar_resnet(3), images(3, 32)),
    "resnet56": Network(("conv", "weights"), _cifar_resnet(9), images(3, 32)),
    "minilm": Network(("lora", "dora", "weights"), _minilm, tokenized, texts=True),
    **LARGE,
}


def network(name: str) -> Network:
    """The network of that name.

    Raises:
        ValueError: no network has that name.
    """
    if name not in NETWORKS:
        raise ValueError(f"`--backbone` must be one of {', '.join(NETWORKS)}, got {name!r}.")
    return NETWORKS[name]
