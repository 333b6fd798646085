"""Fits: exact on linear models, what their history holds, and bad input."""

import dataclasses

import pytest
import torch
from oracles import linear_posterior
from small_problems import EXACT, X, Y, in_batches, linear, loader
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import bayes_kf as bkf
from bayes_kf import evaluation
from bayes_kf.models.zoo import digits_vit, lora_digits_vit


def test_fit_is_the_exact_posterior_of_a_linear_model():
    model = linear()
    posterior = bkf.fit(model, loader(), bkf.KalmanConfig(**EXACT, noise_variance=0.5), progress=False)
    for j in range(2):
        mean, covariance = linear_posterior(X, Y[:, j], model.weight[j].detach(), torch.eye(3).double(), 0.5)
        torch.testing.assert_close(posterior.mean["weight"][j], mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            posterior.covariance_matrix()[3 * j : 3 * j + 3, 3 * j : 3 * j + 3], covariance, rtol=1e-9, atol=1e-9
        )


def test_fit_from_trained_keeps_the_mean_and_learns_the_covariance():
    model = linear(3)
    labels = torch.randint(3, (40,), generator=torch.Generator().manual_seed(1))
    config = bkf.KalmanConfig(covariance="full", initial_variance=0.8)
    posterior = bkf.fit(model, loader(y=labels), config, start="trained", progress=False)
    assert torch.equal(posterior.mean["weight"], model.weight)
    probs = model(X).softmax(-1).detach()
    jacobian = torch.stack([torch.kron(torch.eye(3).double(), x[None]) for x in X])  # (B, 3, 9)
    fisher = jacobian.mT @ (torch.diag_embed(probs) - probs[:, :, None] * probs[:, None, :]) @ jacobian
    expected = torch.linalg.inv(torch.eye(9).double() / 0.8 + fisher.sum(0))
    torch.testing.assert_close(posterior.covariance_matrix(), expected, rtol=1e-9, atol=1e-9)


def test_history_is_per_example_and_per_update(fitted, digits):
    assert {k: len(v) for k, v in fitted.history.items()} == {
        "log_loss": 60, "correct": 60, "innovation": 15, "dof": 15, "damping": 15, "seconds": 15
    }  # fmt: skip
    assert (fitted.history["log_loss"] >= 0).all()
    assert (fitted.history["dof"] == 4 * 9).all()
    frozen = digits_vit()
    with torch.no_grad():
        first = frozen(digits[0].images[:4]).logits.log_softmax(-1)[torch.arange(4), digits[0].labels[:4]]
    torch.testing.assert_close(fitted.history["log_loss"][:4], -first, rtol=1e-4, atol=1e-5)


def test_progress_bar_shows_accuracy_loss_and_health(capsys):
    labels = torch.randint(3, (40,), generator=torch.Generator().manual_seed(1))
    bkf.fit(linear(3), loader(y=labels), bkf.KalmanConfig(), progress=True)
    shown = capsys.readouterr().err
    assert all(word in shown for word in ("accuracy 0.", "log loss", "innovation", "10/10"))


ONLINE = {"log_loss", "correct", "innovation", "dof"}  # what reports read as a stream's own scores


@pytest.fixture(scope="module")
def of_trained(digits):
    """A posterior over an adapter that was trained on the same examples before."""
    model = lora_digits_vit(rank=1)
    data = in_batches(8, digits[0], 48)
    with torch.no_grad():
        bkf.fit(model, data, bkf.KalmanConfig(), progress=False).apply_to(model)
    return bkf.fit(model, data, start="trained", progress=False)


def test_scores_of_training_data_are_not_prequential(of_trained, digits, tmp_path):
    losses = of_trained.history["training_log_loss"]
    images, labels = digits[0].images[:48], digits[0].labels[:48]
    logits = of_trained.adapter.outputs(of_trained.mean_vector, images)
    expected = nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-4)
    of_trained.save_pretrained(tmp_path / "saved")
    read = bkf.Posterior.from_pretrained(tmp_path / "saved", digits_vit())
    calibrated = of_trained.calibrate(in_batches(10, digits[1]))
    for posterior in (of_trained, read, calibrated):
        expected = {f"training_{name}" for name in ONLINE} | {"damping", "seconds", "evidence"}
        assert set(posterior.history) - {"size", "sharpness"} == expected
        report = evaluation.evaluate(posterior, in_batches(30, digits[1]), num_simulations=50)
        assert not {"online_accuracy", "prequential_log_loss", "innovation_ratio"} & set(report.scores)
        assert not {"online", "innovation"} & set(report.sections.drawings)
        page = report.to_html()
        for title in ("Innovation", "The filter was", "Online accuracy", "Prequential", "Learning online"):
            assert title not in page


def test_training_scores_saved_by_an_earlier_version_are_renamed(of_trained, tmp_path):
    named = {name.removeprefix("training_"): values for name, values in of_trained.history.items()}
    old = dataclasses.replace(of_trained, history=named)
    old.save_pretrained(tmp_path / "saved")
    read = bkf.Posterior.from_pretrained(tmp_path / "saved", digits_vit())
    assert set(read.history) == set(of_trained.history)


def test_scores_of_the_first_of_several_passes_are_prequential(digits, tmp_path, capsys):
    data = list(in_batches(8, digits[0], 48))
    plain = bkf.fit(lora_digits_vit(rank=1), data, bkf.KalmanConfig(), progress=False)
    several = [bkf.KalmanConfig(passes=2), bkf.KalmanConfig.dataset(initial_logit_sd=4.0, mean_passes=1)]
    for config in several:
        actual = bkf.fit(lora_digits_vit(rank=1), data, config, progress=True)
        assert set(actual.history) >= ONLINE
        assert not any(name.startswith("training_") for name in actual.history)
        actual.save_pretrained(tmp_path / "saved")
        read = bkf.Posterior.from_pretrained(tmp_path / "saved", digits_vit())
        assert torch.equal(read.history["log_loss"], actual.history["log_loss"])
    assert torch.equal(bkf.fit(lora_digits_vit(rank=1), data, several[0], progress=False).history["log_loss"],
                       plain.history["log_loss"])  # fmt: skip
    bar = capsys.readouterr().err
    assert "training log loss" in bar[bar.index("pass 2 of 2") :]


BAD_FITS = [
    ([], {}, r"^`loader` must yield at least one batch, got none\.$"),
    ([(X, Y)], {"start": "warm"}, r"`start` must be one of prior, trained, got 'warm'"),
    ([X], {}, r"`loader` must yield targets with every batch, got none in batch 0"),
    ([(X, Y), (X, Y[:3])], {}, r"`targets` must have shape \(40, 2\), got \(3, 2\)\. \(batch 1 of `loader`\)"),
    ([(X, Y, X)], {}, r"`batch` must be \(inputs, targets\) or a mapping with `labels`, got tuple of 3 parts"),
    (["text"], {}, r"`batch` must be .* got str"),
]


@pytest.mark.parametrize(("data", "options", "message"), BAD_FITS)
def test_bad_fits(data, options, message):
    model = linear()
    weight = model.weight.clone()
    with pytest.raises(ValueError, match=message):
        bkf.fit(model, data, bkf.KalmanConfig(**EXACT), progress=False, **options)
    assert torch.equal(model.weight, weight)


def test_a_fit_that_diverges_raises_the_posterior_before_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3))
    config = bkf.KalmanConfig(initial_variance=1e30, bound_prior=False, damping=False, expansion="mean")
    labels = torch.randint(3, (40,), generator=torch.Generator().manual_seed(1))
    with pytest.raises(bkf.DivergenceError) as caught:
        bkf.fit(model, loader(X.float(), labels, 1), config, progress=False)
    assert type(caught.value) is bkf.inference.FitDivergenceError
    refused = caught.value.__cause__  # the filter's own error, which knows no posterior
    assert type(refused) is bkf.DivergenceError
    assert refused.posterior is None
    assert (refused.step, refused.cause, str(refused)) == (caught.value.step, caught.value.cause, str(caught.value))
    assert refused.state is caught.value.state is caught.value.posterior.state
    posterior = caught.value.posterior
    assert len(posterior.history["log_loss"]) == caught.value.step
    assert torch.isfinite(posterior.mean_vector).all()


def test_streams_without_a_length():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(zip(X, Y, strict=True))

    posterior = bkf.fit(linear(), DataLoader(Stream(), batch_size=4), bkf.KalmanConfig(**EXACT), progress=False)
    assert len(posterior.history["log_loss"]) == 40
    again = bkf.fit(linear(), iter([(X, Y)]), bkf.KalmanConfig(**EXACT), progress=False)
    torch.testing.assert_close(again.mean_vector, posterior.mean_vector, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="`loader` must be iterable, got NoneType"):
        bkf.fit(linear(), None, bkf.KalmanConfig(**EXACT))


def test_mappings_with_tensors_that_are_not_batched():
    class Positioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, position_ids, x):
            return self.head(x + position_ids)

    batches = [{"position_ids": torch.ones(1, 3), "x": X[i : i + 4].float(), "labels": Y[i : i + 4]} for i in (0, 4, 8)]
    posterior = bkf.fit(Positioned(), batches, bkf.KalmanConfig(likelihood="gaussian"), progress=False)
    assert len(posterior.history["log_loss"]) == 12
