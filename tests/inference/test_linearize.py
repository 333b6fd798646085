"""Outputs and Jacobians against one plain backward pass per number, in float64, for every kind of layer."""

import pytest
import torch
from oracles import dense_jacobian
from peft import LoraConfig, get_peft_model
from torch import nn

from bayes_kf.inference.linearize import Linearizer
from bayes_kf.inference.observation import Observation
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.zoo import lora_digits_vit


class Shared(nn.Module):
    """One module used twice, one tensor used without its module."""

    def __init__(self):
        super().__init__()
        self.twice, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.rand(6))

    def forward(self, x):
        return self.head(self.twice(torch.tanh(self.twice(x))) * self.scale)


class Packed(nn.Module):
    """Packed query-key-value projection."""

    def __init__(self):
        super().__init__()
        self.attention, self.norm, self.head = (
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.LayerNorm(8),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        return self.head(self.norm(self.attention(x, x, x, need_weights=False)[0]).mean(1))


def conv_net(dilation=2):
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, dilation=dilation, padding=dilation),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(4 * 16, 3),
    )


def lora(model, **kwargs):
    torch.manual_seed(1)
    peft = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, lora_dropout=0.3, **kwargs))
    return peft


CASES = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (6,)),
    "conv, batch norm, dropout": (conv_net, (2, 8, 8)),
    "module used twice, free tensor": (Shared, (6,)),
    "packed projection, layer norm": (Packed, (5, 8)),
    "lora linear": (
        lambda: lora(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), target_modules=["0", "2"]),
        (6,),
    ),
    "lora conv": (lambda: lora(conv_net(dilation=1), target_modules=["3"], modules_to_save=["6"]), (2, 8, 8)),
    "dora": (
        lambda: lora(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), target_modules=["0"], use_dora=True),
        (6,),
    ),
    "dora conv": (lambda: lora(conv_net(dilation=1), target_modules=["3"], use_dora=True), (2, 8, 8)),
}


@pytest.mark.parametrize("batch", [1, 3, 70])
@pytest.mark.parametrize("case", CASES)
def test_jacobian_is_the_dense_one(case, batch):
    make, shape = CASES[case]
    torch.manual_seed(0)
    model = make().double()
    x = torch.randn(batch, *shape, dtype=torch.float64)
    adapter = AdapterModel(model)
    outputs, jacobian = Linearizer(adapter)(adapter.vector(), x)
    expected_outputs, expected = dense_jacobian(model, lambda m: m(x))
    torch.testing.assert_close(outputs, expected_outputs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(jacobian, expected, rtol=1e-10, atol=1e-12)


def test_transformer_with_mapping_inputs_and_zero_b():
    model = lora_digits_vit(rank=4).double()
    x = torch.randn(2, 1, 28, 28, dtype=torch.float64)
    adapter = AdapterModel(model)
    linearize = Linearizer(adapter)
    outputs, jacobian = linearize(adapter.vector(), {"pixel_values": x})
    expected_outputs, expected = dense_jacobian(model, lambda m: m(pixel_values=x).logits)
    torch.testing.assert_close(outputs, expected_outputs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(jacobian, expected, rtol=1e-9, atol=1e-11)
    assert set(linearize.paths().values()) == {"hooks"}


def test_paths_are_measured():
    linearize = Linearizer(AdapterModel(Shared().double()))
    assert set(linearize.paths().values()) == {"not yet known"}
    linearize(linearize.adapter.vector(), torch.randn(2, 6, dtype=torch.float64))
    assert linearize.paths()["scale"] == "general"
    assert linearize.paths()["twice.weight"] == "hooks"


def test_a_tensor_also_used_without_its_module_takes_the_general_path():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return self.inner(x) @ self.inner.weight

    torch.manual_seed(0)
    model = Tied().double()
    x = torch.randn(3, 4, dtype=torch.float64)
    linearize = Linearizer(AdapterModel(model))
    _, jacobian = linearize(linearize.adapter.vector(), x)
    torch.testing.assert_close(jacobian, dense_jacobian(model, lambda m: m(x))[1], rtol=1e-12, atol=1e-12)
    assert linearize.paths() == {"inner.weight": "general"}


def test_bfloat16_base_has_float32_rows():
    model = lora_digits_vit(rank=4)
    model.to(torch.bfloat16)
    adapter = AdapterModel(model)
    outputs, jacobian = Linearizer(adapter)(adapter.vector(), torch.randn(2, 1, 28, 28, dtype=torch.bfloat16))
    assert outputs.dtype == jacobian.dtype == torch.float32
    _, expected = dense_jacobian(model, lambda m: m(torch.zeros(2, 1, 28, 28, dtype=torch.bfloat16)).logits)
    assert jacobian.shape == expected.shape


def test_pieces_cover_a_batch_once(monkeypatch):
    import bayes_kf.inference.linearize as module

    adapter = AdapterModel(nn.Linear(3, 2))
    monkeypatch.setattr(module, "JACOBIAN_BYTES", 2 * 2 * 8 * 4)
    x = torch.randn(5, 3)
    pieces = list(Linearizer(adapter).pieces(adapter.vector(), x))
    assert [len(piece) for _, piece in pieces] == [2, 2, 1]
    torch.testing.assert_close(torch.cat([piece for _, piece in pieces]), x)


def test_observation_products():
    torch.manual_seed(0)
    rows, p = torch.randn(4, 7, dtype=torch.float64), torch.rand(7, dtype=torch.float64)
    observation = Observation(rows, torch.randn(4, dtype=torch.float64))
    left = torch.randn(2, 4, dtype=torch.float64)
    torch.testing.assert_close(observation.gram(p), rows @ torch.diag(p) @ rows.T)
    torch.testing.assert_close(observation.column_squares(left), ((left @ rows) ** 2).sum(0))
    torch.testing.assert_close(observation.matvec(p), rows @ p)
    torch.testing.assert_close(observation.rmatvec(left[0]), rows.T @ left[0])
    scaled = observation.scaled(0.25)
    torch.testing.assert_close(scaled.rows.T @ scaled.residual, 0.25 * rows.T @ observation.residual)
