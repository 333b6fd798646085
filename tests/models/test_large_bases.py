"""Bases that save memory: 8 and 4 bits, half precision, gradient checkpointing, disk offload."""

import accelerate
import bitsandbytes as bnb
import bitsandbytes.functional
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification
from transformers import BitsAndBytesConfig as Bits

from bayes_kf import AdapterModel, KalmanConfig, KalmanFilter, Posterior
from bayes_kf.models import eval_mode
from bayes_kf.models.prior.variance_bounds import largest_variances

EIGHT = Bits(load_in_8bit=True, llm_int8_skip_modules=["classifier"])
FOUR = Bits(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["classifier"])
IDS = torch.randint(0, 100, (8, 12), generator=torch.Generator().manual_seed(0))
# a prior that does not ask how large the base's weights are, and so narrow that float32 holds the mean to 1e-6 of
# float64's; at 3 logits the steps here are 480 long, float32 is off by 0.09, and last bits decide
BY_OUTPUTS = KalmanConfig(initial_spread="tensors", initial_logit_sd=0.05)
LABELS = torch.arange(8) % 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=128,
        num_labels=3,
    )
    path = tmp_path_factory.mktemp("bert")
    BertForSequenceClassification(config).save_pretrained(path)
    return path


def load(folder, layers=None, **options):
    base = AutoModelForSequenceClassification.from_pretrained(folder, **options)
    torch.manual_seed(1)
    kind = {"layers_to_transform": layers, "layers_pattern": "layer"} if layers else {}
    lora = LoraConfig(
        r=4, target_modules=["query", "value"], init_lora_weights=False, modules_to_save=["classifier"], **kind
    )
    return get_peft_model(base, lora)


def learned(model, config=None):
    """The belief after two batches, and what it predicts."""
    kf = KalmanFilter(model, config or KalmanConfig())
    state = kf.init({"input_ids": IDS})
    for part in (slice(0, 5), slice(5, 8)):
        state, _ = kf.update(state, {"input_ids": IDS[part]}, LABELS[part])
    return kf, state, Posterior(kf, state).predict({"input_ids": IDS}, method="probit").probs


def assert_same(actual, expected, tolerance):
    (kf, state, probs), (other, state_of_other, probs_of_other) = actual, expected
    assert torch.equal(kf.adapter.vector(), other.adapter.vector())
    torch.testing.assert_close(state.belief.mean, state_of_other.belief.mean, rtol=0, atol=tolerance)
    variances = kf.marginal_variance(state), other.marginal_variance(state_of_other)
    torch.testing.assert_close(*variances, rtol=10 * tolerance, atol=0)
    torch.testing.assert_close(probs, probs_of_other, rtol=0, atol=tolerance)


def dense_twin(folder, model):
    """The same model with the quantized weights written out in float32."""
    twin = load(folder)
    for name, layer in model.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            dense = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        elif isinstance(layer, bnb.nn.Linear8bitLt):
            dense = layer.weight.CB.float() * layer.weight.SCB[:, None] / 127
        else:
            continue
        twin.get_submodule(name).weight.data.copy_(dense)
    return twin


@pytest.mark.parametrize("kernel", [False, True], ids=["general", "packing kernel"])
def test_a_4_bit_base_gives_the_posterior_of_its_dequantized_weights(folder, kernel, monkeypatch):
    model = load(folder, quantization_config=FOUR, device_map="cpu")
    expected = learned(dense_twin(folder, model), BY_OUTPUTS)
    layers = [layer for layer in model.modules() if isinstance(layer, bnb.nn.Linear4bit)]
    assert len(layers) == 3 * 6 + 1
    for layer in layers:
        layer.support_avx512bf16_for_cpu = layer.support_avx512bf16_for_cpu and kernel
    modes = [module.training for module in model.modules()]
    assert_same(learned(model, BY_OUTPUTS), expected, 1e-5)
    assert [module.training for module in model.modules()] == modes
    assert {p.dtype for p in model.parameters()} == {torch.uint8, torch.float32}


def test_4_bit_weights_that_are_packed_are_refused(folder):
    model = load(folder, quantization_config=FOUR, device_map="cpu")
    kf = KalmanFilter(model, KalmanConfig())
    state = kf.init({"input_ids": IDS})
    [first, *_] = eval_mode.four_bit_on_cpu(model.modules())
    first.weight.quant_state.packing_format_for_cpu = True  # as bitsandbytes marks them, on processors with the kernel
    with pytest.raises(ValueError, match="`model` must have 4-bit weights that gradients flow through, got ones that"):
        kf.update(state, {"input_ids": IDS}, LABELS)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_an_8_bit_base_gives_the_posterior_of_its_dequantized_weights(folder):
    """But for what bitsandbytes rounds on the way: inputs of its matrix products are 8-bit too, so about 1 %."""
    model = load(folder, quantization_config=EIGHT, device_map="cpu")
    expected = learned(dense_twin(folder, model))
    assert_same(learned(model), expected, 0.03)
    assert {p.dtype for p in model.parameters()} == {torch.int8, torch.float32}


@pytest.mark.parametrize("bits", [EIGHT, FOUR], ids=["8 bits", "4 bits"])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_the_size_of_quantized_weights_bounds_the_prior(bits, folder):
    model = load(folder, quantization_config=bits, device_map="cpu")
    twin = dense_twin(folder, model)
    actual, expected = largest_variances(AdapterModel(model)), largest_variances(AdapterModel(twin))
    assert len(actual) == 12
    assert actual == pytest.approx(expected, rel=0.05)


def test_a_half_precision_base_has_a_single_precision_posterior(folder):
    model = load(folder, dtype=torch.bfloat16)
    rounded = load(folder)
    rounded.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    actual, expected = learned(model), learned(rounded)
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert actual[1].belief.mean.dtype == torch.float32
    moved = float((expected[1].belief.mean - expected[0].adapter.vector()).abs().max())
    assert moved > 0.05
    assert_same(actual, expected, 0.05)


@pytest.mark.parametrize("covariance", ["low_rank", "diagonal"])
def test_gradient_checkpointing_changes_nothing(covariance, folder):
    config = KalmanConfig(covariance=covariance)
    model = load(folder)
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    model.enable_input_require_grads()
    model.train()
    assert_same(learned(model, config), learned(load(folder), config), 1e-6)


def test_a_device_map_on_one_device_changes_nothing(folder):
    assert_same(learned(load(folder, device_map={"": "cpu"})), learned(load(folder)), 1e-7)


def test_frozen_layers_may_lie_on_disk(folder, tmp_path):
    places = dict.fromkeys(("bert.embeddings", "bert.encoder.layer.2", "bert.pooler", "classifier"), "cpu")
    places |= {"bert.encoder.layer.0": "disk", "bert.encoder.layer.1": "disk"}
    model = load(folder, layers=[2], device_map=places, offload_folder=tmp_path)
    assert sum(p.is_meta for p in model.parameters()) == 2 * 16
    assert_same(learned(model), learned(load(folder, layers=[2])), 1e-7)
    assert sum(p.is_meta for p in model.parameters()) == 2 * 16


def test_frozen_weights_below_an_adapter_may_be_fetched_when_needed(folder):
    """As ``accelerate.cpu_offload`` does with the base of every layer; the adapters stay."""
    model = load(folder)
    for name, layer in model.named_modules():
        if name.endswith("base_layer"):
            accelerate.cpu_offload(layer, execution_device="cpu")
    assert model.base_model.model.bert.encoder.layer[0].attention.self.query.base_layer.weight.is_meta
    assert_same(learned(model, BY_OUTPUTS), learned(load(folder), BY_OUTPUTS), 1e-5)


def test_trainable_tensors_on_disk_are_refused(folder, tmp_path):
    places = dict.fromkeys(("bert.embeddings", "bert.encoder.layer.1", "bert.encoder.layer.2"), "cpu")
    places |= {"bert.encoder.layer.0": "disk", "bert.pooler": "cpu", "classifier": "cpu"}
    model = load(folder, device_map=places, offload_folder=tmp_path)
    with pytest.raises(ValueError, match=r"trainable tensors in the memory of one device, got meta \(.*layer\.0.*cpu"):
        AdapterModel(model)
