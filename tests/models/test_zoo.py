"""The bundled transformer, its LoRA form, and LeNet-5."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from bayes_kf.data import uci_digits
from bayes_kf.models.zoo import DIGITS_VIT, digits_vit, lenet5, lora_digits_vit

WEIGHTS = DIGITS_VIT / "model.safetensors"


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def accuracy(model, images, labels):
    return (model(images).logits.argmax(-1) == labels).float().mean().item()


def test_bundled_model_is_small_quiet_and_ready(capfd):
    model = digits_vit()
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    assert sum(p.numel() for p in model.parameters()) == 139_018
    assert sum(file.stat().st_size for file in DIGITS_VIT.iterdir()) < 2 * 2**20
    assert capfd.readouterr() == ("", "")


def test_bundled_model_reads_another_populations_digits():
    """Measured 0.5748: a shift to learn from, not a failure; the margin is for other machines' arithmetic."""
    assert accuracy(digits_vit(), *uci_digits()) == pytest.approx(0.5748, abs=0.005)


def test_bundled_model_opens_as_a_hugging_face_folder():
    images = uci_digits().images[:5]
    with torch.no_grad():
        theirs = AutoModelForImageClassification.from_pretrained(DIGITS_VIT)(images).logits
        torch.testing.assert_close(theirs, digits_vit()(images).logits, rtol=0, atol=0)


def test_weights_say_how_they_were_made():
    with safe_open(WEIGHTS, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["mnist_test"])["accuracy"] >= 0.985
    assert json.loads(metadata["settings"])["seed"] == 0


def test_outputs_do_not_depend_on_the_rest_of_the_batch():
    images, model = uci_digits().images[:4], digits_vit()
    with torch.no_grad():
        alone = torch.cat([model(image[None]).logits for image in images])
        torch.testing.assert_close(model(images).logits, alone, rtol=1e-4, atol=1e-4)


def test_weights_from_a_folder_or_a_file():
    expected = digits_vit().state_dict()
    for weights in (DIGITS_VIT, str(WEIGHTS)):
        for name, tensor in digits_vit(weights=weights).state_dict().items():
            assert torch.equal(tensor, expected[name])


def test_fresh_model_follows_its_seed_and_leaves_the_generator_alone():
    before = torch.get_rng_state()
    first, again, other = (digits_vit(pretrained=False, seed=seed).classifier.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_missing_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`weights` must be a safetensors file or a folder .* got .*nowhere"):
        digits_vit(weights=tmp_path / "nowhere")


def test_pickled_weights_are_refused(tmp_path):
    torch.save(digits_vit().state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"`weights` must be a safetensors file, got .*model.pt"):
        digits_vit(weights=tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.pop("classifier.bias"), "missing_keys: classifier.bias"),
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected_keys: extra"),
        (lambda t: t.update({"classifier.bias": torch.zeros(3)}), "mismatched_keys: .*classifier.bias"),
    ],
)
def test_weights_of_another_architecture(tmp_path, change, problem):
    tensors = load_file(WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"`weights` must hold this architecture's tensors, got {problem}"):
        digits_vit(weights=tmp_path)


def test_weights_without_pretrained():
    with pytest.raises(ValueError, match=r"`weights` must be None if `pretrained` is False, got here"):
        digits_vit(pretrained=False, weights="here")


@pytest.mark.parametrize(("options", "count"), [({}, 4_746), ({"train_head": False}, 4_096), ({"rank": 8}, 8_842)])
def test_lora_trains_the_adapter_and_the_head_only(options, count):
    parameters = trainable(lora_digits_vit(**options))
    assert sum(p.numel() for p in parameters.values()) == count
    assert all("lora_" in name or "modules_to_save" in name for name in parameters)


@pytest.mark.parametrize("use_dora", [False, True])
def test_lora_starts_as_the_frozen_model_and_learns(use_dora):
    images, labels = uci_digits()
    model = lora_digits_vit(use_dora=use_dora)
    with torch.no_grad():
        torch.testing.assert_close(model(images[:8]).logits, digits_vit()(images[:8]).logits, rtol=1e-4, atol=1e-4)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(model(images[:64]).logits, labels[:64])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_lora_follows_its_seed_and_leaves_the_generator_alone():
    before = torch.get_rng_state()
    first, again, other = (
        torch.cat([p.flatten() for n, p in trainable(lora_digits_vit(seed=seed)).items() if "lora_A" in n])
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_lora_targets_by_name():
    names = trainable(lora_digits_vit(targets=["fc1"], train_head=False))
    assert len(names) == 8
    assert all(".fc1." in name for name in names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "`rank` must be at least 1, got 0"),
        ({"alpha": -1.0}, "`alpha` must be positive, got -1.0"),
        ({"targets": ["nothing"]}, "No modules were targeted"),
    ],
)
def test_lora_errors(options, message):
    with pytest.raises(ValueError, match=message):
        lora_digits_vit(**options)


INITS = ["xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal"]


@pytest.mark.parametrize("init", INITS)
def test_lenet5_has_the_papers_size_and_the_rules_spread(init):
    model = lenet5(seed=0, init=init)
    assert sum(p.numel() for p in model.parameters()) == 61_706
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    weight = model[7].weight  # (120, 400): 48,000 draws, so the standard deviation is known to 0.4 %
    expected = (2 / 520) ** 0.5 if init.startswith("xavier") else (2 / 400) ** 0.5
    assert weight.std().item() == pytest.approx(expected, rel=0.02)
    bounded = weight.abs().max().item() <= 3**0.5 * expected * 1.001
    assert bounded == init.endswith("uniform")
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith("bias"))


def test_lenet5_follows_its_seed():
    assert torch.equal(lenet5(seed=3)[0].weight, lenet5(seed=3)[0].weight)
    assert not torch.equal(lenet5(seed=3)[0].weight, lenet5(seed=4)[0].weight)


def test_lenet5_unknown_init():
    with pytest.raises(ValueError, match=r"`init` must be one of xavier_uniform, .*, got 'zeros'"):
        lenet5(init="zeros")
