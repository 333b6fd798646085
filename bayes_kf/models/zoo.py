"""Small networks for examples and tests: a bundled vision transformer for digits, with LoRA or without; LeNet-5."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import ViTConfig, ViTForImageClassification
from transformers.utils import logging

from bayes_kf.validation import check_one_of

DIGITS_VIT = Path(__file__).parent / "weights" / "digits_vit"
"""Folder of the bundled transformer, in the Hugging Face layout (config, weights, image preprocessing)."""

_LOADING_PROBLEMS = ("missing_keys", "unexpected_keys", "mismatched_keys")

LeNetInit = Literal["xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal"]

_LENET_INITS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "kaiming_uniform": lambda weight: nn.init.kaiming_uniform_(weight, nonlinearity="relu"),
    "kaiming_normal": lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"),
}


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Inside, random numbers come from `seed` and the global generator is unchanged; None uses the global generator."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators too
        yield


def digits_vit_config() -> ViTConfig:
    """Configuration of the bundled transformer: 28x28 grey, 16 patches of 7x7, width 64, 4 layers, 4 heads."""
    return ViTConfig(
        image_size=28,
        patch_size=7,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label={digit: str(digit) for digit in range(10)},
        label2id={str(digit): digit for digit in range(10)},
    )


def digits_vit(
    pretrained: bool = True, *, weights: str | os.PathLike[str] | None = None, seed: int | None = None
) -> ViTForImageClassification:
    """A small vision transformer for handwritten digits, in evaluation mode, with weights trained on MNIST.

    `scripts/train_backbone.py` made the bundled weights; the metadata of the weights file has its settings and scores.
    Inputs are float (B, 1, 28, 28), white ink on black, (grey / 255 - 0.5) / 0.5.

    Args:
        pretrained: False gives a fresh initialization, and then `weights` must be None.
        weights: a safetensors file, or a folder with `model.safetensors`, to read instead of the bundled weights.
        seed: of the fresh initialization; None draws from the global generator.

    Returns:
        A model whose outputs have `.logits` (B, 10).

    Raises:
        FileNotFoundError: `weights` does not exist.
        ValueError: `weights` is not a safetensors file of this architecture, or is given with `pretrained=False`.

    Example:
        >>> model = digits_vit()
        >>> model(torch.zeros(2, 1, 28, 28)).logits.shape
        torch.Size([2, 10])
    """
    if pretrained:
        return _load_digits_vit(Path(DIGITS_VIT if weights is None else weights))
    if weights is not None:
        raise ValueError(f"`weights` must be None if `pretrained` is False, got {weights}.")
    with _seeded(seed):
        return ViTForImageClassification(digits_vit_config()).eval()


def _load_digits_vit(path: Path) -> ViTForImageClassification:
    """The digit transformer with the tensors of a safetensors file, which must have its names and shapes."""
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"`weights` must be a safetensors file or a folder with model.safetensors, got {path}.")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"`weights` must be a safetensors file, got {file}: {error}.") from error
    with quiet_transformers():
        loaded: Any = ViTForImageClassification.from_pretrained(  # knows the names of older and newer releases
            None, config=digits_vit_config(), state_dict=tensors, output_loading_info=True, ignore_mismatched_sizes=True
        )
    model, info = loaded
    problems = [f"{kind}: {sorted(map(str, info[kind]))[0]}" for kind in _LOADING_PROBLEMS if info[kind]]
    if problems:
        raise ValueError(f"`weights` must hold this architecture's tensors, got {'; '.join(problems)} in {file}.")
    return cast(ViTForImageClassification, model.eval())


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Inside, transformers shows no progress bar or loading report; afterwards its settings are restored."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def lora_digits_vit(
    rank: int = 4,
    *,
    targets: Sequence[str] | None = None,
    alpha: float | None = None,
    train_head: bool = True,
    pretrained: bool = True,
    weights: str | os.PathLike[str] | None = None,
    use_dora: bool = False,
    seed: int = 0,
) -> PeftModel:
    """The digit transformer with a LoRA adapter on its attention, in evaluation mode.

    Each target W becomes W + (alpha / rank) B A. B is zero at first, so the outputs are those of the frozen model. At
    rank 4 on queries and values, 4,096 numbers are trainable; 4,746 with the head.

    Args:
        rank: of B A.
        targets: names of the modules to adapt; None means the attention's queries and values.
        alpha: scale of the adapter; None means `rank`, a scale of 1.
        train_head: also train a copy of the classifier (PEFT's `modules_to_save`).
        pretrained: as for `digits_vit`.
        weights: as for `digits_vit`.
        use_dora: adds DoRA's magnitudes.
        seed: of the adapter's A, and of the base if `pretrained` is False.

    Returns:
        A PEFT model; only the adapter, and the head if asked, require gradients.

    Raises:
        ValueError: `rank` or `alpha` is not positive, or PEFT finds no module of `targets`.

    Example:
        >>> model = lora_digits_vit(rank=4)
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        4746
    """
    if rank < 1:
        raise ValueError(f"`rank` must be at least 1, got {rank}.")
    if alpha is not None and not alpha > 0:
        raise ValueError(f"`alpha` must be positive, got {alpha}.")
    base = digits_vit(pretrained, weights=weights, seed=None if pretrained else seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type]  # PEFT divides, a float serves
        lora_dropout=0.0,
        target_modules=_queries_and_values(base) if targets is None else list(targets),
        modules_to_save=["classifier"] if train_head else None,
        use_dora=use_dora,
    )
    with _seeded(seed):
        model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)  # a mixed model needs mixed=True
    return model.eval()


def _queries_and_values(model: nn.Module) -> list[str]:
    """The names of the query and value projections in this release of transformers."""
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return ["query", "value"] if "query" in names else ["q_proj", "v_proj"]


class LeNet5(nn.Sequential):
    """LeNet-5 with ReLU and max-pooling, 61,706 parameters: (B, 1, 28, 28) to logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 6, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),  # (B, 6, 14, 14)
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),  # (B, 16, 5, 5)
            nn.Flatten(),
            nn.Linear(400, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, 10),
        )


def lenet5(seed: int | None = None, *, init: LeNetInit = "xavier_uniform") -> LeNet5:
    """A new LeNet-5, as in the LoKO paper's online experiments; its biases are zero.

    Args:
        seed: of the initialization; None draws from the global generator.
        init: rule for the weights: xavier_uniform, xavier_normal, kaiming_uniform or kaiming_normal (fan-in, ReLU).

    Returns:
        A network from (B, 1, 28, 28) to logits (B, 10).

    Raises:
        ValueError: `init` is not one of the four.

    Example:
        >>> sum(p.numel() for p in lenet5(seed=0).parameters())
        61706
    """
    check_one_of("init", init, _LENET_INITS)
    with _seeded(seed):
        model = LeNet5()
        for name, parameter in model.named_parameters():
            if name.endswith("weight"):
                _LENET_INITS[init](parameter.data)
            else:
                nn.init.zeros_(parameter)
    return model
