"""Without a config, the targets decide the likelihood; a config is used as it is."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bayes_kf as bkf
from bayes_kf.inference.fitting.defaults.default_likelihood import REAL, default_likelihood

torch.manual_seed(0)
X = torch.randn(80, 3)
Y = X @ torch.randn(3, 1) + 0.3 * torch.randn(80, 1)
LOADERS = {
    "list": lambda y: list(zip(X.split(8), y.split(8), strict=True)),
    "short list": lambda y: list(zip(X.split(20), y.split(20), strict=True)),
    "DataLoader": lambda y: DataLoader(TensorDataset(X, y), batch_size=8),
    "iterator": lambda y: iter(list(zip(X.split(8), y.split(8), strict=True))),
    "mappings": lambda y: [{"input": x, "labels": part} for x, part in zip(X.split(8), y.split(8), strict=True)],
}


def fitted(outputs, loader, **settings):
    torch.manual_seed(1)
    return bkf.fit(nn.Linear(3, outputs), loader, progress=False, **settings)


@pytest.mark.filterwarnings("ignore:.*temperature:UserWarning")
@pytest.mark.parametrize("kind", LOADERS)
def test_floats_are_real_numbers(kind):
    posterior = fitted(1, LOADERS[kind](Y))
    assert (posterior.config.likelihood, posterior.config.noise_variance) == ("gaussian", "estimated")
    assert 0.2 < float(posterior.likelihood.noise_variance) ** 0.5 < 0.8  # of 0.3; rough after a single pass
    assert posterior.predict(X).interval(0.9).lower.shape == (80, 1)


def test_a_trained_start_and_a_checkpoint_infer_it_too(tmp_path):
    assert fitted(1, LOADERS["list"](Y), start="trained").config.likelihood == "gaussian"
    first = fitted(1, LOADERS["list"](Y[:, 0]), checkpoint=tmp_path / "p")
    assert first.config.likelihood == "gaussian"
    again = fitted(1, LOADERS["list"](Y[:, 0]), checkpoint=tmp_path / "p")  # nothing is left to learn
    assert torch.equal(again.mean_vector, first.mean_vector)


@pytest.mark.filterwarnings("ignore:.*temperature:UserWarning")
def test_integers_are_classes_and_bools_are_answers():
    assert fitted(2, LOADERS["list"]((Y[:, 0] > 0).long())).config.likelihood == "categorical"
    assert fitted(1, LOADERS["list"](Y > 0)).config.likelihood == "bernoulli"


def test_a_config_is_used_as_it_is():
    with pytest.raises(ValueError, match=r"got dtype torch\.float32; for numbers, set `likelihood` 'gaussian'"):
        fitted(2, LOADERS["list"](Y), config=bkf.KalmanConfig())
    config = bkf.KalmanConfig(likelihood="student_t", noise_variance=0.1)
    assert fitted(1, LOADERS["list"](Y), config=config).config.likelihood == "student_t"


def test_floats_that_are_all_zero_or_one_need_a_config():
    binary = (Y > 0).float()
    message = (
        r"^`config` must say what float targets that are all 0 or 1 mean, by `likelihood` 'bernoulli' or 'gaussian'"
    )
    for kind in ("list", "iterator"):
        with pytest.raises(ValueError, match=message):
            fitted(1, LOADERS[kind](binary))
    assert fitted(1, LOADERS["list"](binary), config=bkf.KalmanConfig(likelihood="bernoulli")).state.examples == 80


@pytest.mark.parametrize("scale", [1e-3, 100.0])
def test_targets_of_another_size_are_warned_of(scale):
    with pytest.warns(UserWarning, match=r"^the targets of the first batch have a root mean square of .*: standardize"):
        default_likelihood([scale * Y])


def test_later_batches_decide_if_the_first_is_binary():
    assert default_likelihood([torch.tensor([0.0]), torch.tensor([1.0]), torch.tensor([0.5])]) == REAL
    assert default_likelihood([None]) == default_likelihood([[1, 2]]) == default_likelihood([]) == {}
