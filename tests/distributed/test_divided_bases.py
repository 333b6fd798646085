"""Bases that FSDP divides among the processes, below adapters that every process has: as on one process."""

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import bayes_kf as bkf

from . import cases
from .processes import run

IDS = torch.randint(30, (66, 7), generator=torch.Generator().manual_seed(0))
LABELS = IDS[:, 0] % 3
TEXTS = [  # the last one has three examples
    ({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels)
    for ids, labels in zip(IDS.split(7), LABELS.split(7), strict=True)
]


def divided(model, layers):
    """The model with the parameters of its base divided, and its trainable tensors whole."""
    whole = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for layer in layers:
        fully_shard(layer, ignored_params=whole)
    return model


def language_model():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    asked = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(config).double(), asked)


def fitted(rank, kind, folder):
    """A fit on a base that several processes divide and one has whole."""
    model, several = cases.new_lora(), torch.distributed.get_world_size() > 1
    if several:
        encoder = model.base_model.model.bert
        divided(model, (*encoder.encoder.layer, encoder.embeddings))
        assert sum(hasattr(p, "to_local") for p in model.parameters()) > 10
    config = None if kind == "default" else bkf.KalmanConfig(rank=4, mean_passes=1)
    posterior = bkf.fit(model, TEXTS, config, progress=False)
    best = getattr(posterior, "best", posterior)
    if several:
        posterior.save_pretrained(f"{folder}/saved")
    probs = posterior.predict_loader(TEXTS).probs
    return {"mean": best.mean_vector, "variance": best.variance_vector, "probs": probs}


@pytest.mark.parametrize("kind", ["config", pytest.param("default", marks=pytest.mark.slow)])
def test_a_divided_base_ends_as_a_whole_one(kind, tmp_path):
    (expected,) = run(1, fitted, tmp_path, kind, str(tmp_path))
    for found in run(2, fitted, tmp_path, kind, str(tmp_path)):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-8)
    saved = bkf.Posterior.from_pretrained(tmp_path / "saved", cases.new_lora())
    torch.testing.assert_close(getattr(saved, "best", saved).mean_vector, found["mean"], rtol=0, atol=0)


def learning_tokens(rank):
    """The error of a fit of text on a divided base."""
    model = language_model()
    inner = model.base_model.model.model
    divided(model, (*inner.layers, inner.embed_tokens))
    data = [{"input_ids": ids, "labels": ids} for ids in IDS[:24].split(5)]
    try:
        bkf.fit(model, data, bkf.KalmanConfig(likelihood="tokens", curvature="sampled"), progress=False)
    except ValueError as error:
        return {"error": str(error)}
    return {"error": "none"}


def test_text_on_a_divided_base_is_refused(tmp_path):
    for found in run(2, learning_tokens, tmp_path):
        assert found["error"].startswith("`model` must be whole in every process for base_model.model.model.layers.0")
