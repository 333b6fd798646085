"""Pre-trained image networks with LoRA; weights from ``$BAYES_KF_WEIGHTS`` or ../shared/weights.

A vision transformer and residual networks trained on CIFAR-10, and MobileNetV2 trained on ImageNet. Their inputs are
float images (B, 3, H, W) in [0, 1]; each network normalizes them as in its training. The transformer trained on MNIST,
whose weights are in the package, has inputs (B, 1, 28, 28) in [-1, 1].
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import mobilenet_v2

from bayes_kf.models.zoo import digits_vit, lora_digits_vit
from benchmarks.common.data import REPOSITORY
from benchmarks.common.learners import HEAD_SD, draw_classifier


def weights_file(name: str) -> Path:
    """A file of the folder of weights.

    Raises:
        FileNotFoundError: if it does not exist.
    """
    named = os.environ.get("BAYES_KF_WEIGHTS")
    path = (Path(named) if named else REPOSITORY.parent / "shared" / "weights") / name
    if not path.is_file():
        raise FileNotFoundError(f"`BAYES_KF_WEIGHTS` must name a folder that holds {name}, got {path}.")
    return path


class Normalized(nn.Module):
    """A network with normalized inputs, (x − mean) / sd for every channel."""

    def __init__(self, network: nn.Module, mean: tuple[float, ...], sd: tuple[float, ...]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("sd", torch.tensor(sd).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images - self.mean) / self.sd)


class CifarViT(nn.Module):
    """A transformer on patches of 4x4, width 128, six post-norm layers, class token: (B, 3, 32, 32) to (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, 128, 4, 4)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 128))
        self.pos_embed = nn.Parameter(torch.zeros(1, 65, 128))
        layer = nn.TransformerEncoderLayer(128, 8, 256, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.mlp_head = nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 10))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](images).flatten(2).mT
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], 1) + self.pos_embed
        return self.mlp_head(self.transformer(tokens)[:, 0])


class Block(nn.Module):
    """Two convolutions and a shortcut without weights."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        stride = 1 if before == width else 2
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.more = stride, width - before

    def forward(self, x: Tensor) -> Tensor:
        short = x[:, :, :: self.stride, :: self.stride]
        short = F.pad(short, (0, 0, 0, 0, self.more // 2, self.more // 2))
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + short)


class CifarResNet(nn.Module):
    """He et al.'s residual network for CIFAR-10 with ``blocks`` in each of three stages: (B, 3, 32, 32) to (B, 10)."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*[Block(16, 16) for _ in range(blocks)])
        self.layer2 = nn.Sequential(Block(16, 32), *[Block(32, 32) for _ in range(blocks - 1)])
        self.layer3 = nn.Sequential(Block(32, 64), *[Block(64, 64) for _ in range(blocks - 1)])
        self.linear = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(images))))))
        return self.linear(x.mean((2, 3)))


class TensorFlowConv2d(nn.Conv2d):
    """A convolution of stride 2 padded as TensorFlow does: only at the right and below."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


def vit_mnist(seed: int, dropout: float = 0.0, new_classes: bool = False) -> PeftModel:
    """The digit transformer with LoRA of rank 4; its classifier is new if the classes are."""
    model = lora_digits_vit(rank=4, seed=seed)
    for module in model.modules():
        for name, layer in getattr(module, "lora_dropout", {}).items():
            module.lora_dropout[name] = nn.Dropout(dropout) if dropout else layer
    if new_classes:
        draw_classifier(model, seed)
    return model


def vit_mnist_classes(seed: int, dropout: float = 0.0, classes: int = 10) -> PeftModel:
    """The digit transformer with LoRA of rank 4 on queries and values, and a new classifier of ``classes``."""
    base = digits_vit()
    base.classifier = new_head(base.classifier.in_features, classes, seed)
    return _adapted(base, r".*attention\.(query|value|q_proj|v_proj)", "classifier", seed, dropout)


def vit_cifar(seed: int, dropout: float = 0.0) -> PeftModel:
    """The transformer with LoRA of rank 4 on its feed-forward layers; the last layer is trainable."""
    torch.backends.mha.set_fastpath_enabled(False)  # the fast path would ignore LoRA
    network = CifarViT()
    network.load_state_dict(load_file(weights_file("vit-cifar10/vit_cifar10.safetensors")))
    base = Normalized(network, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    return _adapted(base, ["linear1", "linear2"], "mlp_head.1", seed, dropout)


def resnet_cifar(seed: int, dropout: float = 0.0, new_classes: int | None = None) -> PeftModel:
    """ResNet-20 with LoRA of rank 4 on the convolutions of its last stage; the last layer is trainable.

    ``new_classes`` asks for a new last layer of that many classes.
    """
    network = CifarResNet(3)
    network.load_state_dict(load_file(weights_file("resnet-cifar10/resnet20.safetensors")), strict=False)
    if new_classes is not None:
        network.linear = new_head(64, new_classes, seed)
    base = Normalized(network, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return _adapted(base, r".*layer3\.\d\.conv\d", "linear", seed, dropout)


def mobilenet(seed: int, dropout: float = 0.0, num_classes: int = 2) -> PeftModel:
    """MobileNetV2 with LoRA of rank 4 on its last three 1x1 convolutions, and a new classifier."""
    network = mobilenet_v2(norm_layer=nn.Identity)
    tensors = load_file(weights_file("mobilenet-v2-imagenet/mobilenet_v2_1.0_224_int8.safetensors"))
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Conv2d):
            _set(network, name, _convolution(module))
    scales = {k.removesuffix("scale"): v for k, v in tensors.items() if k.endswith("scale")}
    weights = {}
    for key, value in tensors.items():
        if key.endswith("bias"):
            weights[key] = value
        elif key.endswith("weight_int8"):
            scale = scales[key.removesuffix("weight_int8")]
            weights[key.removesuffix("_int8")] = value.float() * scale.view(-1, *[1] * (value.ndim - 1))
    network.load_state_dict(weights)
    network.classifier[1] = new_head(1280, num_classes, seed)
    base = Normalized(network, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return _adapted(base, r".*features\.(17\.conv\.0\.0|17\.conv\.2|18\.0)", "classifier.1", seed, dropout)


def new_head(width: int, classes: int, seed: int) -> nn.Linear:
    """A new classifier whose weights depend on the seed alone, drawn as in transformers."""
    head = nn.Linear(width, classes)
    head.weight.data.copy_(HEAD_SD * torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed)))
    nn.init.zeros_(head.bias)
    return head


def _convolution(old: nn.Conv2d) -> nn.Conv2d:
    """The same convolution with a bias, and with TensorFlow's padding if it has a stride."""
    kind, padding = (TensorFlowConv2d, 0) if old.stride == (2, 2) else (nn.Conv2d, old.padding)
    sizes = (old.in_channels, old.out_channels, old.kernel_size, old.stride)
    return kind(*sizes, padding=padding, groups=old.groups, bias=True)


def _set(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, module)


def _adapted(base: nn.Module, targets: list[str] | str, head: str, seed: int, dropout: float) -> PeftModel:
    torch.manual_seed(seed)
    lora = LoraConfig(r=4, lora_alpha=4, lora_dropout=dropout, target_modules=targets, modules_to_save=[head])
    model = get_peft_model(base, lora)
    assert isinstance(model, PeftModel)  # get_peft_model returns a mixed model only if mixed=True
    return model.eval()
