"""Models and batches of ``run.py``: transformers made from configurations, LoRA, a trained classifier.

A seed determines the random weights. Only the last linear layer is trained, by AdamW on the standardized features of a
synthetic task; the standardization is then folded into the layer. A text of class c has one of four words of c in a
share of its places, random words elsewhere, and a length between three quarters of the model's length and all of it. An
image of class c is the picture of c with noise. ``MODELS`` has the strength of the signal, and the number of classes
that the large models are trained on; batches are new draws from those classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

Inputs = dict[str, Tensor]

FIRST_WORD, WORDS_EACH = 100, 4  # words below are special tokens; words that stand for a class
SATURATED = 16.0  # least margin of all training examples, in logits, above which a head is scaled down ...
UNSATURATED = 5.0  # ... to this mean margin
HEAD_STEPS, HEAD_BATCH, HEAD_RATE, HEAD_DECAY = 400, 512, 0.02, 0.05
FEATURE_BATCH = 32


class Batch(NamedTuple):
    """Keyword arguments of the model, and class labels (B,)."""

    inputs: Inputs
    labels: Tensor


class Recipe(NamedTuple):
    """The construction of a model.

    Attributes:
        make: returns a classifier, from the number of outputs.
        rank: of LoRA by default.
        targets: names of the modules that get LoRA.
        task: peft's name of the task, or None.
        length: places of a text, or 0 for images.
        signal: share of a text's places with a word of its class; for images, the sd of the picture over the noise's.
        examples: of each class in the training of the last layer.
        seen: largest number of classes in that training.
    """

    make: Callable[[int], nn.Module]
    rank: int
    targets: list[str]
    task: TaskType | None
    length: int
    signal: float
    examples: int
    seen: int


def _bert_tiny(num_outputs: int) -> nn.Module:
    shape = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
    return BertForSequenceClassification(BertConfig(num_labels=num_outputs, **shape))


def _bert_64(num_outputs: int) -> nn.Module:
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    return BertForSequenceClassification(BertConfig(num_labels=num_outputs, **shape))


def _vit(num_outputs: int) -> nn.Module:
    return ViTForImageClassification(ViTConfig(num_labels=num_outputs))


def _roberta(num_outputs: int) -> nn.Module:
    return RobertaForSequenceClassification(RobertaConfig(num_labels=num_outputs))


MODELS: dict[str, Recipe] = {
    "bert-64": Recipe(_bert_64, 4, ["query", "value"], TaskType.SEQ_CLS, 16, 0.7, examples=16, seen=1000),
    "bert-tiny": Recipe(_bert_tiny, 8, ["query", "value"], TaskType.SEQ_CLS, 32, 0.5, examples=16, seen=1000),
    "vit-b16": Recipe(_vit, 8, ["q_proj"], None, 0, 1.5, examples=8, seen=8),
    "roberta-base": Recipe(_roberta, 4, ["query", "value"], TaskType.SEQ_CLS, 64, 0.3, examples=8, seen=16),
}


def build(name: str, num_outputs: int, rank: int | None = None, *, seed: int = 0) -> PeftModel:
    """A model in evaluation mode with trainable LoRA, both factors drawn, and classifier."""
    recipe = MODELS[name]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(seed)
        config = LoraConfig(
            r=rank or recipe.rank,
            target_modules=recipe.targets,
            modules_to_save=["classifier"],
            task_type=recipe.task,
            init_lora_weights=False,
        )
        return get_peft_model(recipe.make(num_outputs), config).eval()


def draw(name: str, labels: Tensor, generator: torch.Generator) -> Batch:
    """Examples of the task with these labels; texts have a tokenizer's mask."""
    recipe = MODELS[name]
    return _texts(recipe, labels, generator) if recipe.length else _images(recipe, labels, generator)


def batch(name: str, num_outputs: int, size: int, *, seed: int = 1) -> Batch:
    """New examples of the classes in the model's training."""
    generator = torch.Generator().manual_seed(seed)
    seen = min(num_outputs, MODELS[name].seen)
    return draw(name, torch.randint(seen, (size,), generator=generator), generator)


def _texts(recipe: Recipe, labels: Tensor, generator: torch.Generator) -> Batch:
    size, length, vocabulary = len(labels), recipe.length, 30_000
    own = torch.randint(WORDS_EACH, (size, length), generator=generator) + WORDS_EACH * labels[:, None]
    words = FIRST_WORD + own % (vocabulary - FIRST_WORD)
    other = torch.randint(FIRST_WORD, vocabulary, (size, length), generator=generator)
    ids = torch.where(torch.rand(size, length, generator=generator) < recipe.signal, words, other)
    ids[:, 0] = 2  # the special token that the classifier looks at
    lengths = torch.randint(3 * length // 4, length + 1, (size, 1), generator=generator)
    lengths[0] = length  # a tokenizer pads to the longest
    mask = (torch.arange(length) < lengths).long()
    pad = 1  # RoBERTa counts places by it; for BERT any masked word is as good
    return Batch({"input_ids": torch.where(mask.bool(), ids, pad), "attention_mask": mask}, labels)


def _images(recipe: Recipe, labels: Tensor, generator: torch.Generator) -> Batch:
    pictures = [torch.randn(1, 3, 14, 14, generator=torch.Generator().manual_seed(int(c))) for c in labels]
    clean = F.interpolate(torch.cat(pictures), size=224, mode="nearest")
    return Batch({"pixel_values": clean + torch.randn(clean.shape, generator=generator) / recipe.signal}, labels)


def last_layer(model: nn.Module, num_outputs: int) -> nn.Linear:
    """The trainable linear layer of the outputs."""
    layers = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad and module.out_features == num_outputs
    ]
    return layers[-1]


def train_head(name: str, model: PeftModel, num_outputs: int, device: torch.device, *, seed: int = 2) -> float:
    """Train the last layer in place; its mean log loss on the last 20 training batches."""
    generator = torch.Generator().manual_seed(seed)
    recipe, layer = MODELS[name], last_layer(model, num_outputs)
    labels = torch.arange(min(num_outputs, recipe.seen)).repeat(recipe.examples)
    inputs = _features(model, layer, draw(name, labels, generator), device)
    mean, sd = inputs.mean(0), inputs.std(0) + 1e-6
    inputs, labels = (inputs - mean) / sd, labels.to(device)
    weight = torch.zeros_like(layer.weight).requires_grad_(True)
    bias = torch.zeros_like(layer.bias).requires_grad_(True)
    optimizer = torch.optim.AdamW([weight, bias], lr=HEAD_RATE, weight_decay=HEAD_DECAY)
    losses = []
    for _ in range(HEAD_STEPS):
        rows = torch.randint(len(labels), (min(HEAD_BATCH, len(labels)),), generator=generator).to(device)
        loss = F.cross_entropy(F.linear(inputs[rows], weight, bias), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    with torch.no_grad():
        margins = F.linear(inputs, weight, bias).topk(2).values.diff().abs()
        if float(margins.min()) > SATURATED:  # float32 would leave no gradient for a step to follow
            shrink = UNSATURATED / margins.mean()
            weight, bias = weight * shrink, bias * shrink
        layer.weight.copy_(weight / sd)
        layer.bias.copy_(bias - (weight / sd) @ mean)
    return torch.stack(losses[-20:]).mean().item()


@torch.no_grad()
def _features(model: nn.Module, layer: nn.Linear, examples: Batch, device: torch.device) -> Tensor:
    """Inputs of a layer, (N, in)."""
    taken: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0].clone()))
    try:
        for start in range(0, len(examples.labels), FEATURE_BATCH):
            part = {key: value[start : start + FEATURE_BATCH].to(device) for key, value in examples.inputs.items()}
            model(**part)
    finally:
        handle.remove()
    return torch.cat(taken)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> trainable tensor."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def to_device(examples: Batch, device: torch.device) -> Batch:
    """The batch on a device."""
    return Batch({key: value.to(device) for key, value in examples.inputs.items()}, examples.labels.to(device))


def logits(model: nn.Module, inputs: Any) -> Tensor:
    """The model's outputs, (B, m)."""
    return model(**inputs).logits
