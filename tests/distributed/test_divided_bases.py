"""Bases that FSDP or DeepSpeed's ZeRO-3 divides among the processes, as on one process."""

import os

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


def new_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


def with_lora(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


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


def learned_tokens(rank):
    """A fit of text on a base that several processes divide and one has whole."""
    model = with_lora(new_llama())
    if torch.distributed.get_world_size() > 1:
        inner = model.base_model.model.model
        divided(model, (*inner.layers, inner.embed_tokens))
    data = [{"input_ids": ids, "labels": ids} for ids in IDS[:24].split(5)]
    config = bkf.KalmanConfig(likelihood="tokens", curvature="sampled", mean_passes=1)
    posterior = bkf.fit(model, data, config, progress=False)
    return {"mean": posterior.mean_vector, "variance": posterior.variance_vector}


def test_text_on_a_divided_base_ends_as_on_a_whole_one(tmp_path):
    (expected,) = run(1, learned_tokens, tmp_path)
    for found in run(2, learned_tokens, tmp_path):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-8)


def divided_by_zero3(module):
    """The module with all of its tensors divided by DeepSpeed."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=str(torch.distributed.get_rank()))  # as a launcher does
    import deepspeed

    module.requires_grad_(False)
    stages = {"stage": 3, "stage3_param_persistence_threshold": 100}  # smaller tensors stay whole after their first use
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": stages}
    deepspeed.initialize(model=module, config=config, dist_init_required=False)
    assert all(p.numel() == 0 for p in module.parameters() if len(p.ds_shape) == 2 and p.ds_numel > 100)


def fitted_below_zero3(rank, kind, folder):
    """A fit on a base that DeepSpeed divides before it gets its adapter, and that one process has whole."""
    several = torch.distributed.get_world_size() > 1
    model = cases.new_bert() if kind != "tokens" else new_llama()
    if several:
        divided_by_zero3(model.bert if kind != "tokens" else model)
    torch.manual_seed(1)
    if kind == "tokens":
        model, data = with_lora(model), [{"input_ids": ids, "labels": ids} for ids in IDS[:24].split(5)]
        config = bkf.KalmanConfig(likelihood="tokens", curvature="sampled", mean_passes=1)
    else:
        model, data = cases.with_lora(model), TEXTS
        config = None if kind == "default" else bkf.KalmanConfig(rank=4, mean_passes=1)
    posterior = bkf.fit(model, data, config, progress=False)
    best = getattr(posterior, "best", posterior)
    if several:
        posterior.save_pretrained(f"{folder}/saved")
    else:
        posterior.save_pretrained(f"{folder}/whole")
    return {"mean": best.mean_vector, "variance": best.variance_vector}


@pytest.mark.parametrize("kind", ["config", "tokens", pytest.param("default", marks=pytest.mark.slow)])
def test_a_base_below_zero3_ends_as_a_whole_one(kind, tmp_path):
    pytest.importorskip("deepspeed", reason="needs DeepSpeed, which runs a compiler on import: pip install deepspeed")
    (expected,) = run(1, fitted_below_zero3, tmp_path, kind, str(tmp_path))
    for found in run(2, fitted_below_zero3, tmp_path, kind, str(tmp_path)):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-8)
    names = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*"))
    assert sorted(path.relative_to(tmp_path / "saved") for path in (tmp_path / "saved").rglob("*")) == names
    if kind != "tokens":  # the saved base is recognized by its fingerprint
        torch.manual_seed(1)
        saved = bkf.Posterior.from_pretrained(tmp_path / "saved", cases.with_lora(cases.new_bert()))
        torch.testing.assert_close(getattr(saved, "best", saved).mean_vector, found["mean"], rtol=0, atol=0)


def error_of_divided_adapters(rank):
    model = cases.new_lora()
    fully_shard(model)
    with pytest.raises(ValueError, match=r"must have its trainable tensors whole in every process, got .*lora_A"):
        bkf.fit(model, TEXTS, progress=False)
    return {}


def test_adapters_that_are_divided_themselves_are_refused(tmp_path):
    run(2, error_of_divided_adapters, tmp_path)


def checkpointed(rank, folder):
    """A pass on a divided base with checkpoints, which are saved by all."""
    model = cases.new_lora()
    encoder = model.base_model.model.bert
    divided(model, (*encoder.encoder.layer, encoder.embeddings))
    posterior = bkf.fit(model, TEXTS, bkf.KalmanConfig(rank=4), checkpoint=f"{folder}/pass", every=4, progress=False)
    return {"mean": posterior.mean_vector}


def test_a_pass_on_a_divided_base_is_saved_as_it_goes(tmp_path):
    for found in run(2, checkpointed, tmp_path, str(tmp_path)):
        saved = bkf.Posterior.from_pretrained(tmp_path / "pass", cases.new_lora())
        assert torch.equal(saved.mean_vector, found["mean"])
