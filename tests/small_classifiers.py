"""Small text classifiers, their data, and the filter by hand, for the tests of KalmanTrainer."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments, default_data_collator

import bayes_kf as bkf
from bayes_kf.inference.fitting.passes import mean_pass
from bayes_kf.integrations.kalman_trainer import SCALE_EXAMPLES
from bayes_kf.models.batch import split_batch

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 20}


def classifier(labels=3, lora=True, seed=0):
    torch.manual_seed(seed)
    model = BertForSequenceClassification(BertConfig(num_labels=labels, max_position_embeddings=16, **SMALL))
    if not lora:
        return model
    settings = LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS")
    return get_peft_model(model, settings)


def sentences(number, seed=0, labels=3):
    """Whose label is the first token's rest."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 20, (number, 6), generator=g)
    return [
        {"input_ids": t, "attention_mask": torch.ones(6, dtype=torch.long), "labels": int(t[0]) % labels}
        for t in tokens
    ]


class Recorder:
    """A collator that remembers its batches."""

    def __init__(self):
        self.batches = []

    def __call__(self, features):
        batch = default_data_collator(features)
        scaling = len(features) == SCALE_EXAMPLES  # asked for when Trainer has fetched some batches ahead
        self.batches.insert(0 if scaling else len(self.batches), batch)
        return batch


def arguments(folder, **options):
    plain = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "seed": 3,
    }
    return TrainingArguments(str(folder), **(plain | options))


def bits(state):
    return [t for part in state for t in (bits(part) if isinstance(part, tuple) else [part])]


def same(first, second):
    pairs = zip(bits(first), bits(second), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def by_hand(batches, config, epochs=1, model=None):
    """The filter over the recorded batches, whose first was for the prior's scale; then steps of the mean."""
    kf = bkf.KalmanFilter(model or classifier(), config)
    first, rest = batches[0], batches[1:]
    state = kf.init(split_batch(first)[0])
    per_epoch = len(rest) // epochs
    for index, batch in enumerate(rest):
        inputs, targets = split_batch(batch)
        if index < per_epoch:
            state, _ = kf.update(state, inputs, targets)
        else:
            rate = 1.0 - (index / per_epoch - 1.0) / (epochs - 1.0)
            state, _ = mean_pass.natural_gradient_step(config, kf.adapter, state, inputs, targets, rate)
    return state
