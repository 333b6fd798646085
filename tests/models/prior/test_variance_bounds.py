"""The bound on a prior variance of LoRA factors, against draws of the weights themselves."""

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from bayes_kf.inference import KalmanConfig, KalmanFilter
from bayes_kf.models.adapter import AdapterModel
from bayes_kf.models.prior.variance_bounds import LARGEST_CHANGE, largest_variances
from benchmarks.reliability import peft_cases as cases


def model(init=True, **lora):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 3))
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=init, **lora))


def test_a_factor_at_its_bound_changes_the_weight_as_far_as_it_says():
    adapter = AdapterModel(model(init=False))
    bounds = largest_variances(adapter)
    assert sorted(name.split(".")[-3] for name in bounds) == ["lora_A", "lora_B"]
    layer = adapter.model.base_model.model[0]
    weight, factors = layer.get_base_layer().weight, {"lora_A": layer.lora_A, "lora_B": layer.lora_B}
    for name, variance in bounds.items():
        own = name.split(".")[-3]
        squares = []
        for _ in range(400):
            drawn = {k: f["default"].weight.detach() for k, f in factors.items()}
            drawn[own] = variance**0.5 * torch.randn_like(drawn[own])
            squares.append((layer.scaling["default"] * drawn["lora_B"] @ drawn["lora_A"]).square().mean())
        squares = torch.stack(squares)
        expected = float(LARGEST_CHANGE**2 * weight.detach().square().mean())
        assert float((squares.mean() - expected).abs()) < 5 * float(squares.std()) / 20


def test_factors_without_effect_and_other_tensors_have_no_bound():
    adapter = AdapterModel(model(modules_to_save=["2"]))
    assert [name.split(".")[-3] for name in largest_variances(adapter)] == ["lora_B"]
    assert largest_variances(AdapterModel(nn.Linear(3, 2))) == {}
    convolution = get_peft_model(
        nn.Sequential(nn.Conv2d(3, 8, 3)), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    )
    assert len(largest_variances(AdapterModel(convolution))) == 2


def weight_of(layer, key="default"):
    """W + ΔW of a LoRA layer, by PEFT."""
    if hasattr(layer, "get_param"):
        return layer.get_param().detach(), layer.get_delta_weight(key)
    base = layer.get_base_layer()
    weight = base.in_proj_weight if isinstance(base, nn.MultiheadAttention) else base.weight
    return weight.detach(), layer.get_delta_weight(key)


@pytest.mark.parametrize("kind", ["embedding", "attention", "parameters", "convolution"])
def test_the_bound_holds_wherever_lora_is(kind):
    """Draws at the bound, through PEFT's own ΔW: its mean square is four times that of W."""
    torch.manual_seed(0)
    lora = {"r": 3, "lora_alpha": 9, "init_lora_weights": False}
    if kind == "embedding":
        base, given = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 3)), {"target_modules": ["0"]}
    elif kind == "attention":
        base, given = cases.attention(), {"target_modules": ["attention"]}
    elif kind == "parameters":
        base, given = cases.mixture(), {"target_modules": [], "target_parameters": ["experts.w"]}
    else:
        base, given = nn.Sequential(nn.Conv2d(3, 8, 3)), {"target_modules": ["0"]}
    adapter = AdapterModel(get_peft_model(base, LoraConfig(**lora, **given)))
    bounds = largest_variances(adapter)
    assert set(bounds) == set(adapter.names)
    layers = [m for m in nn.Module.modules(adapter.model) if isinstance(m, LoraLayer)]
    for name, variance in bounds.items():
        (module, attribute), squares = adapter.owners[name][0], []
        own = module._parameters[attribute]
        (layer,) = [m for m in layers if any(p is own for n, p in m.named_parameters() if "base_layer" not in n)]
        kept = own.detach().clone()
        for _ in range(300):
            own.data.normal_().mul_(variance**0.5)
            squares.append(weight_of(layer)[1].detach().square().mean())
        own.data.copy_(kept)
        actual, expected = torch.stack(squares), LARGEST_CHANGE**2 * weight_of(layer)[0].square().mean()
        assert float((actual.mean() - expected).abs()) < 5 * float(actual.std()) / 300**0.5, name


@pytest.mark.parametrize(
    "config",
    [
        peft.LoHaConfig(r=2, target_modules=["0"], init_weights=False),
        peft.LoKrConfig(r=2, target_modules=["0"], init_weights=False),
        peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=["0"], init_lora_weights=False),
        peft.FourierFTConfig(n_frequency=9, target_modules=["0"], init_weights=True),
        peft.IA3Config(target_modules=["0"], feedforward_modules=[]),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_the_bound_of_other_types_is_that_of_the_weights_derivative(config):
    """Against Σₖ (∂Wᵢⱼ/∂θₖ)² by autograd, of the weight read off the layer: its outputs for unit vectors."""
    torch.manual_seed(0)
    network = get_peft_model(nn.Sequential(nn.Linear(12, 10, bias=False)), config).eval()
    adapter = AdapterModel(network)
    own = {name: p for name, p in network.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in own.values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    weight = network.base_model.model[0].get_base_layer().weight
    moved = network(torch.eye(12)).flatten()
    rows = [torch.autograd.grad(w, list(own.values()), retain_graph=True, allow_unused=True) for w in moved]
    bounds = largest_variances(adapter)
    assert set(bounds) == set(own)
    for place, name in enumerate(own):
        squares = sum(float(row[place].square().sum()) for row in rows if row[place] is not None) / len(rows)
        expected = LARGEST_CHANGE**2 * float(weight.detach().square().mean()) / squares
        assert bounds[name] == pytest.approx(expected, rel=0.3), name  # 32 random sums, 256 random inputs


def test_an_embeddings_prior_changes_it_by_no_more_than_twice_its_size():
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["word_embeddings", "query"])
    kf = KalmanFilter(get_peft_model(cases.bert(), config))
    prior = kf.adapter.unflatten(kf.init(cases.text()).prior.variance)
    layer = kf.adapter.model.base_model.model.bert.embeddings.word_embeddings
    (variance,) = [float(v.max()) for name, v in prior.items() if "embedding_A" in name]
    square = float(layer.lora_embedding_B["default"].detach().square().mean())
    change = layer.scaling["default"] * (2 * variance * square) ** 0.5
    assert change <= LARGEST_CHANGE * float(layer.get_base_layer().weight.detach().square().mean()) ** 0.5 * (1 + 1e-5)


@pytest.mark.parametrize(("spread", "bounded"), [("modules", True), ("tensors", False), ("constant", False)])
def test_the_default_prior_is_bounded_behind_a_head_with_little_gain(spread, bounded):
    network = model(modules_to_save=["2"])
    head = next(m for n, m in network.named_modules() if n.endswith("modules_to_save.default"))
    head.weight.data.mul_(1e-4)
    kf = KalmanFilter(network, KalmanConfig(initial_spread=spread))
    prior = kf.adapter.unflatten(kf.init(torch.randn(16, 30)).prior.variance)
    name, most = next(iter(largest_variances(kf.adapter).items()))
    if spread != "constant":
        assert (float(prior[name].max()) <= most * (1 + 1e-6)) is bounded


def test_adapters_merged_into_the_base_are_refused():
    """They have no effect on the outputs: a filter would learn nothing, without a warning."""
    network = model(init=False)
    network.merge_adapter()
    with pytest.raises(ValueError, match=r"`model` must have its adapters apart from the base, got one merged into"):
        AdapterModel(network)
    network.unmerge_adapter()
    assert AdapterModel(network).num_parameters > 0
