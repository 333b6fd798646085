"""Mixtures of posteriors: predictions, draws, files and everything that a posterior can do."""

import json
import math
import warnings
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from scipy.optimize import minimize_scalar
from small_problems import X, linear, loader

import bayes_kf as bkf
from bayes_kf.inference.mixture import mixture_prediction
from bayes_kf.inference.mixture.mixture_prediction import divide_draws, member_generators
from bayes_kf.inference.predictive.predict import predict
from bayes_kf.models.batched_forward import outputs_of_draws
from bayes_kf.models.zoo import digits_vit, lora_digits_vit


@pytest.fixture(scope="module")
def mixture(digits):
    stream = [(digits[0].images[k : k + 20], digits[0].labels[k : k + 20]) for k in range(0, 100, 20)]
    model = bkf.AdapterModel(lora_digits_vit(rank=2))
    common = {"temperature": 1.0, "rank": 8}
    one = bkf.fit(model, stream, bkf.KalmanConfig(**common), progress=False)
    two = bkf.fit(model, stream, bkf.KalmanConfig(**common, initial_logit_sd=1.0), progress=False)
    return bkf.MixturePosterior((one, two), (0.25, 0.75))


def regression_mixture():
    config = bkf.KalmanConfig(likelihood="gaussian", covariance="full", noise_variance=0.5, temperature=1.0)
    narrow = bkf.KalmanConfig(
        likelihood="gaussian", covariance="full", noise_variance=0.5, temperature=1.0, initial_variance=0.01
    )
    members = [bkf.fit(linear(), loader(), c, progress=False) for c in (config, narrow)]
    return bkf.MixturePosterior(tuple(members), (0.6, 0.4))


def test_the_member_with_the_largest_weight_comes_first(mixture):
    assert mixture.weights == (0.75, 0.25)
    assert mixture.best is mixture.members[0]
    assert mixture.best.config.initial_logit_sd == 1.0


def test_probabilities_are_weighted_means_and_disagreement_is_epistemic(mixture, digits):
    images, labels = digits[1].images[:20], digits[1].labels[:20]
    actual = mixture.predict(images, targets=labels)
    torch.testing.assert_close(actual.entropy, torch.special.entr(actual.probs).sum(1))
    torch.testing.assert_close(actual.epistemic, actual.entropy - actual.aleatoric)
    torch.testing.assert_close(actual.log_prob, actual.probs[range(20), labels].log(), rtol=0, atol=1e-5)
    assert actual.samples.shape == (64, 20, 10)
    for method in ("mean", "probit"):  # without draws
        exact = [member.predict(images, method).probs for member in mixture.members]
        torch.testing.assert_close(mixture.predict(images, method).probs, 0.75 * exact[0] + 0.25 * exact[1])
    parts = [member.predict(images, num_samples=4000) for member in mixture.members]
    many = mixture.predict(images, num_samples=4000)
    mean_aleatoric = 0.75 * parts[0].aleatoric + 0.25 * parts[1].aleatoric
    torch.testing.assert_close(many.aleatoric, mean_aleatoric, rtol=0, atol=0.02)
    within = 0.75 * parts[0].epistemic + 0.25 * parts[1].epistemic
    assert bool((many.epistemic > within - 0.02).all())
    assert float((many.epistemic - within).mean()) > 0.01  # the members disagree


def test_a_mixture_of_gaussians_has_its_moments_and_density():
    mixture, y = regression_mixture(), torch.zeros(len(X), 2, dtype=X.dtype)
    actual = mixture.predict(X, targets=y)
    parts = [member.predict(X, targets=y) for member in mixture.members]
    mean = 0.6 * parts[0].mean + 0.4 * parts[1].mean
    variance = sum(w * (p.variance + (p.mean - mean) ** 2) for w, p in zip((0.6, 0.4), parts, strict=True))
    torch.testing.assert_close(actual.mean, mean)
    torch.testing.assert_close(actual.variance, variance)
    density = 0.6 * parts[0].log_prob.exp() + 0.4 * parts[1].log_prob.exp()
    torch.testing.assert_close(actual.log_prob, density.log())


def test_draws_come_from_a_member_and_then_from_its_gaussian():
    mixture = regression_mixture()
    draws = mixture.sample(40_000, torch.Generator().manual_seed(0)).double()
    mean = torch.cat([m.reshape(-1) for m in mixture.mean.values()]).double()
    variance = torch.cat([v.reshape(-1) for v in mixture.variance.values()]).double()
    error = (variance / len(draws)).sqrt()
    assert bool(((draws.mean(0) - mean).abs() < 4 * error).all())
    torch.testing.assert_close(draws.var(0), variance, rtol=0.05, atol=0)
    predicted = mixture.predict(X, "sampled", num_samples=4000)
    torch.testing.assert_close(predicted.mean, mixture.predict(X).mean, rtol=0, atol=0.1)


def test_draws_are_divided_by_weight():
    assert divide_draws([0.75, 0.25], 64) == [48, 16]
    assert divide_draws([1 / 3, 1 / 3, 1 / 3], 64) == [22, 21, 21]
    assert divide_draws([0.99, 0.01], 8) == [8, 0]


def test_a_loaders_predictions_do_not_depend_on_its_batches(mixture, digits):
    images, labels = digits[1].images[:24], digits[1].labels[:24]
    for method in ("linearized", "sampled", "probit", "mean"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # drawn adapters differ from the linearized model here
            one = mixture.predict_loader([(images, labels)], method, num_samples=16)
            two = mixture.predict_loader([(images[:10], labels[:10]), (images[10:], labels[10:])], method, 16)
        torch.testing.assert_close(one.probs, two.probs, rtol=0, atol=1e-5)
        torch.testing.assert_close(one.targets, labels)


def test_a_saved_mixture_reads_back_bit_for_bit(mixture, digits, tmp_path):
    folder = tmp_path / "mixture"
    mixture.save_pretrained(folder)
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
        "adapter_config.json", "adapter_model.safetensors", "kalman_config.json", "kalman_state.safetensors",
        "README.md", "SHA256SUMS", "mixture.json", "member_1/adapter_config.json",
        "member_1/adapter_model.safetensors", "member_1/kalman_config.json", "member_1/kalman_state.safetensors",
    }  # fmt: skip
    assert "the best of 2 members of a mixture" in (folder / "README.md").read_text()
    images = digits[1].images[:10]
    for base in (digits_vit(), lora_digits_vit(rank=2)):
        again = bkf.Posterior.from_pretrained(folder, base)
        assert isinstance(again, bkf.MixturePosterior)
        assert again.weights == mixture.weights
        assert [m.config for m in again.members] == [m.config for m in mixture.members]
        assert torch.equal(again.predict(images).probs, mixture.predict(images).probs)
    plain = PeftModel.from_pretrained(digits_vit(), str(folder)).eval()  # without this package: the best member
    second = PeftModel.from_pretrained(digits_vit(), str(folder / "member_1")).eval()
    for model, member in zip((plain, second), mixture.members, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(model(images).logits.softmax(-1), member.predict(images, "mean").probs)


def test_a_mixture_replaces_a_posterior_and_the_other_way_round(mixture, tmp_path):
    folder = tmp_path / "p"
    (folder / "member_1").mkdir(parents=True)
    (folder / "member_1" / "notes.txt").write_text("mine")
    mixture.best.save_pretrained(folder)
    mixture.save_pretrained(folder)
    mixture.save_pretrained(folder)  # again: the files are ours
    mixture.best.save_pretrained(folder)
    assert (folder / "member_1" / "notes.txt").read_text() == "mine"
    assert not (folder / "mixture.json").exists()
    assert not (folder / "member_1" / "kalman_state.safetensors").exists()
    assert isinstance(bkf.Posterior.from_pretrained(folder, lora_digits_vit(rank=2)), bkf.Posterior)
    (folder / "member_1" / "adapter_config.json").write_text("{}")  # of another program
    with pytest.raises(ValueError, match=r"`folder` must have no other files .* member_1/adapter_config\.json"):
        mixture.save_pretrained(folder)
    assert (folder / "member_1" / "adapter_config.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": 2, "weights": [0.5, 0.5]}', "a mixture of format 1, got 2"),
        ('{"format": 1, "weights": [0.5, 0.4]}', "positive weights that add up to 1"),
        ('{"format": 1, "weights": []}', "positive weights that add up to 1"),
        ('{"format": 1}', r"a readable mixture\.json"),
        ("{", r"a readable mixture\.json"),
    ],
)
def test_damaged_weights_are_refused(mixture, tmp_path, content, message):
    mixture.save_pretrained(tmp_path)
    (tmp_path / "mixture.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        bkf.Posterior.from_pretrained(tmp_path, lora_digits_vit(rank=2))


def test_a_damaged_member_is_refused_and_the_base_stays(mixture, tmp_path):
    mixture.save_pretrained(tmp_path)
    state = tmp_path / "member_1" / "kalman_state.safetensors"
    state.write_bytes(state.read_bytes()[:-10])
    base = digits_vit()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.raises(ValueError, match=r"member_1/kalman_state\.safetensors as it was saved"):
        bkf.Posterior.from_pretrained(tmp_path, base)
    assert {name: tensor.tolist() for name, tensor in base.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in before.items()
    }


def test_an_update_multiplies_weights_by_the_predicted_probability(mixture, digits):
    images, labels = digits[1].images[:6], digits[1].labels[:6]
    after = mixture.update(images, labels)
    scores = [
        w * float(m.predict(images, targets=labels).log_prob.double().sum().exp())
        for w, m in zip(mixture.weights, mixture.members, strict=True)
    ]
    expected = sorted((score / sum(scores) for score in scores), reverse=True)
    assert after.weights == pytest.approx(expected)
    assert {m.state.examples for m in after.members} == {106}
    assert {m.state.examples for m in mixture.members} == {100}


def test_calibrate_sets_the_sizes_and_one_sharpness(mixture, digits):
    held = [(digits[1].images[:30], digits[1].labels[:30]), (digits[1].images[30:60], digits[1].labels[30:60])]
    calibrated = mixture.calibrate(held)
    assert len({m.softmax_temperature for m in calibrated.members}) == 1
    assert calibrated.softmax_temperature != 1.0
    for before, after in zip(mixture.members, calibrated.members, strict=True):
        assert bool((after.variance_vector <= before.variance_vector).all())  # held-out data may narrow the prior
        assert torch.equal(before.mean_vector, after.mean_vector)
        assert before.softmax_temperature == 1.0


def test_calibrate_softmax_sets_the_sharpness_of_the_average_alone(mixture, digits):
    """The divisor has the least log loss of the averaged probabilities, by SciPy, with the prior on its logarithm."""
    images, labels = digits[1].images[:60], digits[1].labels[:60]
    sharp = mixture.calibrate_softmax([(images, labels)])
    assert {m.softmax_temperature for m in sharp.members} == {sharp.softmax_temperature}
    assert not any("size" in member.history for member in sharp.members)
    for before, after in zip(mixture.members, sharp.members, strict=True):
        assert torch.equal(before.variance_vector, after.variance_vector)

    def objective(log_divisor):
        members = [m.with_settings(softmax_temperature=math.exp(log_divisor)) for m in mixture.members]
        at = bkf.MixturePosterior(tuple(members), mixture.weights)
        probs = at.predict(images, num_samples=4096).probs[torch.arange(60), labels]
        return -float(probs.double().log().sum()) + 0.5 * (log_divisor / 0.5) ** 2

    best = math.exp(minimize_scalar(objective, bounds=(-2.3, 2.3), method="bounded", options={"xatol": 0.01}).x)
    assert sharp.softmax_temperature == pytest.approx(best, rel=0.03)
    assert sharp.history["sharpness"][0] == sharp.softmax_temperature


def test_reports_arviz_and_exports(mixture, digits, tmp_path):
    data = [(digits[1].images[:50], digits[1].labels[:50])]
    report = bkf.evaluate(mixture, data, num_simulations=39)
    assert 0.0 <= report.scores["accuracy"] <= 1.0
    assert mixture.to_arviz(8, loader=data).posterior.sizes["draw"] == 4
    folders = mixture.export_adapters(tmp_path / "draws", 3)
    assert [folder.name for folder in folders] == ["draw_0", "draw_1", "draw_2"]
    model = lora_digits_vit(rank=2)
    assert mixture.apply_to(model) is mixture.best
    with torch.no_grad():
        actual = model.eval()(digits[1].images[:4]).logits.softmax(-1)
    torch.testing.assert_close(actual, mixture.best.predict(digits[1].images[:4], "mean").probs)
    assert mixture.apply_to(model, member=1) is mixture.members[1]
    assert torch.equal(bkf.AdapterModel(model).vector(), mixture.members[1].mean_vector)
    with pytest.raises(ValueError, match="`member` must be from 0 to 1, got 2"):
        mixture.apply_to(model, member=2)
    assert repr(mixture).startswith("MixturePosterior of 2 members:")


def test_bad_mixtures_are_refused(mixture):
    one, two = mixture.members
    for weights in ((0.5,), (0.5, 0.6), (1.0, 0.0), (1.5, -0.5)):
        with pytest.raises(ValueError, match="`weights` must be"):
            bkf.MixturePosterior((one, two), weights)
    with pytest.raises(ValueError, match="`members` must be over the same tensors, got others in number 1"):
        bkf.MixturePosterior((one, regression_mixture().best), (0.5, 0.5))
    with pytest.raises(AttributeError, match=r"a mixture of 2 posteriors has no `state`.*posterior\.best\.state"):
        _ = mixture.state
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mixture.nothing


def test_a_mixture_of_one_stays_a_mixture(mixture, tmp_path):
    bkf.MixturePosterior((mixture.best,), (1.0,)).save_pretrained(tmp_path)
    again = bkf.Posterior.from_pretrained(tmp_path, lora_digits_vit(rank=2))
    assert isinstance(again, bkf.MixturePosterior)
    assert again.weights == (1.0,)


def test_weights_survive_json(mixture, tmp_path):
    mixture.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "mixture.json").read_text()) == {"format": 1, "weights": [0.75, 0.25]}


@pytest.mark.parametrize("method", ["sampled", "linearized", "probit", "mean"])
def test_members_that_predict_together_predict_as_each_alone(mixture, digits, method):
    images, labels = digits[1].images[:20], digits[1].labels[:20]
    generators = member_generators(mixture.generator(), 2)
    counts = [48, 16] if method == "sampled" else [64, 64]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # drawn adapters differ from the linearized model here
        actual = mixture.predict(images, method, targets=labels)
        parts = [
            predict(member, images, method, count, generator, labels)
            for member, count, generator in zip(mixture.members, counts, generators, strict=True)
        ]
    torch.testing.assert_close(actual.probs, 0.75 * parts[0].probs + 0.25 * parts[1].probs, rtol=0, atol=1e-6)
    density = 0.75 * parts[0].log_prob.exp() + 0.25 * parts[1].log_prob.exp()
    torch.testing.assert_close(actual.log_prob.exp(), density, rtol=0, atol=1e-6)
    if actual.aleatoric is not None:
        aleatoric = 0.75 * parts[0].aleatoric + 0.25 * parts[1].aleatoric
        torch.testing.assert_close(actual.aleatoric, aleatoric, rtol=0, atol=1e-6)


def test_drawn_adapters_of_all_members_share_one_pass(mixture, digits, monkeypatch):
    draws = []

    def counted(adapter, given, *args, **kwargs):
        draws.append(len(given))
        return outputs_of_draws(adapter, given, *args, **kwargs)

    monkeypatch.setattr(mixture_prediction, "outputs_of_draws", counted)
    monkeypatch.setattr("bayes_kf.inference.predictive.predict.outputs_of_draws", counted)
    loader = [(digits[1].images[:6], digits[1].labels[:6]), (digits[1].images[6:10], digits[1].labels[6:10])]
    one = mixture.predict_loader(loader, "sampled", num_samples=4)
    assert draws == [4, 4]  # one pass a batch
    other = mixture.members[1]
    apart = replace(other, kf=bkf.KalmanFilter(lora_digits_vit(rank=2), other.config))  # the same base, another module
    two = bkf.MixturePosterior((mixture.best, apart), mixture.weights).predict_loader(loader, "sampled", num_samples=4)
    assert draws == [4, 4, 3, 1, 3, 1]
    torch.testing.assert_close(one.probs, two.probs, rtol=0, atol=1e-6)
