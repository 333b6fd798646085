"""Choosing settings on held-out data: what is held out, what is chosen, and that it is learned in the end."""

import dataclasses
import math
import sys

import pytest
import torch
from oracles import linear_posterior
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

import bayes_kf as bkf
from bayes_kf.inference.filtering.state import DivergenceError
from bayes_kf.inference.fitting.selection import heldout_config_selection

G = torch.Generator().manual_seed(0)
X = torch.randn(90, 3, generator=G).double()
Y = (X @ torch.randn(3, 4, generator=G).double() + 0.5 * torch.randn(90, 4, generator=G).double()).argmax(1)
DATA = TensorDataset(torch.arange(90), Y)


def batches(size=5):
    return list(zip(X.split(size), Y.split(size), strict=True))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)).double()


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_data_set_is_split_into_seven_eighths_and_the_rest(shuffle):
    parts = heldout_config_selection.split_loader(DataLoader(DATA, batch_size=4, shuffle=shuffle, drop_last=True))
    fitted, held_out = ([inputs.tolist() for inputs, _ in part] for part in parts)
    first, second = ({number for batch in part for number in batch} for part in (fitted, held_out))
    assert not first & second
    assert (len(first), len(second)) == (79, 11)
    assert first | second == set(range(90))
    assert max(map(len, fitted)) == max(map(len, held_out)) == 4
    again = [inputs.tolist() for inputs, _ in parts.fitted]
    assert (again != fitted) == shuffle  # its own order every time, over the same examples
    assert {number for batch in again for number in batch} == first
    assert [inputs.tolist() for inputs, _ in parts.heldout] == held_out


def test_of_a_list_every_eighth_batch_is_held_out():
    parts = heldout_config_selection.split_loader(list(range(17)))
    assert parts.heldout == [7, 15]
    assert sorted(parts.fitted + parts.heldout) == list(range(17))


class Streaming(IterableDataset):
    def __iter__(self):
        yield from zip(X, Y, strict=True)


@pytest.mark.parametrize(
    "loader",
    [
        iter(batches()),
        batches()[:7],
        DataLoader(Streaming(), batch_size=4),
        DataLoader(DATA, batch_size=None),
        DataLoader(DATA, sampler=WeightedRandomSampler([1.0] * 90, 90)),
        DataLoader(DATA, sampler=torch.utils.data.RandomSampler(DATA, replacement=True)),
        DataLoader(DATA, sampler=torch.utils.data.RandomSampler(DATA, num_samples=20)),
        DataLoader(TensorDataset(X[:7], Y[:7])),
    ],
)
def test_loaders_that_cannot_be_split_get_one_pass_by_default(loader):
    assert heldout_config_selection.split_loader(loader) is None
    with pytest.raises(
        ValueError, match=r"`loader` must be a DataLoader over a data set or a list of at least 8 batch"
    ):
        bkf.fit(network(), loader, [bkf.KalmanConfig()], progress=False)


def test_without_settings_a_stream_gets_one_pass():
    posterior = bkf.fit(network(), iter(batches()), progress=False)
    evidence = posterior.history["evidence"]
    likeliest, chosen = (3.0, 1.0, 0.3)[int(evidence.argmax())], posterior.config.initial_logit_sd
    assert len(evidence) == 3
    assert chosen in (3.0, 1.0, 0.3)
    assert chosen <= likeliest  # the narrowest within the margin
    stream = bkf.KalmanConfig.stream(tune=None, initial_logit_sd=chosen)
    assert posterior.config == stream
    assert (stream.initial_bias_sd, stream.tune_margin, stream.temperature_margin) == (1.0, 1.0, 0.01)
    assert posterior.state.examples == len(posterior.history["log_loss"]) == 90


@pytest.mark.parametrize(("signal", "expected"), [(1.0, 3.0), (0.0, 0.3)])
def test_without_settings_a_stream_chooses_its_prior_width(signal, expected):
    """Labels that the inputs decide ask for a wide prior, coins for a narrow one."""
    g = torch.Generator().manual_seed(3)
    inputs = torch.randn(160, 3, generator=g, dtype=torch.float64)
    coins = torch.randn(160, 2, generator=g, dtype=torch.float64)
    labels = (8.0 * signal * torch.stack([inputs[:, 0], -inputs[:, 0]], 1) + (1.0 - signal) * coins).argmax(1)
    model = nn.Linear(3, 2).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    posterior = bkf.fit(model, zip(inputs.split(1), labels.split(1), strict=True), progress=False)
    assert posterior.config.initial_logit_sd == expected


def test_a_trained_adapter_makes_no_choice_on_a_stream():
    posterior = bkf.fit(network(), iter(batches()), start="trained", progress=False)
    assert "evidence" in posterior.history  # of the prior's precision
    assert posterior.config.tune is None


def test_the_candidate_that_predicts_the_held_out_part_best_is_chosen_at_its_size_and_sharpness():
    good = bkf.KalmanConfig(initial_logit_sd=3.0)
    stuck = bkf.KalmanConfig(initial_variance=1e-9)
    posterior = bkf.fit(network(), batches(), [stuck, good], progress=False)
    parts = heldout_config_selection.split_loader(batches())
    fits = [
        bkf.fit(network(), parts.fitted, config, progress=False).calibrate(parts.heldout) for config in (stuck, good)
    ]
    losses = [-float(alone.predict_loader(parts.heldout).log_prob.mean()) for alone in fits]
    torch.testing.assert_close(posterior.history["held_out_log_loss"], torch.tensor(losses).double())
    assert losses[1] < 0.8 * losses[0]
    chosen = {"temperature": 1.0, "softmax_temperature": fits[1].softmax_temperature}
    assert posterior.config == dataclasses.replace(good, **chosen)
    assert torch.equal(posterior.history["size"], fits[1].history["size"])


def test_a_temperature_given_as_a_number_does_not_change():
    configs = [bkf.KalmanConfig(temperature=0.7), bkf.KalmanConfig(initial_variance=1e-9, temperature=0.7)]
    assert bkf.fit(network(), batches(), configs, progress=False).temperature == 0.7


def test_the_best_candidate_is_updated_with_the_held_out_part():
    """Of a linear model, so that the posterior is that of all examples."""
    torch.manual_seed(0)
    model, targets = nn.Linear(3, 1, bias=False).double(), X[:, :1] + 0.1 * X[:, 1:2]
    data = list(zip(X.split(5), targets.split(5), strict=True))
    setting = {"likelihood": "gaussian", "noise_variance": 0.3, "covariance": "full", "temperature": 1.0}
    narrow, wide = (bkf.KalmanConfig(**setting, initial_variance=v) for v in (1e-6, 0.7))
    posterior = bkf.fit(model, data, [narrow, wide], progress=False)
    mean, matrix = linear_posterior(X, targets[:, 0], model.weight.detach()[0], 0.7 * torch.eye(3).double(), 0.3)
    torch.testing.assert_close(posterior.mean_vector, mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(posterior.covariance_matrix(), matrix, rtol=1e-9, atol=1e-9)
    assert len(posterior.history["log_loss"]) == posterior.state.examples == 90


def test_the_default_is_a_mixture_of_two_and_does_not_change_the_model():
    model = network()
    before = [p.clone() for p in model.parameters()]
    posterior = bkf.fit(model, batches(), progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert isinstance(posterior, bkf.MixturePosterior)
    assert [member.state.examples for member in posterior.members] == [90, 90]
    assert float(-posterior.predict(X, targets=Y).log_prob.mean()) < 0.5 * math.log(4)  # half of what chance has


def test_the_default_leaves_a_head_that_is_right_as_it_is():
    """Labels that are half coins cannot be predicted better than by the head before the fit, at its best sharpness."""
    g = torch.Generator().manual_seed(0)
    inputs = torch.randn(1120, 6, generator=g).double()
    decided = (inputs[:, :2].argmax(1) == 0).long()
    coins = torch.where(torch.rand(1120, generator=g) < 0.5, torch.randint(2, (1120,), generator=g), decided)
    model = nn.Linear(6, 2).double()
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
        model.weight[0, 1] = model.weight[1, 0] = 1.0
    train, test = (inputs[:120], coins[:120]), (inputs[120:], coins[120:])
    posterior = bkf.fit(model, list(zip(train[0].split(4), train[1].split(4), strict=True)), progress=False)
    loss = -float(posterior.predict(test[0], targets=test[1]).log_prob.mean())
    outputs = model(test[0]).detach()
    best = min(float(nn.functional.cross_entropy(outputs / s, test[1])) for s in torch.linspace(0.3, 5, 48))
    assert loss < best + 0.05


@pytest.mark.parametrize(("outputs", "expected"), [(40, "sampled"), (4, "exact")])
def test_many_outputs_of_a_stream_and_of_a_trained_adapter_get_sampled_curvature(outputs, expected):
    torch.manual_seed(0)
    model, data = nn.Linear(3, outputs).double(), list(zip(X.split(5), (torch.arange(90) % 4).split(5), strict=True))
    stream, trained = bkf.fit(model, iter(data), progress=False), bkf.fit(model, data, start="trained", progress=False)
    assert (stream.config.curvature, trained.config.curvature) == (expected, expected)
    assert stream.state.examples == trained.state.examples == 90  # none is lost to looking
    asked = bkf.fit(model, data, bkf.KalmanConfig(), start="trained", progress=False)
    assert asked.config.curvature == "exact"


def test_a_candidate_that_diverges_is_left_out(monkeypatch):
    module = sys.modules["bayes_kf.inference.fitting.fit"]  # the package has the function under that name
    real = module.fit_config

    def failing(model, loader, config, *rest):
        if config.rank in refused:
            raise DivergenceError(0, "it was told to", None)
        return real(model, loader, config, *rest)

    monkeypatch.setattr(module, "fit_config", failing)
    configs, refused = [bkf.KalmanConfig(rank=3), bkf.KalmanConfig(rank=4)], {3}
    posterior = bkf.fit(network(), batches(), configs, progress=False)
    assert posterior.config.rank == 4
    assert posterior.history["held_out_log_loss"].isinf().tolist() == [True, False]
    refused = {3, 4}
    with pytest.raises(DivergenceError, match="it was told to"):
        bkf.fit(network(), batches(), configs, progress=False)


@pytest.mark.parametrize(
    ("configs", "start", "message"),
    [
        ([], "prior", r"`config` must be a KalmanConfig or several, got none\."),
        ([3], "prior", r"`config` must be a KalmanConfig, got int\."),
        (7, "prior", r"`config` must be a KalmanConfig, got int\."),
        (
            {"covariance": "full"},
            "prior",
            r"`config` must be a KalmanConfig, got dict; `KalmanConfig\(\*\*settings\)` makes one\.",
        ),
        ({"covariance": "full"}, "trained", r"`config` must be a KalmanConfig, got dict"),
        ("stream", "prior", r"`config` must be a KalmanConfig, got str\."),
        (
            [bkf.KalmanConfig()],
            "trained",
            r"`config` must be one KalmanConfig with `start` 'trained', got several\.",
        ),
        (
            [bkf.KalmanConfig(), bkf.KalmanConfig(likelihood="gaussian")],
            "prior",
            r"`config` must have one `likelihood` in all candidates, got categorical, gaussian\.",
        ),
    ],
)
def test_bad_candidates(configs, start, message):
    with pytest.raises(ValueError, match=message):
        bkf.fit(network(), batches(), configs, start=start, progress=False)


def test_a_held_out_batch_without_targets_raises_at_any_temperature():
    batches = [(torch.randn(2, 3), torch.tensor([0, 1])) for _ in range(7)] + [(torch.randn(2, 3), None)]
    for temperature in ("prequential", 0.1):
        with pytest.raises(ValueError, match="must yield targets"):
            bkf.fit(nn.Linear(3, 2), batches, [bkf.KalmanConfig(temperature=temperature)], progress=False)


def test_both_parts_keep_the_worker_init_function():
    data = TensorDataset(torch.randn(43, 3), torch.arange(43) % 2)
    hook = lambda worker: None  # noqa: E731
    parts = heldout_config_selection.split_loader(DataLoader(data, batch_size=8, shuffle=True, worker_init_fn=hook))
    assert parts.fitted.worker_init_fn is parts.heldout.worker_init_fn is hook
