"""Folders of PEFT adapters read back onto the base and onto the PEFT model, or are refused."""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import bayes_kf as bkf
from benchmarks.reliability import peft_cases as cases

CONFIG = bkf.KalmanConfig(rank=3, temperature=1.0)
INPUTS, TARGETS = cases.numbers(), torch.arange(6) % 3


def lora(**given):
    return peft.LoraConfig(**({"r": 2, "target_modules": ["2"]} | given))


def fitted(model, inputs=INPUTS):
    return bkf.fit(model, [(inputs, TARGETS)], CONFIG, progress=False)


def equal(one, two, inputs=INPUTS, atol=0.0):
    for method in ("mean", "linearized"):
        actual, expected = (p.predict(inputs, method).probs for p in (one, two))
        torch.testing.assert_close(actual, expected, atol=atol, rtol=0.0)


@pytest.mark.parametrize("name", ["my adapter", "a/b", "a/b/c d", "späße", "weight", "base_layer", "README"])
def test_adapters_and_draws_of_any_name_read_back(name, tmp_path):
    posterior = fitted(peft.get_peft_model(cases.mlp(), lora(), adapter_name=name))
    posterior.save_pretrained(tmp_path / "p")
    assert not [path for path in (tmp_path / "p").iterdir() if path.is_dir()]
    equal(bkf.Posterior.from_pretrained(tmp_path / "p", cases.mlp()), posterior)
    (path,) = posterior.export_adapters(tmp_path / "draws", 1)
    assert sorted(file.name for file in path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("name", ["/tmp/elsewhere", "a//b", "a\\1"])
def test_adapter_names_that_are_no_folder_names_are_refused(name, tmp_path):
    model = peft.get_peft_model(cases.mlp(), lora(), adapter_name=name)
    with pytest.raises(ValueError, match="name can be a folder's"):
        fitted(model)


def two_adapters(active):
    model = peft.get_peft_model(cases.mlp(), lora(), adapter_name="first")
    model.add_adapter("second", lora(init_lora_weights=False))
    model.base_model.set_adapter(active)
    return model


def test_the_second_of_two_adapters_reads_back_onto_the_base(tmp_path):
    posterior = fitted(two_adapters(["second"]))
    posterior.save_pretrained(tmp_path / "p")
    equal(bkf.Posterior.from_pretrained(tmp_path / "p", cases.mlp()), posterior)
    torch.manual_seed(3)  # another first adapter, which is not active
    equal(bkf.Posterior.from_pretrained(tmp_path / "p", two_adapters(["second"])), posterior)


def test_two_active_adapters_are_refused_by_fit():
    with pytest.raises(ValueError, match=r"`model` must have one active adapter, got 'first', 'second'"):
        fitted(two_adapters(["first", "second"]))


def test_trainable_tensors_of_an_inactive_adapter_are_refused():
    model = two_adapters(["first"])
    model.base_model.model[2].lora_A["second"].weight.requires_grad_(True)
    with pytest.raises(ValueError, match="no trainable tensors of adapters that are not active"):
        fitted(model)


def test_buffers_of_batch_norm_read_back(tmp_path):
    model = peft.get_peft_model(cases.picture(), lora(target_modules=["first"], modules_to_save=["norm", "head"]))
    nn.init.normal_(model.base_model.model.norm.modules_to_save["default"].running_mean, std=0.3)  # trained since
    posterior = fitted(model, cases.images())
    posterior.save_pretrained(tmp_path / "p")
    equal(bkf.Posterior.from_pretrained(tmp_path / "p", cases.picture()), posterior, cases.images())
    other = cases.picture()
    other.norm.running_mean.add_(0.1)
    with pytest.raises(ValueError, match="other frozen weights"):
        bkf.Posterior.from_pretrained(tmp_path / "p", other)


def test_another_frozen_projection_is_refused(tmp_path):
    posterior = fitted(peft.get_peft_model(cases.mlp(), peft.VeraConfig(r=4, target_modules=["2"])))
    posterior.save_pretrained(tmp_path / "p")
    equal(bkf.Posterior.from_pretrained(tmp_path / "p", cases.mlp()), posterior)
    path = tmp_path / "p" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "vera_A" in name)
    save_file(tensors | {name: tensors[name] + 0.1}, path)
    (tmp_path / "p" / "SHA256SUMS").unlink()
    base = cases.mlp()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    with pytest.raises(ValueError, match="adapter's frozen tensors"):
        bkf.Posterior.from_pretrained(tmp_path / "p", base)
    assert [type(module) for module in base] == [type(module) for module in cases.mlp()]
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapters_with_changing_initializations_read_back_onto_either_base(init, tmp_path):
    model = peft.get_peft_model(cases.mlp(), lora(init_lora_weights=init))
    left = copy.deepcopy(model).unload()  # the residual base
    assert not torch.equal(left[2].weight, cases.mlp()[2].weight)
    posterior = fitted(model)
    posterior.save_pretrained(tmp_path / "p")
    equal(bkf.Posterior.from_pretrained(tmp_path / "p", left), posterior)
    again = bkf.Posterior.from_pretrained(tmp_path / "p", cases.mlp())
    equal(again, posterior, atol=1e-6)
    again.save_pretrained(tmp_path / "again")
    equal(bkf.Posterior.from_pretrained(tmp_path / "again", cases.mlp()), posterior, atol=1e-6)
    loaded = peft.PeftModel.from_pretrained(cases.mlp(), str(tmp_path / "p")).eval()  # without this package
    torch.testing.assert_close(loaded(INPUTS).softmax(-1), posterior.predict(INPUTS, "mean").probs, atol=1e-6, rtol=0.0)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_base_with_another_initialized_weight_is_refused_and_unchanged(init, tmp_path):
    posterior = fitted(peft.get_peft_model(cases.mlp(), lora(init_lora_weights=init)))
    posterior.save_pretrained(tmp_path / "p")
    base = cases.mlp()
    with torch.no_grad():
        base[2].weight.add_(0.1 * torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
    before, weight = base[2].weight.detach().clone(), base[2].weight
    with pytest.raises(ValueError, match="LoRA's initialization"):
        bkf.Posterior.from_pretrained(tmp_path / "p", base)
    assert base[2].weight is weight
    assert torch.equal(weight, before)
    assert type(base[2]) is nn.Linear
    assert weight.requires_grad


def test_initializations_that_cannot_be_repeated_are_refused(tmp_path):
    model = peft.get_peft_model(cases.mlp(), lora(init_lora_weights="pissa_niter_4"))
    with pytest.raises(ValueError, match="`init_lora_weights` 'pissa_niter_4'"):
        fitted(model)
    base = copy.deepcopy(model).unload()
    model.peft_config["default"].init_lora_weights = True
    posterior = fitted(model)
    posterior.save_pretrained(tmp_path / "p")
    equal(bkf.Posterior.from_pretrained(tmp_path / "p", base), posterior)


def test_lora_on_out_proj_alone_is_refused():
    model = peft.get_peft_model(cases.attention(), lora(target_modules=["attention", "out_proj"]))
    with pytest.raises(ValueError, match="must not have LoRA on `out_proj`"):
        bkf.fit(model, [(cases.sequences(), TARGETS)], CONFIG, progress=False)


def test_exported_prompts_are_the_drawn_ones(tmp_path):
    """PEFT computes the files of a prompt from the model itself."""
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    posterior = fitted(peft.get_peft_model(cases.bert(), config), cases.text())
    (path,) = posterior.export_adapters(tmp_path / "draws", 1, torch.Generator().manual_seed(0))
    draw = posterior.adapter.unflatten(posterior.sample(1, torch.Generator().manual_seed(0))[0])
    (name,) = [name for name in draw if "prompt_encoder" in name]
    torch.testing.assert_close(load_file(path / "adapter_model.safetensors")["prompt_embeddings"], draw[name])
    posterior.save_pretrained(tmp_path / "p")
    equal(bkf.Posterior.from_pretrained(tmp_path / "p", cases.bert()), posterior, cases.text())


def test_a_mixed_model_needs_its_adapters_attached(tmp_path):
    """PEFT saves none, so there is no adapter to put on the bare base."""

    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def mixed():
        torch.manual_seed(1)
        return peft.PeftMixedModel(base(), peft.LoraConfig(r=2, target_modules=["0"]), "first")

    x, y = torch.randn(9, 6), torch.randint(3, (9,))
    posterior = bkf.fit(mixed(), [(x, y)], bkf.KalmanConfig(), progress=False)
    posterior.save_pretrained(tmp_path / "kept")
    with pytest.raises(ValueError, match=r"got one without .*lora_A\.first\.weight; adapters of a PeftMixedModel"):
        bkf.Posterior.from_pretrained(tmp_path / "kept", base())
    again = bkf.Posterior.from_pretrained(tmp_path / "kept", mixed())
    torch.testing.assert_close(again.predict(x).probs, posterior.predict(x).probs, rtol=0.0, atol=0.0)
