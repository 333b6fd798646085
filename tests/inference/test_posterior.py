"""Fitting, predicting, drawing and persisting, on linear models with exact answers and on a real PEFT transformer."""

import dataclasses
import json
import math

import pytest
import torch
from oracles import linear_posterior
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import bayes_kf as bkf
from bayes_kf import evaluation
from bayes_kf.data import uci_digits_split
from bayes_kf.inference.covariance.gaussian_sampling import gaussian_draws
from bayes_kf.inference.filtering import tempering
from bayes_kf.inference.linearization.linearized_batch import LinearizedBatch
from bayes_kf.inference.measurement_model.noise import likelihood
from bayes_kf.inference.predictive import prediction
from bayes_kf.models.likelihood import Categorical, Gaussian
from bayes_kf.models.zoo import digits_vit, lora_digits_vit

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(40, 3, generator=G).double(), torch.randn(40, 2, generator=G).double()
EXACT = {"likelihood": "gaussian", "covariance": "full", "initial_variance": 1.0, "temperature": 1.0}


def linear(outputs=2, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(3, outputs, bias=False).double()


def loader(x=X, y=Y, size=4):
    return DataLoader(TensorDataset(x, y), batch_size=size)


@pytest.fixture(scope="module")
def digits():
    stream, held_out = uci_digits_split()
    return stream, held_out


@pytest.fixture(scope="module")
def fitted(digits):
    stream, _ = digits
    data = TensorDataset(stream.images[:60], stream.labels[:60])
    return bkf.fit(lora_digits_vit(rank=2), DataLoader(data, batch_size=4), bkf.KalmanConfig(), progress=False)


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
    """A posterior over an adapter that had learned the same examples before."""
    model = lora_digits_vit(rank=1)
    data = in_batches(8, digits[0], 48)
    with torch.no_grad():
        bkf.fit(model, data, bkf.KalmanConfig(), progress=False).apply_to(model)
    return bkf.fit(model, data, start="trained", progress=False)


def test_scores_of_data_that_the_adapter_had_seen_are_not_prequential(of_trained, digits, tmp_path):
    losses = of_trained.history["training_log_loss"]
    images, labels = digits[0].images[:48], digits[0].labels[:48]
    logits = of_trained.adapter.outputs(of_trained.mean_vector, images)
    expected = nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-4)
    of_trained.save_pretrained(tmp_path / "saved")
    read = bkf.Posterior.from_pretrained(tmp_path / "saved", digits_vit())
    calibrated = of_trained.calibrate(in_batches(10, digits[1]))
    for posterior in (of_trained, read, calibrated):
        assert set(posterior.history) == {f"training_{name}" for name in ONLINE} | {"damping", "seconds", "evidence"}
        report = evaluation.evaluate(posterior, in_batches(30, digits[1]), num_simulations=50)
        assert not {"online_accuracy", "prequential_log_loss", "innovation_ratio"} & set(report.scores)
        assert not {"online", "innovation"} & set(report.sections.drawings)
        page = report.to_html()
        for title in ("Innovation", "The filter was", "Online accuracy", "Prequential", "Learning online"):
            assert title not in page


def test_a_trained_adapter_s_scores_that_an_earlier_version_saved_are_recognized(of_trained, tmp_path):
    named = {name.removeprefix("training_"): values for name, values in of_trained.history.items()}
    old = dataclasses.replace(of_trained, history=named)
    old.save_pretrained(tmp_path / "saved")
    read = bkf.Posterior.from_pretrained(tmp_path / "saved", digits_vit())
    assert set(read.history) == set(of_trained.history)


def test_first_pass_of_several_is_prequential_and_stays_so(digits, tmp_path, capsys):
    data = list(in_batches(8, digits[0], 48))
    plain = bkf.fit(lora_digits_vit(rank=1), data, bkf.KalmanConfig(), progress=False)
    several = [bkf.KalmanConfig(passes=2), bkf.KalmanConfig.dataset(initial_logit_sd=4.0, mean_passes=1)]
    for config in several:
        found = bkf.fit(lora_digits_vit(rank=1), data, config, progress=True)
        assert set(found.history) >= ONLINE
        assert not any(name.startswith("training_") for name in found.history)
        found.save_pretrained(tmp_path / "saved")
        read = bkf.Posterior.from_pretrained(tmp_path / "saved", digits_vit())
        assert torch.equal(read.history["log_loss"], found.history["log_loss"])
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


def test_divergence_in_fit_keeps_the_belief_before_it():
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


@pytest.mark.parametrize("method", ["linearized", "probit"])
def test_gaussian_predictions_are_exact(method):
    posterior = bkf.fit(linear(), loader(), bkf.KalmanConfig(**EXACT, noise_variance=0.5), progress=False)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(3)).double()
    y = torch.randn(5, 2, generator=torch.Generator().manual_seed(4)).double()
    _, covariance = linear_posterior(X, Y[:, 0], torch.zeros(3).double(), torch.eye(3).double(), 0.5)
    spread = torch.einsum("bi,ij,bj->b", x, covariance, x)
    prediction = posterior.predict(x, method, targets=y)
    torch.testing.assert_close(prediction.epistemic, spread[:, None].expand(5, 2), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(prediction.aleatoric, torch.full((5, 2), 0.5).double())
    torch.testing.assert_close(prediction.variance, prediction.epistemic + 0.5)
    normal = torch.distributions.Normal(x @ posterior.mean["weight"].T, prediction.variance.sqrt())
    torch.testing.assert_close(prediction.log_prob, normal.log_prob(y).sum(-1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(prediction.entropy, normal.entropy().sum(-1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("covariance", ["diagonal", "low_rank", "full"])
@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_sampled_and_linearized_agree_on_a_linear_model(covariance, temperature):
    labels = torch.randint(3, (40,), generator=torch.Generator().manual_seed(1))
    config = bkf.KalmanConfig(covariance=covariance, initial_variance=1.0, temperature=temperature)
    posterior = bkf.fit(linear(3), loader(y=labels), config, progress=False)
    count, x = 20_000, X[:4]
    a, b = (posterior.predict(x, method, num_samples=count) for method in ("linearized", "sampled"))
    error = (a.samples.var(0) / count + b.samples.var(0) / count).sqrt()
    assert ((a.probs - b.probs).abs() < 5 * error).all()
    assert (a.epistemic - b.epistemic).abs().max() < 0.01
    probit = posterior.predict(x, "probit")
    assert (probit.probs - a.probs).abs().max() < 0.03
    assert probit.samples is None


def test_entropies_add_up_and_the_mean_has_no_epistemic_part(fitted, digits):
    images = digits[1].images[:50]
    drawn, mean = fitted.predict(images), fitted.predict(images, "mean")
    torch.testing.assert_close(drawn.aleatoric + drawn.epistemic, drawn.entropy)
    assert (drawn.epistemic > -1e-6).all()
    assert mean.epistemic is None
    torch.testing.assert_close(mean.probs, fitted.adapter.outputs(fitted.mean_vector, images).softmax(-1))
    torch.testing.assert_close(drawn.probs.sum(-1), torch.ones(50))


def test_predictions_repeat_and_follow_the_generator(fitted, digits):
    images = digits[1].images[:5]
    assert torch.equal(fitted.predict(images).probs, fitted.predict(images).probs)
    seeds = [fitted.predict(images, generator=torch.Generator().manual_seed(s)).samples for s in (1, 1, 2)]
    assert torch.equal(seeds[0], seeds[1])
    assert not torch.equal(seeds[0], seeds[2])


def test_predict_loader_joins_batches_in_order(fitted, digits):
    held_out = digits[1]
    data = DataLoader(TensorDataset(held_out.images[:30], held_out.labels[:30]), batch_size=7)
    joined = fitted.predict_loader(data, "mean")
    torch.testing.assert_close(joined.probs, fitted.predict(held_out.images[:30], "mean").probs, rtol=1e-4, atol=1e-6)
    assert torch.equal(joined.targets, held_out.labels[:30])
    assert joined.samples is None
    assert fitted.predict_loader(data, num_samples=3, keep_samples=True).samples.shape == (3, 30, 10)
    with pytest.raises(ValueError, match=r"^`loader` must yield at least one batch, got none\.$"):
        fitted.predict_loader([])


BAD_CALLS = [
    ({"method": "guess"}, r"`method` must be one of linearized, probit, sampled, mean, got 'guess'"),
    ({"num_samples": 0}, r"`num_samples` must be a whole number >= 1, got 0"),
    ({"targets": torch.tensor([10, 0])}, r"`targets` must lie in 0\.\.9"),
]


@pytest.mark.parametrize(("options", "message"), BAD_CALLS)
def test_bad_predictions(fitted, options, message):
    with pytest.raises(ValueError, match=message):
        fitted.predict(torch.zeros(2, 1, 28, 28), **options)
    with pytest.raises(ValueError, match=r"`inputs` must be finite"):
        fitted.predict(torch.full((2, 1, 28, 28), math.nan))


def test_bernoulli_and_poisson_end_to_end():
    torch.manual_seed(0)
    weight = torch.randn(3, 2).double()
    x = torch.randn(400, 3).double()
    targets = {
        "bernoulli": torch.bernoulli((x @ weight).sigmoid()),
        "poisson": torch.poisson((0.5 * x @ weight).exp()),
    }
    for name, y in targets.items():
        config = bkf.KalmanConfig(likelihood=name, covariance="full", initial_variance=1.0)
        posterior = bkf.fit(linear(), loader(x[:300], y[:300], 5), config, progress=False)
        fitted = posterior.predict(x[300:], targets=y[300:])
        prior = bkf.Posterior(posterior.kf, posterior.kf.init()).predict(x[300:], targets=y[300:])
        assert fitted.log_prob.mean() > prior.log_prob.mean() + 0.1
        truth = weight.T if name == "bernoulli" else 0.5 * weight.T
        sd = posterior.variance["weight"].sqrt()
        assert ((posterior.mean["weight"] - truth).abs() < 5 * sd).all()
    with pytest.raises(ValueError, match="`method` 'probit' has no closed form for counts"):
        posterior.predict(x, "probit")


def test_held_out_data_take_the_temperature_nearest_to_1_that_they_do_not_clearly_speak_against():
    """Differences of ±1 about their mean have standard error 1/√(N − 1)."""
    size = len(tempering.GRID)
    for excess, expected in ((0.45, 6), (0.55, 4)):
        losses = torch.rand(1, 401, generator=torch.Generator().manual_seed(0)).double().repeat(size, 1)
        sign = torch.ones(401).double()
        sign[::2] = -1.0
        losses += 5.0  # clearly worse
        losses[2:5] -= 5.0
        losses[5] -= 4.999999  # a little worse everywhere, so surely
        losses[6] += sign - sign.mean() + excess * (1 - sign.mean() ** 2) ** 0.5 / 20.0 - 5.0
        assert tempering.choose_held_out(losses) == tempering.GRID[expected]
    losses[5:, 7] = torch.inf
    losses[:2] = 0.0
    assert tempering.choose_held_out(losses) == tempering.GRID[1]
    assert tempering.choose_held_out(losses[:, 1:100]) == tempering.GRID[1]
    assert tempering.choose_held_out(torch.full((size, 3), torch.inf)) == tempering.GRID[0]


def test_temperature_scores_are_the_log_losses_of_linearized_predictions():
    config = bkf.KalmanConfig(likelihood="gaussian", covariance="full", initial_variance=1.0)
    kf = bkf.KalmanFilter(linear(), config)
    state, _ = kf.update(kf.init(), X[:5], Y[:5])
    after, _ = kf.update(state, X[5:10], Y[5:10])
    for k, value in enumerate(tempering.GRID):
        fixed = bkf.KalmanFilter(kf.adapter, dataclasses.replace(config, temperature=value))
        expected = -bkf.Posterior(fixed, state).predict(X[5:10], targets=Y[5:10]).log_prob.sum()
        torch.testing.assert_close(
            after.temperature_scores.total[k] - state.temperature_scores.total[k], expected, rtol=1e-10, atol=1e-10
        )
    fixed = bkf.fit(linear(), loader(), bkf.KalmanConfig(**EXACT), progress=False)
    assert (fixed.temperature, fixed.state.temperature_scores.updates) == (1.0, 0)


def test_going_on_from_a_posterior_equals_one_stream(digits):
    stream, _ = digits
    batches = [(stream.images[i : i + 3], stream.labels[i : i + 3]) for i in range(0, 30, 3)]
    kf = bkf.KalmanFilter(lora_digits_vit(rank=2))
    state = whole = kf.init(stream.images[:30])
    for batch in batches:
        whole, _ = kf.update(whole, *batch)
    for batch in batches[:5]:
        state, _ = kf.update(state, *batch)
    posterior = bkf.Posterior(kf, state)
    state = posterior.state
    for batch in batches[5:]:
        state, _ = posterior.filter().update(state, *batch)
    assert torch.equal(state.belief.mean, whole.belief.mean)


def test_saved_posterior_reads_back_bit_for_bit(fitted, digits, tmp_path):
    fitted.save_pretrained(tmp_path / "posterior")
    assert {p.name for p in (tmp_path / "posterior").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "kalman_config.json", "kalman_state.safetensors",
        "README.md", "SHA256SUMS",
    }  # fmt: skip
    images, labels = digits[1].images[:20], digits[1].labels[:20]
    for base in (digits_vit(), lora_digits_vit(rank=2)):
        again = bkf.Posterior.from_pretrained(tmp_path / "posterior", base)
        assert again.config == fitted.config
        assert torch.equal(again.predict(images).probs, fitted.predict(images).probs)
        assert all(torch.equal(again.history[k], fitted.history[k]) for k in fitted.history)
        after, _ = again.filter().update(again.state, images, labels)
        expected, _ = fitted.filter().update(fitted.state, images, labels)
        assert torch.equal(after.belief.mean, expected.belief.mean)
    plain = PeftModel.from_pretrained(digits_vit(), str(tmp_path / "posterior")).eval()  # without this package
    with torch.no_grad():
        torch.testing.assert_close(plain(images).logits.softmax(-1), fitted.predict(images, "mean").probs)
    fitted.save_pretrained(tmp_path / "posterior")  # replaces
    assert sorted(p.name for p in tmp_path.iterdir()) == ["posterior"]


@pytest.mark.parametrize("covariance", ["diagonal", "low_rank", "full"])
def test_plain_modules_and_every_state_read_back(covariance, tmp_path):
    config = bkf.KalmanConfig(likelihood="gaussian", covariance=covariance, noise_variance="estimated")
    posterior = bkf.fit(linear(), loader(), config, progress=False)
    posterior.save_pretrained(tmp_path / "p")
    again = bkf.Posterior.from_pretrained(tmp_path / "p", linear(seed=5))
    assert torch.equal(again.predict(X).variance, posterior.predict(X).variance)
    assert torch.equal(load_file(tmp_path / "p" / "model.safetensors")["weight"], posterior.mean["weight"])


def test_damaged_or_foreign_folders_are_refused_and_nothing_changes(fitted, tmp_path):
    folder = tmp_path / "p"
    fitted.save_pretrained(folder)
    other = digits_vit(pretrained=False, seed=1)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"`base_model` must be the model that .* was fitted on"):
        bkf.Posterior.from_pretrained(folder, other)
    assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())
    state = folder / "kalman_state.safetensors"
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"`folder` must hold a readable kalman_state\.safetensors"):
        bkf.Posterior.from_pretrained(folder, digits_vit())
    save_file({"belief.mean": torch.zeros(2)}, state, metadata={"bayes_kf": json.dumps({"format": 99})})
    with pytest.raises(ValueError, match=r"`folder` must be of format 1, got 99"):
        bkf.Posterior.from_pretrained(folder, digits_vit())
    (folder / "kalman_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"`folder` must hold a readable kalman_config\.json"):
        bkf.Posterior.from_pretrained(folder, digits_vit())
    with pytest.raises(ValueError, match=r"readable kalman_config\.json, got .*nowhere"):
        bkf.Posterior.from_pretrained(tmp_path / "nowhere", digits_vit())


def test_files_of_other_people_stay_beside_a_posterior(fitted, tmp_path):
    (tmp_path / "thesis.tex").write_text("all my work")
    for _ in range(2):
        fitted.save_pretrained(tmp_path)
        assert (tmp_path / "thesis.tex").read_text() == "all my work"
    (tmp_path / "empty").mkdir()
    fitted.save_pretrained(tmp_path / "empty")
    assert (tmp_path / "empty" / "adapter_model.safetensors").stat().st_mode & 0o077 == 0o044


def test_a_failed_save_keeps_the_old_folder(fitted, tmp_path, monkeypatch):
    fitted.save_pretrained(tmp_path / "p")
    from bayes_kf.inference.saving import pretrained

    def full_disk(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(pretrained, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        fitted.save_pretrained(tmp_path / "p")
    monkeypatch.undo()
    bkf.Posterior.from_pretrained(tmp_path / "p", digits_vit())
    assert [p.name for p in tmp_path.iterdir()] == ["p"]


def test_exported_draws_are_ordinary_adapters(fitted, digits, tmp_path):
    folders = fitted.export_adapters(tmp_path / "draws", num_samples=2, generator=torch.Generator().manual_seed(5))
    draws = fitted.sample(2, torch.Generator().manual_seed(5))
    images = digits[1].images[:5]
    for folder, draw in zip(folders, draws, strict=True):
        model = PeftModel.from_pretrained(digits_vit(), str(folder)).eval()
        with torch.no_grad():
            torch.testing.assert_close(model(images).logits, fitted.adapter.outputs(draw, images), rtol=1e-4, atol=1e-4)


def test_apply_to_writes_the_mean_and_nothing_else(fitted):
    model = lora_digits_vit(rank=2)
    frozen = {k: v.clone() for k, v in model.named_parameters() if not v.requires_grad}
    fitted.apply_to(model)
    torch.testing.assert_close(bkf.AdapterModel(model).vector(), fitted.mean_vector)
    assert all(torch.equal(model.get_parameter(k), v) for k, v in frozen.items())
    with pytest.raises(ValueError, match="`model` must have the trainable tensors that the posterior was fitted on"):
        fitted.apply_to(lora_digits_vit(rank=3))


def test_arviz_takes_the_draws(fitted):
    import arviz

    data = fitted.to_arviz(num_samples=20)
    name = next(iter(fitted.mean))
    assert data["posterior"][name].shape == (2, 10, *fitted.mean[name].shape)
    summary = arviz.summary(data, var_names=[name], kind="stats")
    assert len(summary) == fitted.mean[name].numel()


def test_dense_covariance_is_refused_with_its_size():
    class Wide(nn.Linear):
        pass

    posterior = bkf.fit(
        Wide(200, 150),
        [(torch.randn(1, 200), torch.randn(1, 150))],
        bkf.KalmanConfig(likelihood="gaussian"),
        progress=False,
    )
    with pytest.raises(
        ValueError, match=r"`covariance_matrix` takes at most 20,000 parameters, got 30,150 \(3\.4 GiB\)"
    ):
        posterior.covariance_matrix()


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


def test_adapters_of_other_names_read_back(tmp_path, digits):
    images, labels = digits[0].images[:8], digits[0].labels[:8]
    model = get_peft_model(digits_vit(), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="mine")
    posterior = bkf.fit(model, [(images, labels)], progress=False)
    posterior.save_pretrained(tmp_path / "p")
    again = bkf.Posterior.from_pretrained(tmp_path / "p", digits_vit())
    assert again.adapter.names == posterior.adapter.names
    assert torch.equal(again.predict(images).probs, posterior.predict(images).probs)
    folders = posterior.export_adapters(tmp_path / "draws", 2)
    PeftModel.from_pretrained(digits_vit(), str(folders[0]))


def test_trainable_biases_read_back(tmp_path, digits):
    images, labels = digits[0].images[:8], digits[0].labels[:8]
    model = get_peft_model(digits_vit(), LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only"))
    posterior = bkf.fit(model, [(images, labels)], progress=False)
    posterior.save_pretrained(tmp_path / "p")
    again = bkf.Posterior.from_pretrained(tmp_path / "p", digits_vit())
    torch.testing.assert_close(again.predict(images).probs, posterior.predict(images).probs)


def test_reading_changes_no_weights_and_a_damaged_adapter_is_named(fitted, tmp_path):
    fitted.save_pretrained(tmp_path / "p")
    ready = lora_digits_vit(rank=2)
    before = {k: v.clone() for k, v in ready.state_dict().items()}
    bkf.Posterior.from_pretrained(tmp_path / "p", ready)
    assert all(torch.equal(before[k], v) for k, v in ready.state_dict().items())
    file = tmp_path / "p" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    base = digits_vit()
    names = list(base.state_dict())
    with pytest.raises(ValueError, match=r"`folder` must hold adapter_model\.safetensors as it was saved, got another"):
        bkf.Posterior.from_pretrained(tmp_path / "p", base)
    (tmp_path / "p" / "SHA256SUMS").unlink()  # as in folders of earlier versions
    with pytest.raises(ValueError, match=r"`folder` must hold a readable adapter_model\.safetensors"):
        bkf.Posterior.from_pretrained(tmp_path / "p", base)
    assert list(base.state_dict()) == names


def test_an_adapter_of_another_scale_is_refused(fitted, tmp_path):
    fitted.save_pretrained(tmp_path / "p")
    other = lora_digits_vit(rank=2)
    other.peft_config["default"].lora_alpha = 64
    with pytest.raises(
        ValueError, match="`base_model` must have an adapter with lora_alpha 2 as it was fitted, got 64"
    ):
        bkf.Posterior.from_pretrained(tmp_path / "p", other)
    path = tmp_path / "p" / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 2', '"lora_alpha": 3'))
    with pytest.raises(ValueError, match=r"`folder` must hold an adapter_config\.json with lora_alpha 2 as it was"):
        bkf.Posterior.from_pretrained(tmp_path / "p", digits_vit())


def test_entropy_of_correlated_outputs_is_that_of_the_joint():
    posterior = bkf.fit(linear(), loader(), bkf.KalmanConfig(**EXACT, noise_variance=0.5), progress=False)
    x = X[:3]
    jacobian = posterior.kf.linearize(posterior.mean_vector, x).jacobian().dense()
    total = jacobian @ posterior.covariance_matrix() @ jacobian.mT + 0.5 * torch.eye(2).double()
    expected = 0.5 * torch.logdet(2 * math.pi * math.e * total)
    torch.testing.assert_close(posterior.predict(x).entropy, expected, rtol=1e-9, atol=1e-9)


def bent():
    """A network whose outputs are not linear in its weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def test_sampled_predictions_that_are_not_those_of_the_linearized_model_warn_with_numbers():
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(0)).double()
    y = x.argmax(1)
    config = bkf.KalmanConfig(initial_variance=1.0, bound_prior=False, temperature=1.0)
    wide = bkf.fit(bent(), loader(x, y), config, progress=False)
    with pytest.warns(UserWarning, match=r"disagree: 0\.\d+ total variation apart on 16 examples, where Monte Carlo"):
        wide.predict(x, "sampled")
    narrow = dataclasses.replace(config, initial_variance=1e-4)
    bkf.fit(bent(), loader(x, y), narrow, progress=False).predict(x, "sampled")  # a warning would be an error


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli", "categorical", "poisson"])
def test_no_disagreement_is_seen_where_the_model_is_linear(likelihood):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(30, 3, generator=g).double()
    targets = {
        "gaussian": torch.randn(30, 2, generator=g).double(),
        "bernoulli": torch.randint(2, (30, 2), generator=g).double(),
        "categorical": torch.randint(2, (30,), generator=g),
        "poisson": torch.randint(4, (30, 2), generator=g).double(),
    }
    config = bkf.KalmanConfig(likelihood=likelihood, initial_variance=0.3, bound_prior=False, temperature=1.0)
    posterior = bkf.fit(linear(), loader(x, targets[likelihood]), config, progress=False)
    for seed in range(20):
        posterior.predict(x, "sampled", generator=torch.Generator().manual_seed(seed))


def test_draws_are_not_compared_where_that_takes_more_passes_than_they_do(monkeypatch):
    """Fewer draws than outputs; and of a loader only the first batch is."""
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(0)).double()
    posterior = bkf.fit(linear(12), loader(x, torch.arange(30) % 12), progress=False)
    calls = []
    monkeypatch.setattr(bkf.inference.prediction, "disagreement", lambda *_: calls.append(1) or (0.0, 1.0))
    posterior.predict(x, "sampled", num_samples=11)
    assert not calls
    posterior.predict_loader([x[:10], x[10:20], x[20:]], "sampled", num_samples=12)
    assert len(calls) == 1


def many(outputs=90):
    """A network with many outputs, and no last layer of fewer features."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, outputs), nn.Tanh()).double()


def test_with_more_outputs_than_draws_linearized_predictions_take_no_backward_pass_and_say_the_same(monkeypatch):
    """Means and entropies over 80 x 60 draws against 20,000 from the exact moments, in standard errors."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(30, 3, generator=g).double()
    y = torch.randint(90, (30,), generator=g)
    posterior = bkf.fit(many(), loader(x, y), bkf.KalmanConfig(temperature=1.0), progress=False)
    exact = posterior.predict(x[:4], num_samples=20_000)
    monkeypatch.setattr(LinearizedBatch, "jacobian", None)
    found = [
        posterior.predict(x[:4], num_samples=60, generator=torch.Generator().manual_seed(seed), targets=y[:4])
        for seed in range(80)
    ]
    for of in (lambda p: p.probs, lambda p: p.samples.square().mean(0)):
        runs = torch.stack([of(p) for p in found])
        error = runs.std(0) / len(runs) ** 0.5
        assert float(((runs.mean(0) - of(exact)).abs() / (error + exact.samples.std(0) / 20_000**0.5)).max()) < 4.5
    assert found[0].samples.shape == (60, 4, 90)
    torch.testing.assert_close(found[0].log_prob, found[0].probs[torch.arange(4), y[:4]].log())


def test_draws_of_very_many_outputs_do_not_form_their_covariance(monkeypatch):
    """A last layer of few features, so that its rows would take few passes: moments of 200 x 64 draws against exact."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 501)).double()
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 3, generator=g).double(), torch.randint(501, (12,), generator=g)
    settings = bkf.KalmanConfig(covariance="diagonal", curvature="truncated", temperature=1.0)
    posterior = bkf.fit(model, loader(x, y), settings, progress=False)
    exact = posterior.predict(x[:2], method="probit")  # by the covariance
    linearized = posterior.kf.linearize(posterior.mean_vector, x[:2])
    covariance = posterior.state.belief.output_covariance(linearized.jacobian())
    torch.testing.assert_close(exact.probs, against_the_rest(linearized.outputs, covariance))
    monkeypatch.setattr(type(linearized), "jacobian", None)
    found = torch.cat(
        [posterior.predict(x[:2], generator=torch.Generator().manual_seed(seed)).samples.log() for seed in range(200)]
    )
    centred = found - found[..., :1]  # log odds against the first class
    variance = covariance.diagonal(dim1=1, dim2=2)
    truth = variance + variance[:, :1] - 2 * covariance[:, :, 0]
    error = truth * (2 / (len(found) / 2)) ** 0.5  # draws come in pairs
    assert float(((centred.var(0) - truth).abs() / error.clamp_min(1e-12))[:, 1:].max()) < 4.5


def test_calibrating_by_differences_is_calibrating_by_moments(monkeypatch):
    """More outputs than responses: log losses within 2.5 % of those by the covariance, and no backward pass."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=g).double()
    y = torch.randint(90, (200,), generator=g)
    posterior = bkf.fit(many(), loader(x[:40], y[:40]), bkf.KalmanConfig(temperature=1.0), progress=False)
    family = likelihood(posterior.config.noise_settings, posterior.state.noise)

    def losses():
        return torch.stack([posterior._log_losses(family, x[:20], y[:20], seed).mean(1) for seed in range(15)]).mean(0)

    with monkeypatch.context() as patched:
        patched.setattr(bkf.Posterior, "_by_differences", lambda *_: False)
        exact, chosen = losses(), posterior.calibrate(loader(x[40:], y[40:])).temperature
    with monkeypatch.context() as patched:
        patched.setattr(type(posterior.kf.linearize(posterior.mean_vector, x[:2])), "jacobian", None)
        found = losses()
        assert posterior.calibrate(loader(x[40:], y[40:])).temperature == chosen
    assert float(((found - exact).abs() / exact).max()) < 0.025


def against_the_rest(outputs, covariance):
    """MacKay's approximation for each class against the rest, written out."""
    found = []
    for c in range(outputs.shape[1]):
        others = outputs.clone()
        others[:, c] = -math.inf
        slope = torch.eye(outputs.shape[1]).to(outputs)[c] - others.softmax(1)
        variance = (slope.unsqueeze(1) @ covariance @ slope.unsqueeze(2)).flatten()
        odds = outputs[:, c] - others.logsumexp(1)
        found.append((odds / (1 + math.pi / 8 * variance).sqrt()).sigmoid())
    probs = torch.stack(found, 1)
    return probs / probs.sum(1, keepdim=True)


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
def test_probit_of_each_class_against_the_rest(scale):
    """Also where one class has all but 1e-30 of the probability."""
    g = torch.Generator().manual_seed(0)
    outputs, root = scale * torch.randn(8, 6, generator=g).double(), torch.randn(8, 6, 6, generator=g).double()
    covariance = scale * root @ root.mT
    expected = against_the_rest(outputs, covariance)
    torch.testing.assert_close(probit_of(outputs, covariance), expected, rtol=1e-9, atol=1e-300)


def probit_of(outputs, covariance):
    return prediction.probit(Categorical(), outputs, covariance, None).probs


def test_probit_is_mackay_s_for_two_classes_and_close_to_draws_for_more():
    g = torch.Generator().manual_seed(0)
    outputs = 2.0 * torch.randn(20, 2, generator=g).double()
    root = torch.randn(20, 2, 2, generator=g).double()
    covariance = root @ root.mT
    apart = covariance[:, 0, 0] + covariance[:, 1, 1] - 2 * covariance[:, 0, 1]
    binary = ((outputs[:, 1] - outputs[:, 0]) / (1 + math.pi / 8 * apart).sqrt()).sigmoid()
    torch.testing.assert_close(probit_of(outputs, covariance)[:, 1], binary, rtol=1e-12, atol=1e-12)
    outputs = 2.0 * torch.randn(20, 5, generator=g).double()
    root = torch.randn(20, 5, 5, generator=g).double()
    covariance = root @ root.mT / 2
    draws = gaussian_draws(outputs, covariance, 40_000, torch.Generator().manual_seed(1))
    exact = draws.softmax(-1).mean(0)
    off, uncorrected = (0.5 * (p - exact).abs().sum(1) for p in (probit_of(outputs, covariance), outputs.softmax(-1)))
    assert float(off.mean()) < 0.5 * float(uncorrected.mean())
    assert float(off.mean()) < 0.06


def test_probit_does_not_see_what_all_classes_have_in_common():
    g = torch.Generator().manual_seed(0)
    outputs, root = torch.randn(6, 4, generator=g).double(), torch.randn(6, 4, 4, generator=g).double()
    covariance = root @ root.mT
    expected = probit_of(outputs, covariance)
    torch.testing.assert_close(probit_of(outputs + 3.0, covariance + 50.0), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(expected.sum(1), torch.ones(6).double())


def test_probit_follows_the_data_although_softmax_leaves_a_direction_unlearned():
    torch.manual_seed(0)
    x = torch.randn(1500, 2)
    y = torch.distributions.Categorical(logits=x @ torch.tensor([[2.0, -1.0], [0.0, 1.0]])).sample()
    config = bkf.KalmanConfig(covariance="full", initial_variance=4.0, temperature=1.0, bound_prior=False)
    batches = list(zip(x[:1000].split(10), y[:1000].split(10), strict=True))
    posterior = bkf.fit(nn.Linear(2, 2), batches, config, progress=False)
    by_draws, found = (posterior.predict(x[1000:], m, num_samples=512).probs for m in ("linearized", "probit"))
    assert float((by_draws - found).abs().max()) < 0.02


@pytest.mark.parametrize("variance", [1e-5, 1e-7])
def test_small_noise_beside_collinear_outputs_of_large_variance(variance):
    """In float32, whose rounding of J P Jᵀ is larger than the noise."""
    ones = torch.ones(1, 2, 2)
    family = Gaussian(torch.tensor(variance, dtype=torch.float64))
    found = prediction.gaussian_moments(family, torch.zeros(1, 2), 9.0 * ones, None, torch.zeros(1, 2))
    total = 9.0 * ones[0].double() + variance * torch.eye(2).double()
    expected = 0.5 * torch.logdet(2 * math.pi * math.e * total)
    assert float(found.entropy) == pytest.approx(float(expected), abs=1e-3)
    rounded = 9.0 * ones - 1e-6 * torch.eye(2)  # as rounding may leave it
    assert bool(torch.isfinite(prediction.gaussian_moments(family, torch.zeros(1, 2), rounded, None, None).entropy))


def test_held_out_data_choose_the_temperature_of_forty_classes():
    """Labels drawn from the belief's own predictions: with few draws of many outputs a hot one looks too dear."""
    torch.manual_seed(0)
    model = nn.Linear(16, 40)
    kf = bkf.KalmanFilter(model, bkf.KalmanConfig(covariance="full", initial_variance=0.3, bound_prior=False))
    x = torch.randn(600, 16)
    posterior = bkf.Posterior(kf, kf.init(x[:32]))
    draws = posterior.predict(x, num_samples=2000).samples
    which = torch.arange(600) % len(draws)
    y = torch.multinomial(draws[which, torch.arange(600)], 1)[:, 0]
    assert posterior.calibrate([(x, y)]).temperature == 1.0


def test_a_stream_s_own_posterior_can_be_calibrated():
    kf = bkf.KalmanFilter(nn.Linear(3, 2), bkf.KalmanConfig.stream())
    assert kf.config.tune is not None
    x, y = torch.randn(20, 3), torch.arange(20) % 2
    found = bkf.Posterior(kf, kf.init(x)).calibrate([(x, y)])
    assert found.temperature in tempering.GRID
    assert found.config.tune is None


def test_one_held_out_example_does_not_choose_a_temperature():
    losses = torch.linspace(0.1, 0.8, len(tempering.GRID)).double()[:, None]
    assert tempering.choose_held_out(losses) == 1.0
    losses[-3:] = math.inf  # but it rules out what gave it no probability
    assert tempering.choose_held_out(losses) == 0.1


def test_adapters_of_the_user_s_own_are_not_overwritten(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(3, 2)), LoraConfig(r=1, target_modules=["0"]))
    kf = bkf.KalmanFilter(model, bkf.KalmanConfig(initial_variance=0.1))
    posterior = bkf.Posterior(kf, kf.init())
    for name in ("sst2_run", "draw_0"):
        model.save_pretrained(tmp_path / "mine" / name)
    kept = {path: path.read_bytes() for path in (tmp_path / "mine").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"got adapter_model\.safetensors \(not written by bayes_kf\) in .*sst2_run"):
        posterior.save_pretrained(tmp_path / "mine" / "sst2_run")
    with pytest.raises(
        ValueError, match=r"got draw_0/adapter_config\.json \(not written by bayes_kf\), draw_0/adapter_"
    ):
        posterior.export_adapters(tmp_path / "mine", 2)
    assert {path: path.read_bytes() for path in (tmp_path / "mine").rglob("*") if path.is_file()} == kept
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["draw_0", "sst2_run"]
    posterior.save_pretrained(tmp_path / "mine")
    assert (
        kept.items() <= {path: path.read_bytes() for path in (tmp_path / "mine").rglob("*") if path.is_file()}.items()
    )
    posterior.export_adapters(tmp_path / "draws", 3)
    assert len(posterior.export_adapters(tmp_path / "draws", 2)) == 2  # draws make way for draws
    assert sorted(path.name for path in (tmp_path / "draws").iterdir()) == ["SHA256SUMS.draws", "draw_0", "draw_1"]


def test_a_link_to_a_folder_stays_one(tmp_path):
    kf = bkf.KalmanFilter(nn.Linear(3, 2), bkf.KalmanConfig(initial_variance=0.1))
    posterior = bkf.Posterior(kf, kf.init())
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for _ in range(2):
        posterior.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "kalman_config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


def in_batches(size, held_out, number=30):
    return DataLoader(TensorDataset(held_out.images[:number], held_out.labels[:number]), batch_size=size)


@pytest.mark.filterwarnings("ignore:`method` 'sampled' and 'linearized' disagree")
@pytest.mark.parametrize("settings", [{}, {"method": "sampled", "num_samples": 12}])
def test_predictions_of_a_loader_do_not_depend_on_its_batches(fitted, digits, settings):
    whole, *divided = [
        fitted.predict_loader(in_batches(size, digits[1]), keep_samples=True, **settings) for size in (30, 1, 7)
    ]
    for found in divided:
        torch.testing.assert_close(found.samples, whole.samples, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.probs, whole.probs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.log_prob, whole.log_prob, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.epistemic, whole.epistemic, rtol=1e-3, atol=1e-5)
    noise = whole.samples.var(0).mean()
    assert noise > 1e-4  # there are draws to differ by


@pytest.mark.parametrize("method", ["linearized", "sampled"])
def test_predictions_by_drawn_adapters_do_not_depend_on_batches_either(method):
    """More outputs than draws: linearized predictions are by differences; in float64 these are exact to rounding."""
    torch.manual_seed(0)
    x, y = torch.randn(20, 5).double(), torch.randint(12, (20,))
    config = bkf.KalmanConfig(covariance="full", temperature=1.0)
    posterior = bkf.fit(nn.Sequential(nn.Linear(5, 12)).double(), [(x, y)], config, progress=False)
    found = [
        posterior.predict_loader(list(zip(x.split(size), y.split(size), strict=True)), method, 8, keep_samples=True)
        for size in (20, 1, 7)
    ]
    for other in found[1:]:
        torch.testing.assert_close(other.samples, found[0].samples, rtol=1e-6, atol=1e-6)
    expected = posterior.predict(x, method, 8)
    torch.testing.assert_close(found[0].samples, expected.samples, rtol=1e-6, atol=1e-6)


def test_predictions_do_not_depend_on_the_pieces_that_memory_asks_for(fitted, digits):
    images = digits[1].images[:20]
    small = dataclasses.replace(fitted.config, bytes_budget=1)
    pieces = bkf.Posterior(bkf.KalmanFilter(fitted.adapter, small), fitted.state)
    assert len(list(pieces.kf.linearize.chunks(pieces.mean_vector, images))) == 20
    found, expected = pieces.predict(images), fitted.predict(images)
    torch.testing.assert_close(found.samples, expected.samples, rtol=1e-3, atol=1e-4)


def test_examples_have_noise_of_their_own(fitted, digits):
    """Draws of one image, repeated, are independent: averages over examples have the error of independent draws."""
    images = digits[1].images[:1].expand(40, -1, -1, -1)
    samples = fitted.predict(images, num_samples=200).samples.double().log()
    correlation = torch.corrcoef((samples[..., 0] - samples[..., 1]).T)  # log odds, which are Gaussian
    off = correlation[~torch.eye(40, dtype=torch.bool)]
    assert off.abs().max() < 6 / 200**0.5
    assert abs(off.mean()) < 5 / (200 * 780) ** 0.5


def test_scores_of_a_report_do_not_depend_on_the_batch_size(fitted, digits):
    found = [
        evaluation.evaluate(fitted, in_batches(size, digits[1], 60), num_simulations=50, num_samples=32).scores
        for size in (60, 1, 7)
    ]
    for name in ("accuracy", "nll", "brier", "ece", "entropy", "aleatoric", "epistemic"):
        values = [scores[name] for scores in found]
        assert values == pytest.approx([values[0]] * 3, abs=2e-5), name
