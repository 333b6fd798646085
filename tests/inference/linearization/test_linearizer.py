"""Outputs and Jacobians against one plain backward pass per number, in float64, for every kind of layer."""

import pytest
import torch
from oracles import dense_jacobian
from peft import LoraConfig, get_peft_model
from torch import nn

from bayes_kf.inference.covariance.observation import Observation
from bayes_kf.inference.linearization import rule_check
from bayes_kf.inference.linearization.linearizer import Linearizer
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.zoo import lora_digits_vit


def dense(linearize, inputs):
    """Outputs (B, m) and Jacobian (B, m, n) at the model's present tensors."""
    batch = linearize(linearize.adapter.vector(), inputs)
    return batch.outputs, batch.jacobian().dense()


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
    outputs, jacobian = dense(Linearizer(adapter), x)
    expected_outputs, expected = dense_jacobian(model, lambda m: m(x))
    torch.testing.assert_close(outputs, expected_outputs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(jacobian, expected, rtol=1e-10, atol=1e-12)


def test_transformer_with_mapping_inputs_and_zero_b():
    model = lora_digits_vit(rank=4).double()
    x = torch.randn(2, 1, 28, 28, dtype=torch.float64)
    adapter = AdapterModel(model)
    linearize = Linearizer(adapter)
    outputs, jacobian = dense(linearize, {"pixel_values": x})
    expected_outputs, expected = dense_jacobian(model, lambda m: m(pixel_values=x).logits)
    torch.testing.assert_close(outputs, expected_outputs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(jacobian, expected, rtol=1e-9, atol=1e-11)
    assert set(linearize.adapter.linearized_by.values()) == {"hooks"}


def test_the_method_of_each_tensor_is_measured():
    linearize = Linearizer(AdapterModel(Shared().double()))
    assert set(linearize.adapter.linearized_by.values()) == {"not yet known"}
    dense(linearize, torch.randn(2, 6, dtype=torch.float64))
    assert linearize.adapter.linearized_by["scale"] == "general"
    assert linearize.adapter.linearized_by["twice.weight"] == "hooks"


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
    _, jacobian = dense(linearize, x)
    torch.testing.assert_close(jacobian, dense_jacobian(model, lambda m: m(x))[1], rtol=1e-12, atol=1e-12)
    assert linearize.adapter.linearized_by == {"inner.weight": "general"}


def test_bfloat16_base_has_float32_rows():
    model = lora_digits_vit(rank=4)
    model.to(torch.bfloat16)
    adapter = AdapterModel(model)
    outputs, jacobian = dense(Linearizer(adapter), torch.randn(2, 1, 28, 28, dtype=torch.bfloat16))
    assert outputs.dtype == jacobian.dtype == torch.float32
    _, expected = dense_jacobian(model, lambda m: m(torch.zeros(2, 1, 28, 28, dtype=torch.bfloat16)).logits)
    assert jacobian.shape == expected.shape


def test_chunks_cover_a_batch_once():
    adapter, x = AdapterModel(nn.Linear(3, 2)), torch.randn(5, 3)
    linearize = Linearizer(adapter, bytes_budget=1)
    pieces = list(linearize.chunks(adapter.vector(), x))
    assert [piece.size for _, piece in pieces] == [1] * 5
    torch.testing.assert_close(torch.cat([piece.inputs for _, piece in pieces]), x)
    assert [piece.size for _, piece in Linearizer(adapter).chunks(adapter.vector(), x)] == [5]


def test_observation_products():
    torch.manual_seed(0)
    rows, p = torch.randn(4, 7, dtype=torch.float64), torch.rand(7, dtype=torch.float64)
    observation = Observation.from_rows(rows, torch.randn(4, dtype=torch.float64))
    left = torch.randn(2, 4, dtype=torch.float64)
    torch.testing.assert_close(observation.gram(p), rows @ torch.diag(p) @ rows.T)
    torch.testing.assert_close(observation.column_squares(left), ((left @ rows) ** 2).sum(0))
    torch.testing.assert_close(observation.matvec(p), rows @ p)
    torch.testing.assert_close(observation.rmatvec(left[0]), rows.T @ left[0])
    scaled = observation.scaled(0.25)
    torch.testing.assert_close(scaled.dense().T @ scaled.residual, 0.25 * rows.T @ observation.residual)


class Table(nn.Module):
    """A Linear fed an unbatched table, as relative position embeddings are."""

    def __init__(self):
        super().__init__()
        self.pos, self.fc = nn.Linear(2, 6), nn.Linear(6, 3)
        self.register_buffer("table", torch.randn(1, 2))

    def forward(self, x):
        return self.fc(torch.tanh(x + self.pos(self.table)))


class SequenceFirst(nn.Module):
    """Time before examples inside."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x.transpose(0, 1))).mean(0))


class Flattened(nn.Module):
    """Examples and time in one dimension inside."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, x):
        inner = torch.tanh(self.a(x.reshape(-1, 3))).view(len(x), -1, 5)
        return self.b(inner.mean(1))


class OneAtATime(nn.Module):
    """Refuses more rows than in its first batch, like sequence classifiers without a pad token."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        if len(x) > 1:
            raise ValueError("Cannot handle batch sizes > 1 if no padding token is defined.")
        return self.fc(x)


class Mixing(nn.Module):
    """Rows depend on each other even in eval mode."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.Linear(5, 3)

    def forward(self, x):
        return self.b(self.norm(self.a(x)))


TRAPS = [
    (Table, [(1, 6), (4, 6), (1, 6)]),
    (SequenceFirst, [(4, 4, 3), (2, 4, 3), (1, 4, 3), (3, 3, 3)]),
    (Flattened, [(2, 1, 3), (2, 4, 3), (1, 4, 3)]),
    (OneAtATime, [(1, 6), (1, 6)]),
    (Mixing, [(4, 6), (3, 6)]),
]


@pytest.mark.parametrize(("make", "shapes"), TRAPS)
def test_modules_whose_input_does_not_have_examples_first_are_detected(make, shapes):
    torch.manual_seed(0)
    model = make().double()
    linearize = Linearizer(AdapterModel(model))
    for shape in shapes:
        x = torch.randn(shape, dtype=torch.float64)
        outputs, jacobian = dense(linearize, x)
        expected_outputs, expected = dense_jacobian(model, lambda m: m(x))  # noqa: B023 (called at once)
        torch.testing.assert_close(outputs, expected_outputs, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(jacobian, expected, rtol=1e-9, atol=1e-9)


def test_an_in_place_activation_is_detected_in_bfloat16_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)).bfloat16()
    linearize = Linearizer(AdapterModel(model))
    x = torch.randn(8, 4, dtype=torch.bfloat16)
    _, jacobian = dense(linearize, x)
    expected = dense_jacobian(model, lambda m: m(x))[1].float()
    torch.testing.assert_close(jacobian, expected, rtol=0.02, atol=0.02)
    assert linearize.adapter.linearized_by["0.weight"] == "general"


def test_relative_attention_with_shared_projections():
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    torch.manual_seed(0)
    config = DebertaV2Config(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3,
        relative_attention=True, share_att_key=True, pos_att_type=["p2c", "c2p"], position_buckets=4,
        max_relative_positions=8, pooler_hidden_size=16,
    )  # fmt: skip
    model = lora(DebertaV2ForSequenceClassification(config), target_modules=["query_proj", "value_proj"]).double()
    linearize = Linearizer(AdapterModel(model))
    for size in (1, 2):
        batch = {"input_ids": torch.randint(3, 30, (size, 6)), "attention_mask": torch.ones(size, 6).long()}
        _, jacobian = dense(linearize, batch)
        _, expected = dense_jacobian(model, lambda m: m(**batch).logits)  # noqa: B023 (called at once)
        torch.testing.assert_close(jacobian, expected, rtol=1e-8, atol=1e-9)


def test_a_large_first_batch_is_checked_on_few_examples():
    """The check takes some eight passes; they go over the whole batch only if the model needs its own batch size."""
    torch.manual_seed(0)
    rows = []
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    model.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    x = torch.randn(64, 3).double()
    adapter = AdapterModel(model)
    assert Linearizer(adapter).prepare(adapter.vector(), x) == 2
    assert max(rows) <= 2 * rule_check.NUM_CHECKED

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2).double()

        def forward(self, given):
            return self.fc(given.view(64, 3))

    adapter = AdapterModel(Fixed())
    actual = Linearizer(adapter)(adapter.vector(), x).jacobian().dense()
    expected = torch.autograd.functional.jacobian(lambda v: adapter.call(adapter.tensors(v), x), adapter.vector())
    torch.testing.assert_close(actual, expected)
