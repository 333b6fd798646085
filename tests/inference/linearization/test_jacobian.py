"""Products of the operator against the dense float64 Jacobian, for every kind of layer and of forward pass."""

import copy
import warnings

import pytest
import torch
from oracles import dense_jacobian
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    OPTConfig,
    OPTForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from bayes_kf.inference import KalmanConfig, KalmanFilter
from bayes_kf.inference.fitting.passes import mean_pass
from bayes_kf.inference.linearization.jacobian import Jacobian, diagonal_blocks
from bayes_kf.inference.linearization.linearizer import Linearizer
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.zoo import LeNet5

IDS = torch.tensor([[5, 9, 3, 7, 0, 0], [4, 4, 8, 2, 11, 5], [6, 1, 12, 3, 3, 0]])
TEXT = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}


def bert(attention="sdpa", num_labels=3, modules_to_save=("classifier",), **lora):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=8, num_labels=num_labels, attn_implementation=attention,
    )  # fmt: skip
    setting = {"r": 2, "target_modules": ["query", "value"], "init_lora_weights": False, **lora}
    return get_peft_model(
        BertForSequenceClassification(config), LoraConfig(modules_to_save=list(modules_to_save), **setting)
    )


def vit():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4,
        num_channels=1, num_labels=3,
    )  # fmt: skip
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, modules_to_save=["classifier"])
    return get_peft_model(ViTForImageClassification(config), lora)


class Packed(nn.Module):
    """Queries, keys and values in one projection, as in timm's transformers."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.head = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return self.head(nn.functional.scaled_dot_product_attention(q, k, v).mean(1))


class TiedEmbedding(nn.Module):
    """A table that is also the last layer."""

    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(13, 4), nn.Linear(4, 13)
        self.out.weight = self.table.weight

    def forward(self, x):
        return self.out(torch.tanh(self.table(x)).mean(1))


class Checkpointed(nn.Module):
    """Runs its layers again in the backward pass, in either mode."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.head(checkpoint(lambda h: torch.tanh(self.second(h)), x, use_reentrant=self.reentrant))


def two_adapters():
    model = bert()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    model.set_adapter("default")
    return model


def packed_lora():
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False, modules_to_save=["head", "norm"])
    return get_peft_model(Packed(), lora)


IMAGES, WIDE = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(3)), torch.randn(3, 5, 8)
CASES = {
    "masked text, sdpa": (bert, TEXT, {"hooks"}),
    "masked text, eager": (lambda: bert("eager"), TEXT, {"hooks"}),
    "dora": (lambda: bert(use_dora=True), TEXT, {"hooks"}),
    "rslora, biases": (lambda: bert(use_rslora=True, lora_bias=True), TEXT, {"hooks"}),
    "norms and tables saved": (
        lambda: bert(modules_to_save=("classifier", "LayerNorm", "word_embeddings")), TEXT, {"hooks"},
    ),
    "positions saved": (
        lambda: bert(modules_to_save=("classifier", "position_embeddings")), TEXT, {"hooks", "general"},
    ),
    "more classes than features": (lambda: bert(num_labels=11), TEXT, {"hooks"}),
    "frozen head, more classes than features": (lambda: bert(num_labels=11, modules_to_save=()), TEXT, {"hooks"}),
    "vision": (vit, {"pixel_values": IMAGES}, {"hooks"}),
    "packed projection": (packed_lora, WIDE, {"hooks"}),
    "tied table": (TiedEmbedding, IDS, {"general", "hooks"}),
    "two adapters, one active": (two_adapters, TEXT, {"hooks"}),
    "convolutions": (LeNet5, torch.randn(2, 1, 28, 28), {"hooks"}),
    "checkpointed": (lambda: Checkpointed(False), torch.randn(3, 6), {"hooks"}),
    "checkpointed, reentrant": (lambda: Checkpointed(True), torch.randn(3, 6), {"hooks"}),
}  # fmt: skip


def in_double(inputs):
    if isinstance(inputs, dict):
        return {k: in_double(v) for k, v in inputs.items()}
    return inputs.double() if inputs.is_floating_point() else inputs


def call(model, inputs):
    actual = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return actual if isinstance(actual, torch.Tensor) else actual.logits


def oracle(model, inputs):
    """The dense Jacobian, of a copy whose checkpoints are not reentrant (autograd.grad refuses those)."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, Checkpointed):
            module.reentrant = False
    return dense_jacobian(model, lambda m: call(m, inputs))


@pytest.mark.parametrize("case", CASES)
def test_every_product_is_the_dense_one(case):
    make, inputs, paths = CASES[case]
    torch.manual_seed(1)
    model, inputs = make().double(), in_double(inputs)
    adapter = AdapterModel(model)
    batch = Linearizer(adapter)(adapter.vector(), inputs)
    jacobian = batch.jacobian()
    outputs, expected = oracle(model, inputs)
    size, m, _ = expected.shape
    torch.testing.assert_close(batch.outputs, outputs, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(jacobian.dense(), expected, rtol=1e-8, atol=1e-11)
    assert set(adapter.linearized_by.values()) == paths
    agree_with_dense(jacobian, expected)
    factor = torch.randn(size, 2, m, dtype=torch.float64)
    agree_with_dense(jacobian.left_multiply(factor), factor @ expected)
    agree_with_dense(jacobian.scaled(0.3), 0.3 * expected)
    agree_with_dense(jacobian.examples(slice(1, 3)), expected[1:3])
    agree_with_dense(jacobian.rows(1), expected[:, :1])
    agree_with_dense(jacobian.left_multiply(factor).rows(1), (factor @ expected)[:, :1])
    assert jacobian.rows(m) is jacobian
    assert all(p.grad is None for p in model.parameters())


def agree_with_dense(jacobian: Jacobian, expected: torch.Tensor):
    """All seven products of an operator against its matrix."""
    generator = torch.Generator().manual_seed(2)
    size, c, n = expected.shape
    flat, p = expected.flatten(0, 1), 0.1 + torch.rand(n, generator=generator).double()
    v, weights = torch.randn(n, 2, generator=generator).double(), torch.randn(size, c, 2, generator=generator).double()
    left = torch.randn(4, size * c, generator=generator).double()
    joint = (flat * p) @ flat.mT
    close = {"rtol": 1e-8, "atol": 1e-10}
    torch.testing.assert_close(jacobian.matmul(v), expected @ v, **close)
    torch.testing.assert_close(jacobian.matvec(v[:, 0]), expected @ v[:, 0], **close)
    torch.testing.assert_close(jacobian.rmatmul(weights), flat.mT @ weights.flatten(0, 1), **close)
    torch.testing.assert_close(jacobian.rmatvec(weights[..., 0]), flat.mT @ weights[..., 0].flatten(), **close)
    torch.testing.assert_close(jacobian.gram(p), joint, **close)
    torch.testing.assert_close(jacobian.block_gram(p), diagonal_blocks(joint, size), **close)
    torch.testing.assert_close(jacobian.column_squares(), flat.square().sum(0), **close)
    torch.testing.assert_close(jacobian.column_squares(left), (left @ flat).square().sum(0), **close)


def test_a_recomputed_layer_has_the_tensors_of_the_linearization_point():
    """The model's own weights are back in place when the backward pass recomputes the layer."""
    for reentrant in (False, True):
        torch.manual_seed(0)
        model, x = Checkpointed(reentrant).double(), torch.randn(3, 6).double()
        adapter = AdapterModel(model)
        linearize, elsewhere = Linearizer(adapter), adapter.vector() + 0.5
        jacobian = linearize(elsewhere, x).jacobian().dense()
        adapter.assign(elsewhere)
        torch.testing.assert_close(jacobian, oracle(model, x)[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_transformers_checkpointing_stays_on_and_changes_nothing(reentrant):
    plain = bert(modules_to_save=["classifier"]).double()
    adapter = AdapterModel(plain)
    expected = Linearizer(adapter)(adapter.vector(), TEXT).jacobian().dense()
    model = bert(modules_to_save=["classifier"]).double().train()
    base = model.get_base_model()  # the method was renamed in transformers 5
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    adapter = AdapterModel(model)
    linearize = Linearizer(adapter)
    torch.testing.assert_close(linearize(adapter.vector(), TEXT).jacobian().dense(), expected, rtol=1e-9, atol=1e-12)
    assert set(adapter.linearized_by.values()) == {"hooks"}
    assert linearize._plan.plain is not reentrant
    assert model.training


def test_compiled_model_is_linearized_and_keeps_its_own_calls():
    model = bert().double()
    adapter = AdapterModel(model)
    expected = Linearizer(adapter)(adapter.vector(), TEXT).jacobian().dense()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler
        compiled = torch.compile(bert().double(), backend="eager")
        adapter = AdapterModel(compiled)
        actual = Linearizer(adapter)(adapter.vector(), TEXT).jacobian().dense()
        shifted = adapter.outputs(adapter.vector() + 0.1, TEXT)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    assert set(adapter.linearized_by.values()) == {"hooks"}
    plain = AdapterModel(model)
    torch.testing.assert_close(shifted, plain.outputs(plain.vector() + 0.1, TEXT), rtol=1e-10, atol=1e-12)


def test_bfloat16_base_and_autocast_have_float32_rows():
    exact = bert()
    adapter = AdapterModel(exact)
    expected = Linearizer(adapter)(adapter.vector(), TEXT).jacobian().dense()
    half = bert()
    for parameter in half.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    half.get_base_model().bert.embeddings.to(torch.bfloat16)
    scale = expected.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for model in (bert(), half):
            adapter = AdapterModel(model)
            jacobian = Linearizer(adapter)(adapter.vector(), TEXT).jacobian()
            assert jacobian.like.dtype == torch.float32
            assert set(adapter.linearized_by.values()) == {"hooks"}
            assert float((jacobian.dense() - expected).abs().max()) < 0.05 * scale  # bfloat16 has 8 bits


def test_rows_of_an_embedding_table_have_the_columns_of_the_tokens_in_the_batch():
    model = bert(modules_to_save=["word_embeddings"], num_labels=2)
    adapter = AdapterModel(model)
    jacobian = Linearizer(adapter)(adapter.vector(), TEXT).jacobian()
    name = next(n for n in adapter.names if "word_embeddings" in n)
    widths = {block.rows.shape[-1] for _, part in jacobian.terms for block in part.blocks}
    assert len(IDS.unique()) * 8 in widths
    assert 20 * 8 not in widths
    assert adapter.shapes[adapter.names.index(name)] == (20, 8)


def test_a_head_of_many_classes_is_stored_as_outer_products():
    model = bert(num_labels=500)
    adapter = AdapterModel(model)
    jacobian = Linearizer(adapter)(adapter.vector(), TEXT).jacobian()
    dense_bytes = 3 * 500 * adapter.num_parameters * 4
    assert jacobian.nbytes < dense_bytes / 10


def test_describe_lists_every_tensor_and_how_it_is_linearized():
    model = bert(modules_to_save=["classifier", "position_embeddings"])
    adapter = AdapterModel(model)
    assert "not yet known" in adapter.describe()
    Linearizer(adapter)(adapter.vector(), TEXT)
    lines = adapter.describe().splitlines()[1:]
    assert len(lines) == len(adapter.names)
    assert all(line.startswith(name) for line, name in zip(lines, adapter.names, strict=True))
    general = [line for line in lines if line.endswith("general")]
    assert len(general) == 1
    assert "position_embeddings" in general[0]
    assert "Embedding" in general[0]


def test_unused_tensors_have_zero_rows_until_a_batch_uses_them():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.a(x) + self.b(x) if bool((x[:, 0] > 0).all()) else self.a(x)

    torch.manual_seed(0)
    model = Gated().double()
    adapter = AdapterModel(model)
    linearize = Linearizer(adapter)
    for sign in (-1.0, 1.0):
        x = torch.randn(3, 4).double()
        x[:, 0] = sign
        actual = linearize(adapter.vector(), x).jacobian().dense()
        torch.testing.assert_close(actual, dense_jacobian(model, lambda m: m(x))[1], rtol=1e-10, atol=1e-12)  # noqa: B023
    assert adapter.linearized_by["b.weight"] == "unused"


@pytest.mark.parametrize("outputs_per_pass", [1, 2, 7, 100])
def test_outputs_per_pass_changes_nothing(outputs_per_pass):
    model = bert(num_labels=7).double()
    adapter = AdapterModel(model)
    expected = Linearizer(adapter)(adapter.vector(), TEXT).jacobian().dense()
    actual = Linearizer(adapter, outputs_per_pass)(adapter.vector(), TEXT).jacobian().dense()
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-13)


def opt(dropout, reentrant=None):
    """A model whose checkpointed layers apply dropout in their own code."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, ffn_dim=12, word_embed_proj_dim=8,
        max_position_embeddings=16, num_labels=3, dropout=dropout, attention_dropout=dropout, pad_token_id=0,
    )  # fmt: skip
    base = OPTForSequenceClassification(config).double()
    setting = LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False, task_type="SEQ_CLS")
    model = get_peft_model(base, setting)
    if reentrant is not None:
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    return model.train()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_have_no_dropout_and_pass_gradients_of_the_mean_on(reentrant):
    ids = {"input_ids": torch.tensor([[3, 4, 5, 6], [7, 8, 9, 2]])}
    plain = AdapterModel(opt(0.0))
    model = opt(0.3, reentrant)
    adapter, vector = AdapterModel(model), plain.vector()
    torch.testing.assert_close(adapter.vector(), vector)
    before = torch.get_rng_state()
    for _ in range(2):
        torch.testing.assert_close(adapter.outputs(vector, ids), plain.outputs(vector, ids), rtol=1e-9, atol=1e-12)
    actual, expected = (Linearizer(a)(vector, ids).jacobian().dense() for a in (adapter, plain))
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-11)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())
    config, steps = KalmanConfig(covariance="diagonal", initial_variance=0.1, bound_prior=False), []
    for one in (plain, adapter):
        kf = KalmanFilter(one, config)
        state = kf.init(ids)._replace(examples=2)
        steps.append(
            mean_pass.natural_gradient_step(config, one, state, ids, torch.tensor([0, 2]), 1.0)[0].belief.mean - vector
        )
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-7, atol=1e-11)
    assert float((steps[0] != 0).double().mean()) > 0.5  # units that are off learn nothing
    assert model.training


def agrees_with_autograd(model, x):
    adapter = AdapterModel(model)
    actual = Linearizer(adapter)(adapter.vector(), x).jacobian()
    expected = dense_jacobian(model, lambda m: m(x))[1]
    torch.testing.assert_close(actual.dense(), expected, rtol=1e-9, atol=1e-12)
    variance = torch.rand(actual.num_parameters, generator=torch.Generator().manual_seed(2)).double()
    rows = expected.flatten(0, 1)
    torch.testing.assert_close(actual.gram(variance), rows * variance @ rows.T, rtol=1e-9, atol=1e-12)


class Changed(nn.Module):
    """Features, a frozen classifier of more classes than features, and a change of its output."""

    def __init__(self, change):
        super().__init__()
        torch.manual_seed(0)
        self.below, self.head, self.change = nn.Linear(4, 3), nn.Linear(3, 5).requires_grad_(False), change

    def forward(self, x):
        return self.change(self, self.below(x).tanh())


def scaled_in_place(model, h):
    out = model.head(h)
    out *= 10.0
    return out


@pytest.mark.parametrize(
    "change",
    [
        scaled_in_place,
        lambda model, h: model.head(h + model.head(h).softmax(-1)[:, :3]),
        lambda model, h: model.head(h).relu_(),
    ],
    ids=["scaled in place", "head called twice", "clipped in place"],
)
@pytest.mark.parametrize("trainable", [False, True])
def test_a_changed_output_is_not_taken_for_the_heads(change, trainable):
    model = Changed(change).double()
    model.head.requires_grad_(trainable)
    agrees_with_autograd(model, torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).double())


def test_a_hook_that_changes_the_heads_output():
    model = Changed(lambda model, h: model.head(h)).double()
    model.head.register_forward_hook(lambda module, args, out: 10.0 * out)
    agrees_with_autograd(model, torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).double())


def test_an_in_place_activation_that_has_no_effect_in_the_first_batch():
    """All units are above zero in the first batch, and not in the second."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(inplace=True), nn.Linear(2, 2)).double()
    with torch.no_grad():
        model[0].bias.fill_(5.0)
    adapter = AdapterModel(model)
    linearize = Linearizer(adapter)
    for x in (0.1 * torch.randn(4, 3).double(), 20.0 * torch.randn(4, 3).double()):
        actual = linearize(adapter.vector(), x).jacobian().dense()
        torch.testing.assert_close(actual, dense_jacobian(model, lambda m: m(x))[1], rtol=1e-9, atol=1e-12)  # noqa: B023


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_of_the_users_parameters_are_unchanged(reentrant):
    model = opt(0.0, reentrant)
    adapter = AdapterModel(model)
    late = model.get_base_model().model.decoder.final_layer_norm.weight.requires_grad_(True)
    late.grad = torch.full_like(late, 3.0)
    kept = late.grad
    ids = {"input_ids": torch.tensor([[3, 4, 5, 6], [7, 8, 9, 2]])}
    Linearizer(adapter)(adapter.vector(), ids).jacobian()
    config = KalmanConfig(covariance="diagonal", initial_variance=0.1, bound_prior=False)
    state = KalmanFilter(adapter, config).init(ids)._replace(examples=2)
    mean_pass.natural_gradient_step(config, adapter, state, ids, torch.tensor([0, 2]), 1.0)
    assert late.grad is kept
    assert bool((kept == 3.0).all())
    assert all(p.grad is None for p in model.parameters() if p is not late)
