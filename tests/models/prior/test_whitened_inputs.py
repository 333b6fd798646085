"""Whitened LoRA inputs: A against a dense decomposition, and fits that start from it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import bayes_kf as bkf
from bayes_kf import AdapterModel, KalmanConfig, KalmanFilter
from bayes_kf.models.prior.whitened_inputs import whitened_factor, whitened_factors

WHITENED = KalmanConfig(lora_inputs="whitened")


def perceptron(dtype=torch.float64, **settings):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    return get_peft_model(layers, LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"], **settings)).to(dtype)


def examples(size=64, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 6, generator=generator, dtype=dtype) @ torch.randn(6, 6, generator=generator, dtype=dtype)
    return x + 1.0, torch.randint(3, (size,), generator=generator)


def factor_of(adapter, vector):
    (name,) = (name for name in adapter.names if "lora_A" in name)
    return adapter.unflatten(vector)[name]


@pytest.mark.parametrize("size", [64, 4])  # more and fewer examples than inputs of the layer
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_the_factor_is_that_of_a_dense_decomposition(size, settings):
    adapter, (x, _) = AdapterModel(perceptron(**settings)), examples(size)
    start = adapter.vector()
    actual = whitened_factors(adapter, start, x)
    moment, before = x.T @ x / size, factor_of(adapter, start)
    values, vectors = torch.linalg.eigh(moment)
    square = before.square().mean() * moment.trace()
    leading = vectors[:, -2:]
    expected = (
        square * leading @ torch.diag(1 / values[-2:]) @ leading.T
    )  # AᵀA, which no sign of an eigenvector changes
    after = factor_of(adapter, actual)
    torch.testing.assert_close(after.T @ after, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        after @ moment @ after.T, square * torch.eye(2, dtype=torch.float64), rtol=1e-9, atol=1e-12
    )
    others = {name: tensor for name, tensor in adapter.unflatten(actual).items() if "lora_A" not in name}
    assert all(torch.equal(tensor, adapter.unflatten(start)[name]) for name, tensor in others.items())
    torch.testing.assert_close(adapter.outputs(actual, x), adapter.outputs(start, x), rtol=1e-12, atol=1e-12)
    assert torch.equal(adapter.vector(), start)
    assert not any(module._forward_pre_hooks for module in adapter.model.modules())


def test_the_size_is_that_of_independent_elements():
    """E‖Ax‖² over factors of independent elements, within five standard errors."""
    x, generator = examples()[0], torch.Generator().manual_seed(2)
    factors = 0.3 * torch.randn(4000, 2, 6, generator=generator, dtype=torch.float64)
    sizes = (factors @ x.T).square().sum(1).mean(1)
    squares = [(whitened_factor(f, x) @ x.T).square().sum(0).mean() for f in factors[:400]]
    difference = torch.stack(squares) - sizes[:400]
    assert abs(float(difference.mean())) < 5 * float(difference.std()) / 400**0.5


def test_rows_beyond_the_rank_of_the_inputs_stay():
    x, factor = examples(1)[0], torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    actual = whitened_factor(factor, x)
    assert torch.equal(actual[1:], factor[1:])
    square = factor.square().mean() * x.square().sum()
    torch.testing.assert_close((actual[:1] @ x.T).square(), square.view(1, 1), rtol=1e-9, atol=0)
    assert torch.equal(whitened_factor(factor, torch.zeros_like(x)), factor)


def test_convolutions_are_whitened_over_patches():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Flatten(), nn.LazyLinear(3)).double()
    x = torch.randn(8, 2, 6, 6, dtype=torch.float64) + 0.5
    layers(x)
    adapter = AdapterModel(get_peft_model(layers, LoraConfig(r=3, target_modules=["0"])).double())
    factor = factor_of(adapter, whitened_factors(adapter, adapter.vector(), x))
    products = nn.functional.conv2d(x, factor, stride=2, padding=1).transpose(0, 1).flatten(1)
    moment = products @ products.T / products.shape[1]
    torch.testing.assert_close(moment, moment[0, 0] * torch.eye(3, dtype=torch.float64), rtol=1e-9, atol=1e-12)


class Tokens(nn.Module):
    """A classifier of the mean of visible tokens."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, tokens, attention_mask):
        weight = attention_mask.unsqueeze(2) / attention_mask.sum(1).view(-1, 1, 1)
        return (self.layer(tokens) * weight).sum(1)


def test_hidden_tokens_do_not_count():
    torch.manual_seed(0)
    adapter = AdapterModel(get_peft_model(Tokens(), LoraConfig(r=2, target_modules=["layer"])))
    tokens, mask = torch.randn(5, 4, 6), torch.tensor([[1, 1, 1, 0]]).repeat(5, 1)
    first, second = (
        whitened_factors(adapter, adapter.vector(), {"tokens": t, "attention_mask": mask})
        for t in (tokens, torch.where(mask.unsqueeze(2).bool(), tokens, 100.0))
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, adapter.vector())


def trained():
    model = perceptron()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).add_(0.1)
    return model


@pytest.mark.parametrize("model", [nn.Linear(6, 3).double(), trained()])
def test_without_a_factor_that_has_no_effect_it_is_refused(model):
    x, y = examples()
    message = r"^`lora_inputs` 'whitened' needs LoRA layers whose factor B is zero, got none\.$"
    with pytest.raises(ValueError, match=message):
        KalmanFilter(model, WHITENED).init(x)
    with pytest.raises(ValueError, match=message):
        bkf.fit(model, [(x, y)], WHITENED, start="trained", progress=False)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Embedding(10, 4), torch.arange(8)),
        (nn.Conv2d(4, 4, 3, groups=2), torch.randn(2, 4, 5, 5)),
        (nn.Conv2d(4, 4, 3, padding="same"), torch.randn(2, 4, 5, 5)),
        (nn.Conv1d(4, 4, 3), torch.randn(2, 4, 5)),
    ],
)
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")  # of PEFT, about merging
def test_other_layers_are_refused(layer, x):
    model = get_peft_model(nn.Sequential(layer, nn.Flatten()), LoraConfig(r=2, target_modules=["0"]))
    message = (
        r"^`lora_inputs` 'whitened' needs LoRA on Linear layers or on Conv2d with one group and paddings that are "
        rf"numbers, got {type(layer).__name__}\.$"
    )
    with pytest.raises(ValueError, match=message):
        KalmanFilter(model, WHITENED).init(x)


@pytest.mark.parametrize("settings", [{"initial_variance": 0.1, "bound_prior": False}, {"initial_logit_sd": 2.0}])
def test_a_fit_starts_from_the_whitened_factor(settings):
    """The same posterior, to the bit, as of a model that holds the factor, under the same prior."""
    x, y = examples()
    whitened = KalmanFilter(perceptron(), KalmanConfig(**settings, lora_inputs="whitened"))
    prior = whitened.init(x[:32]).prior
    assert torch.equal(prior.mean, whitened_factors(whitened.adapter, whitened.adapter.vector(), x[:32]))
    whitened.adapter.assign(prior.mean)  # `perceptron()` makes another model
    by_hand = KalmanFilter(whitened.adapter, KalmanConfig(**settings))
    expected = by_hand.init_from_prior(prior)
    batches = list(zip(x.split(4), y.split(4), strict=True))
    for inputs, targets in batches:
        expected, _ = by_hand.update(expected, inputs, targets)
    actual = bkf.fit(perceptron(), batches, whitened.config, progress=False)
    assert torch.equal(actual.mean_vector, expected.belief.mean)
    assert torch.equal(actual.kf.marginal_variance(actual.state), by_hand.marginal_variance(expected))
    assert torch.equal(actual.state.prior.mean, prior.mean)


def priors(logit_sd):
    """Filter and prior of the model with its own and with the whitened factor."""
    settings = {"initial_logit_sd": logit_sd, "likelihood": "gaussian"}
    filters = [KalmanFilter(perceptron(), KalmanConfig(**settings, lora_inputs=kind)) for kind in ("peft", "whitened")]
    return [(kf, kf.init(examples()[0]).prior) for kf in filters]


@pytest.mark.parametrize("logit_sd", [0.2, 50.0])
def test_widths_are_those_of_the_model_s_own_factor(logit_sd):
    """A's variance is the mean square of its own elements, and so is what bounds B's under a wide prior."""
    (own, before), (_, after) = priors(logit_sd)
    slices = {name.split(".")[-3]: where for name, where in own.adapter.slices().items() if "lora" in name}
    expected = own.adapter.vector()[slices["lora_A"]].square().mean().expand(12)
    torch.testing.assert_close(before.variance[slices["lora_A"]], expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(after.variance[slices["lora_A"]], expected, rtol=1e-9, atol=0)
    is_bound = torch.equal(before.variance[slices["lora_B"]], after.variance[slices["lora_B"]])
    assert is_bound == (logit_sd == 50.0)


def test_the_outputs_vary_as_configured():
    """The sum over parameters of variance times squared derivative is the squared sd of the outputs."""
    x = examples()[0]
    for kf, prior in priors(0.2):
        jacobian = kf.linearize(prior.mean, x).jacobian().dense().view(-1, len(prior.mean))
        assert float((jacobian.square() * prior.variance).sum(1).mean()) == pytest.approx(0.04, rel=1e-9)


def test_a_bank_whitens_for_every_candidate():
    x, y = examples()
    config = KalmanConfig.stream(tune_examples=20, lora_inputs="whitened")
    posterior = bkf.fit(perceptron(), iter(zip(x.split(4), y.split(4), strict=True)), config, progress=False)
    expected = whitened_factors(AdapterModel(perceptron()), AdapterModel(perceptron()).vector(), x[:32])
    assert torch.equal(posterior.state.prior.mean, expected)


def test_an_update_without_scale_uses_its_own_inputs():
    x, y = examples()
    kf = KalmanFilter(perceptron(), WHITENED)
    expected, _ = kf.update(kf.init(x), x, y)
    actual, _ = kf.update(kf.init(), x, y)
    assert torch.equal(actual.belief.mean, expected.belief.mean)
    assert torch.equal(kf.restart(actual).belief.mean, kf.init(x).belief.mean)


def test_it_is_saved_and_resumed(tmp_path):
    x, y = examples(dtype=torch.float32)
    batches = list(zip(x.split(4), y.split(4), strict=True))
    whole = bkf.fit(perceptron(torch.float32), batches, WHITENED, progress=False)
    bkf.fit(perceptron(torch.float32), batches[:9], WHITENED, progress=False, checkpoint=tmp_path / "c")
    whole.save_pretrained(tmp_path / "saved")
    loaded = bkf.Posterior.from_pretrained(tmp_path / "saved", perceptron(torch.float32).unload())
    assert loaded.config.lora_inputs == "whitened"
    assert torch.equal(loaded.mean_vector, whole.mean_vector)
    torch.testing.assert_close(loaded.predict(x).probs, whole.predict(x).probs, rtol=0, atol=0)
    state, _ = loaded.kf.update(loaded.state, x[:4], y[:4])
    expected, _ = whole.kf.update(whole.state, x[:4], y[:4])
    assert torch.equal(state.belief.mean, expected.belief.mean)
