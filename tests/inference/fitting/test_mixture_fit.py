"""``fit_mixture``: what its members learn, what the held-out part chooses, and what it refuses."""

import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bayes_kf as bkf
from bayes_kf.inference.fitting import mixture_fit
from bayes_kf.inference.fitting.defaults.default_prior import NEW
from bayes_kf.inference.fitting.mixture_fit import default_members
from bayes_kf.inference.fitting.selection.heldout_config_selection import shuffled, split_loader
from bayes_kf.models.adapter import AdapterModel


def data(number=240, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = 1.5 * torch.randn(number, 2, generator=generator)
    logits = torch.stack([3 * x[:, 0], 3 * x[:, 1], torch.zeros(number)], 1)
    return x, torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.fixture(scope="module")
def mixture():
    loader = DataLoader(TensorDataset(*data()), batch_size=4, shuffle=True)
    return bkf.fit_mixture(network(), loader, progress=False)


def test_every_member_learns_all_examples_once(mixture):
    assert {member.state.examples for member in mixture.members} == {240}
    assert {member.config.initial_spread for member in mixture.members} == {"bounded"}
    assert mixture.weights == (0.5, 0.5)
    assert len({member.softmax_temperature for member in mixture.members}) == 1
    for member in mixture.members:
        value, low, high = member.history["size"].tolist()
        assert low <= value <= high
        assert len(member.history["held_out_log_loss"]) == 6  # before the first of five passes, and after each
        assert member.temperature == 1.0


def test_the_means_find_the_classes_of_a_problem_with_known_probabilities(mixture):
    x, labels = data(2000, seed=1)
    logits = torch.stack([3 * x[:, 0], 3 * x[:, 1], torch.zeros(2000)], 1)
    right, best = ((p.argmax(1) == labels).double().mean() for p in (mixture.predict(x, "mean").probs, logits))
    assert float(right) > float(best) - 0.02  # the best possible accuracy is 0.84


def test_the_same_call_gives_the_same_mixture_and_the_model_stays():
    x, y = data(80)
    batches = [(x[k : k + 20], y[k : k + 20]) for k in range(0, 80, 10)]  # more than 16 examples, which are divided
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one, two = (bkf.fit_mixture(model, batches, progress=False) for _ in range(2))
    assert one.weights == two.weights
    for first, second in zip(one.members, two.members, strict=True):
        assert torch.equal(first.mean_vector, second.mean_vector)
        assert torch.equal(first.variance_vector, second.variance_vector)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_members_of_a_regression():
    # the held-out eighth has 80 examples; with fewer, the chosen noise variance is not near 0.25
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(640, 3, generator=generator)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.5 * torch.randn(640, 1, generator=generator)
    common = {"likelihood": "gaussian", "noise_variance": "estimated", "covariance": "full", "mean_passes": 3}
    configs = [bkf.KalmanConfig(**common), bkf.KalmanConfig(**common, initial_logit_sd=10.0)]
    loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
    mixture = bkf.fit_mixture(nn.Linear(3, 1), loader, configs, progress=False)
    for member in mixture.members:
        torch.testing.assert_close(member.mean["weight"], torch.tensor([[1.0, -2.0, 0.5]]), rtol=0, atol=0.15)
        assert float(member.likelihood.noise_variance) == pytest.approx(0.25, rel=0.3)
    new = torch.randn(2000, 3, generator=generator)
    targets = new @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.5 * torch.randn(2000, 1, generator=generator)
    prediction = mixture.predict(new, targets=targets)
    inside = ((prediction.mean - targets).abs() < 1.645 * prediction.variance.sqrt()).double().mean()
    assert 0.86 < float(inside) < 0.94


def test_a_member_that_diverges_is_left_out():
    x, y = data(96)
    batches = [(x[k : k + 8], y[k : k + 8]) for k in range(0, 96, 8)]
    wild = bkf.KalmanConfig(initial_variance=1e30, bound_prior=False, damping=False, covariance="diagonal")
    mixture = bkf.fit_mixture(network(), batches, [wild, bkf.KalmanConfig(mean_passes=1)], progress=False)
    assert [member.config.initial_variance for member in mixture.members] == [None]
    with pytest.raises(bkf.DivergenceError):
        bkf.fit_mixture(network(), batches, [wild], progress=False)


def test_loaders_that_cannot_be_split_are_refused():
    x, y = data(16)
    for loader in (iter([(x, y)]), [(x, y)], 5):
        with pytest.raises(ValueError, match="`loader` must be a DataLoader over a data set or a list of at least 8"):
            bkf.fit_mixture(network(), loader, progress=False)
    with pytest.raises(ValueError, match="`config` must be a KalmanConfig or several, got none"):
        bkf.fit_mixture(network(), [(x[k : k + 2], y[k : k + 2]) for k in range(0, 16, 2)], [], progress=False)


@pytest.mark.parametrize("as_list", [True, False])
def test_passes_over_a_split_have_other_orders_and_the_same_examples(as_list):
    x = torch.arange(64.0)[:, None]
    y = torch.arange(64) % 3
    loader = DataLoader(TensorDataset(x, y), batch_size=32)
    split = shuffled(split_loader([(x[k : k + 8], y[k : k + 8]) for k in range(0, 64, 8)] if as_list else loader), 4)
    passes = [[batch[0].flatten().tolist() for batch in split.fitted] for _ in range(2)]
    held = [value for batch in split.heldout for value in batch[0].flatten().tolist()]
    assert passes[0] != passes[1]
    for batches in passes:
        assert {len(batch) for batch in batches} == {4}
        assert sorted(sum(batches, held)) == list(range(64))


@pytest.mark.parametrize("as_list", [True, False])
def test_the_eight_parts_hold_every_example_once(as_list):
    x, y = torch.arange(67.0)[:, None], torch.arange(67) % 3
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    given = list(loader) if as_list else loader
    parts = list[float]()
    for part in range(8):
        split = split_loader(given, part)
        fitted, held = ([v for batch in side for v in batch[0].flatten().tolist()] for side in split)
        assert sorted(fitted + held) == list(range(67))
        parts += held
    assert len(set(parts)) == len(parts)
    assert len(parts) >= 64  # an eighth is rounded down


def test_members_start_from_other_factors_and_have_other_held_out_examples():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3))
    model = get_peft_model(layers, LoraConfig(r=4, target_modules=["0"], modules_to_save=["2"]))
    loader = DataLoader(TensorDataset(*data()), batch_size=8, shuffle=True)
    mixture = bkf.fit_mixture(model, loader, members=3, progress=False)
    means = [member.state.prior.mean for member in mixture.members]
    adapter = mixture.best.adapter
    assert torch.equal(means[0], adapter.vector())
    for name, where in adapter.slices().items():
        same = [torch.equal(means[0][where], mean[where]) for mean in means[1:]]
        assert same == [".lora_A." not in name] * 2
    outputs = [adapter.outputs(mean, data()[0]) for mean in means]
    assert torch.equal(outputs[0], outputs[1])
    with pytest.raises(ValueError, match=r"`members` must be a whole number >= 1, got 0\."):
        bkf.fit_mixture(model, loader, members=0, progress=False)


@pytest.mark.parametrize(("outputs", "expected"), [(3, "exact"), (4, "sampled")])
def test_more_than_three_outputs_get_sampled_curvature(outputs, expected):
    x = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
    members = default_members(
        AdapterModel(nn.Linear(3, outputs)), [(x[k : k + 4], torch.arange(4) % 3) for k in range(8)]
    )
    assert [member.curvature for member in members] == [expected] * 2
    assert [member.seed for member in members] == [0, 1]


def noise(count=128, seed=0):
    """Labels that have nothing to do with the inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 12, generator=generator)
    return x, torch.randint(2, (count,), generator=generator)


def deep(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))


def test_a_prior_under_which_nothing_is_learned_is_narrowed_for_all_members():
    x, y = noise()
    loader = [(x[k::16], y[k::16]) for k in range(16)]
    posterior = bkf.fit_mixture(deep(), loader, progress=False)
    assert {member.config.initial_logit_sd for member in posterior.members} == {1.0}
    wide = dataclasses.replace(posterior.members[0].config, **NEW)
    others, labels = noise(400, seed=1)
    before = bkf.fit_mixture(deep(), loader, [wide, dataclasses.replace(wide, seed=1)], progress=False)
    losses = [
        float(-fitted.predict(others).probs.log().gather(1, labels[:, None]).mean()) for fitted in (posterior, before)
    ]
    assert losses[0] < losses[1]
    assert losses[0] < 0.75  # chance is 0.693


def test_a_prior_under_which_something_is_learned_stays():
    x, _ = noise()
    y = (x[:, 0] + x[:, 1] > 0).long()
    posterior = bkf.fit_mixture(deep(), [(x[k::16], y[k::16]) for k in range(16)], progress=False)
    assert {member.config.initial_logit_sd for member in posterior.members} == {5.0}


def test_a_model_that_is_surely_wrong_keeps_its_wide_prior(monkeypatch):
    """A narrow prior would keep it where it is: its pass is predicted worse, so it does not count."""
    x, _ = noise(64)
    y = (x[:, 0] > 0).long()
    wrong = nn.Linear(12, 2)
    with torch.no_grad():
        wrong.weight.zero_()
        wrong.weight[:, 0] = torch.tensor([8.0, -8.0])
    asked = []
    monkeypatch.setattr(mixture_fit, "learned_nothing", lambda losses, _: asked.append(losses) or True)
    posterior = bkf.fit_mixture(wrong, [(x[k::16], y[k::16]) for k in range(16)], progress=False)
    assert len(asked) == 1
    assert {member.config.initial_logit_sd for member in posterior.members} == {5.0}


def test_given_configs_are_not_narrowed():
    x, y = noise()
    configs = [bkf.KalmanConfig(seed=seed, mean_passes=1, **NEW) for seed in range(2)]
    posterior = bkf.fit_mixture(deep(), [(x[k::16], y[k::16]) for k in range(16)], configs, progress=False)
    assert {member.config.initial_logit_sd for member in posterior.members} == {5.0}
