"""Filters and batches that one process and several must treat alike."""

from __future__ import annotations

import dataclasses

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from bayes_kf import KalmanConfig
from bayes_kf.models.likelihood import LIKELIHOODS, NUMERIC


def network():
    """A small network with a bias, a narrow layer and a head, float64."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double()


def wide():
    """More outputs than features: the Jacobian goes through the head."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 40)).double()


def tied():
    """A tensor used twice, which takes the general path, and an embedding table."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.twice = nn.Embedding(11, 6), nn.Linear(6, 6)
            self.head = nn.Linear(6, 3)

        def forward(self, tokens):
            hidden = torch.tanh(self.twice(self.table(tokens).mean(1)))
            return self.head(torch.tanh(self.twice(hidden)))

    torch.manual_seed(0)
    return Tied().double()


def new_bert():
    """A small BERT with a head, float64."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    return BertForSequenceClassification(config).double()


def with_lora(model):
    """A BERT with LoRA that has no effect yet, beside its head."""
    asked = LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["query", "value"])
    return get_peft_model(model, asked).eval()


def new_lora():
    """A small BERT with LoRA that has no effect yet and a head, float64."""
    return with_lora(new_bert())


def lora():
    """The same with other factors."""
    actual = new_lora()
    with torch.no_grad():
        for name, parameter in actual.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return actual


def numbers(size, generator):
    return torch.randn(size, 5, generator=generator, dtype=torch.float64)


def tokens(size, generator):
    return torch.randint(11, (size, 6), generator=generator)


def texts(size, generator):
    ids = torch.randint(30, (size, 7), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


MODELS = {"network": (network, numbers, 4), "wide": (wide, numbers, 40), "tied": (tied, tokens, 3)}
MODELS |= {"lora": (lora, texts, 3), "new lora": (new_lora, texts, 3)}

PLAIN = KalmanConfig(initial_logit_sd=2.0)
CASES = {
    "low_rank": ("network", PLAIN),
    "low_rank, rank 3, drifting": (
        "network",
        dataclasses.replace(PLAIN, rank=3, forgetting=0.98, drift_variance=1e-3, prior_pull=0.01),
    ),
    "diagonal": ("network", dataclasses.replace(PLAIN, covariance="diagonal")),
    "information": ("network", dataclasses.replace(PLAIN, covariance="diagonal_information")),
    "mixed, gated": ("network", dataclasses.replace(PLAIN, covariance="diagonal_mixed", gate_quantile=0.9)),
    "loko": ("network", KalmanConfig.loko()),
    "gaussian": ("network", dataclasses.replace(PLAIN, likelihood="gaussian", noise_variance="estimated")),
    "student_t": ("network", dataclasses.replace(PLAIN, likelihood="student_t", noise_variance="estimated")),
    "heteroscedastic": ("network", dataclasses.replace(PLAIN, likelihood="heteroscedastic_gaussian")),
    "through the head": ("wide", PLAIN),
    "sampled": ("wide", dataclasses.replace(PLAIN, curvature="sampled")),
    "truncated": ("wide", dataclasses.replace(PLAIN, curvature="truncated", curvature_epsilon=0.2)),
    "tied": ("tied", PLAIN),
    "lora": ("lora", PLAIN),
    "whitened": ("new lora", dataclasses.replace(PLAIN, lora_inputs="whitened")),
    "many rows": ("network", dataclasses.replace(PLAIN, covariance="diagonal", initial_logit_sd=8.0)),
}
SIZES = {"many rows": (70, 41, 3), "truncated": (4, 3, 1, 4)}  # of few rows, see ShardedFilter


def batches(name, seed=1):
    """What is learned: batches of different sizes, the last one smaller than four."""
    model, config = CASES[name]
    _, inputs, outputs = MODELS[model]
    generator = torch.Generator().manual_seed(seed)
    actual = []
    for size in SIZES.get(name, (9, 8, 1, 4, 3)):
        x = inputs(size, generator)
        if config.likelihood in NUMERIC:
            targets = outputs // LIKELIHOODS[config.likelihood].outputs_per_target
            y = torch.randn(size, targets, generator=generator, dtype=torch.float64)
        else:
            y = torch.randint(outputs, (size,), generator=generator)
        actual.append((x, y))
    return actual


def share(inputs, targets, rank, size):
    """A process's examples of a batch: uneven, and none where there are fewer than processes."""
    total, each = len(targets), -(-len(targets) // size)
    where = slice(min(rank * each, total), min((rank + 1) * each, total))
    if where.start == where.stop:
        return None, None
    if isinstance(inputs, dict):
        return {name: values[where] for name, values in inputs.items()}, targets[where]
    return inputs[where], targets[where]
