"""State files that do not fit their folder are refused with the reason."""

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import bayes_kf as bkf

STATE = "kalman_state.safetensors"


def module():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


@pytest.fixture
def folder(tmp_path):
    kf = bkf.KalmanFilter(module(), bkf.KalmanConfig(initial_variance=0.1, covariance="block_diagonal"))
    bkf.Posterior(kf, kf.init()).save_pretrained(tmp_path)
    return tmp_path


def edit(folder, tensors=None, metadata=None, drop=()):
    """Write the state file again with other tensors and metadata; remove the checksums."""
    path = folder / STATE
    with safe_open(path, framework="pt") as file:
        saved = json.loads(file.metadata()["bayes_kf"])
    values = {name: value for name, value in (saved | (metadata or {})).items() if name not in drop}
    save_file(load_file(path) | (tensors or {}), path, metadata={"bayes_kf": json.dumps(values)})
    (folder / "SHA256SUMS").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"drop": ("step", "scored")},
            r"`folder` must hold a kalman_state\.safetensors with step, scored, got none in",
        ),
        (
            {"tensors": {"prior.mean": torch.full((8,), math.nan)}},
            r"must hold finite tensors, got NaN or infinity in prior",
        ),
        (
            {"tensors": {"prior.mean": torch.zeros(7)}},
            r"prior\.mean is torch\.float32 \(7,\), not torch\.float32 \(8,\)",
        ),
        (
            {"tensors": {"belief.mean": torch.zeros(8).double()}},
            r"belief\.mean is torch\.float64 \(8,\), not torch\.flo",
        ),
        ({"tensors": {"prior.variance": -torch.ones(8)}}, "its variances are not positive"),
        ({"tensors": {"belief.extra": torch.zeros(8)}}, "must hold a state that fits its settings, got .*extra"),
        ({"metadata": {"step": -1}}, r"its counts are \(-1, 0, 0, 0\), not whole numbers"),
        ({"metadata": {"examples": True}}, r"its counts are \(0, True, 0, 0\)"),
        ({"metadata": {"scaled": 1}}, "`scaled` is 1, not true or false"),
        ({"metadata": {"shapes": [[2, 3], [3]]}}, r"`base_model` must have the trainable tensors of .*, got others"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:30],
)
def test_a_state_that_does_not_fit_is_refused(folder, change, message):
    edit(folder, **change)
    with pytest.raises(ValueError, match=message):
        bkf.Posterior.from_pretrained(folder, module())


def test_constants_of_a_structure_are_checked(folder):
    name = next(name for name, value in load_file(folder / STATE).items() if not value.is_floating_point())
    edit(folder, tensors={name: load_file(folder / STATE)[name] + 1})
    with pytest.raises(ValueError, match=rf"{name} is \[.*\], not \["):
        bkf.Posterior.from_pretrained(folder, module())


def lora(base, name="default"):
    return get_peft_model(base, LoraConfig(r=1, target_modules=["0"]), adapter_name=name)


def base():
    return nn.Sequential(module()).requires_grad_(False)


@pytest.fixture
def adapter_folder(tmp_path):
    kf = bkf.KalmanFilter(lora(base()), bkf.KalmanConfig(initial_variance=0.1))
    bkf.Posterior(kf, kf.init()).save_pretrained(tmp_path)
    return tmp_path


def test_a_model_with_another_adapter_is_refused(adapter_folder):
    with pytest.raises(ValueError, match="`base_model` must have no adapter, or the posterior's as the only trainable"):
        bkf.Posterior.from_pretrained(adapter_folder, lora(base(), "another"))


def test_an_adapter_cannot_be_added_without_its_files(adapter_folder):
    (adapter_folder / "adapter_model.safetensors").unlink()
    (adapter_folder / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match=r"must hold adapter_config\.json and adapter_model\.safetensors to add the"):
        bkf.Posterior.from_pretrained(adapter_folder, base())


def test_an_adapter_of_other_shapes_than_its_state_is_refused(adapter_folder):
    with safe_open(adapter_folder / STATE, framework="pt") as file:
        shapes = json.loads(file.metadata()["bayes_kf"])["shapes"]
    edit(adapter_folder, metadata={"shapes": [shape[::-1] for shape in shapes]})
    with pytest.raises(ValueError, match="`folder` must hold the adapter of its posterior, got another in"):
        bkf.Posterior.from_pretrained(adapter_folder, base())
