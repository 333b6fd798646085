"""The few-shot bench on UCI's digits, which need no files: its draws, its rows, its moments, its tables."""

import itertools
import json

import pytest
import torch
from torch.func import functional_call

import bayes_kf as bkf
from bayes_kf.models.clip import prompt_tokens
from benchmarks.common import result_files
from benchmarks.few_shot import run, tasks
from benchmarks.few_shot.clip import LetterTokenizer, trained
from benchmarks.few_shot.images import uci_digits
from benchmarks.few_shot.learn import Setting, image_features, on_features, on_lora
from benchmarks.few_shot.moments import SOFTMAX, Moments, Temperatures, averaged, best_temperatures
from benchmarks.few_shot.rows import ROWS, Cache


def digits():
    actual = uci_digits()
    test = actual.at(slice(0, 60))
    shifts = {"noise": tasks._corrupted(test, "gaussian_noise", 2)}
    foreign = {"noise": torch.randn(40, 1, 28, 28, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)}
    return tasks.Task("UCI digits", actual.at(slice(100, 700)), test, shifts, foreign)


@pytest.fixture(scope="module")
def task():
    return digits()


@pytest.fixture(scope="module")
def clip():
    return trained().requires_grad_(False)


@pytest.fixture(scope="module")
def setting(task, clip):
    drawn = tasks.draw(task.pool, 1, 0)
    return Setting(clip, prompt_tokens(LetterTokenizer(), task.pool.names), drawn.training, drawn.validation, 1, 0)


@pytest.mark.parametrize("shots", [1, 4, 16])
def test_shots_are_of_every_class_and_none_is_validation(task, shots):
    actual = tasks.draw(task.pool, shots, seed=3)
    assert actual.training.labels.bincount().tolist() == [shots] * 10
    assert actual.validation.labels.bincount().tolist() == [min(shots, 4)] * 10
    distances = torch.cdist(actual.training.images.flatten(1), actual.validation.images.flatten(1))
    assert float(distances.min()) > 0.1
    other = tasks.draw(task.pool, shots, seed=4)
    assert not torch.equal(other.training.images, actual.training.images)
    again = tasks.draw(task.pool, shots, seed=3)
    assert torch.equal(again.training.images, actual.training.images)


def test_validation_is_drawn_first(task):
    """So that more training shots leave it alone."""
    assert torch.equal(tasks.draw(task.pool, 4, 0).validation.images, tasks.draw(task.pool, 16, 0).validation.images)


def test_too_few_images_to_draw_from(task):
    with pytest.raises(ValueError, match="`shots` must leave 4 images for validation, got 90"):
        tasks.draw(task.pool, 90, 0)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_wrong_labels_are_as_many_as_asked_for(task, share):
    actual = tasks.draw(task.pool, 4, 0).training
    wrong = tasks.relabelled(actual, share, 0)
    assert int((wrong.labels != actual.labels).sum()) == int(share * 40)
    assert torch.equal(wrong.images, actual.images)


@pytest.mark.parametrize("name", ROWS)
def test_every_row_predicts_probabilities(name, task, clip):
    """And what learns from ten images knows more than the frozen model about them."""
    cell = run.measure(ROWS[name], task, clip, 1, 0)
    assert len(cell["tried"]) == len(ROWS[name].grid)
    assert cell["choice"] in [dict(choice) for choice in ROWS[name].grid]
    for actual in cell["variants"].values():
        numbers = [actual["id"], *actual["shifts"].values()]
        assert all(0 <= part["accuracy"] <= 1 and 0 <= part["ece"] <= 1 and part["nll"] > 0 for part in numbers)
        assert set(actual["foreign"]) == {"noise"}
        assert actual["id"]["accuracy"] > 0.3  # zero-shot has 0.7 here, chance is 0.1
    json.dumps(cell)


@pytest.mark.parametrize("lora", [False, True], ids=["features", "lora"])
def test_moments_are_those_of_the_linearized_model(lora, setting):
    """J P Jᵀ with J by finite differences of the whole classifier, text side and all, in float64."""
    model = on_lora(setting) if lora else on_features(setting)
    images = setting.training.images
    shots = images if lora else image_features(setting.clip, images)
    data = list(zip(shots.split(5), setting.training.labels.split(5), strict=True))
    posterior = bkf.fit(model, data, bkf.KalmanConfig(covariance="diagonal"), progress=False)
    few = shots[:3]
    mean, covariance = Moments(posterior, model)(few)

    exact = (on_lora(setting) if lora else on_features(setting)).double()
    posterior.apply_to(exact)
    exact = exact.double()
    point = {name: exact.get_parameter(name).detach() for name in posterior.adapter.names}
    sd = {
        name: posterior.state.belief.variance[where].double().sqrt().view_as(point[name])
        for name, where in posterior.adapter.slices().items()
    }
    torch.testing.assert_close(mean, exact(few.double()).detach(), rtol=1e-4, atol=1e-3)

    rows = []
    for name, value in point.items():

        def outputs(tensor, name=name):
            return functional_call(exact, {name: tensor}, (few.double(),))

        jacobian = torch.autograd.functional.jacobian(outputs, value)
        rows.append((jacobian * sd[name]).flatten(2))
    dense = torch.cat(rows, 2)
    expected = dense @ dense.mT
    torch.testing.assert_close(covariance, expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))


def test_averaged_predictions_and_their_temperatures():
    """Against quadrature over a logit of two classes, and a search by hand."""
    mean = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).double()
    covariance = torch.diag_embed(torch.tensor([[2.0, 0.0], [0.5, 0.5]]).double())
    actual = averaged(mean, covariance, Temperatures(0.5, 2.0), 20_000, 0)
    nodes = torch.linspace(-8, 8, 4001).double()
    weights = torch.exp(-0.5 * nodes**2) / torch.exp(-0.5 * nodes**2).sum()
    for row, variance in enumerate((2.0, 1.0)):
        difference = (mean[row, 0] - mean[row, 1]) + (0.5 * variance) ** 0.5 * nodes
        expected = float((torch.sigmoid(difference / 2.0) * weights).sum())
        assert float(actual[row, 0]) == pytest.approx(expected, abs=4 * 0.2 / 20_000**0.5)
    torch.testing.assert_close(actual.sum(1), torch.ones(2).double())
    labels = torch.tensor([1, 0])  # both unlikely: the flattest is best
    assert best_temperatures(mean, covariance, labels, 64, 0).softmax == max(SOFTMAX)
    assert best_temperatures(mean, covariance, 1 - labels, 64, 0).softmax == min(SOFTMAX)


def test_a_cache_of_its_own_keys_knows_their_labels(setting):
    """Tip-Adapter with all weight on the cache, and as sharp as can be, is the nearest neighbour."""
    features = image_features(setting.clip, setting.training.images)
    cache = Cache(on_features(setting, adapted=False), features, setting.training.labels, 1e4, 1e3)
    assert torch.equal(cache(features).argmax(1), setting.training.labels)


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    """Cells, table and figure; what is there is not measured again."""
    monkeypatch.setitem(run.TASKS, "letters", digits)
    arguments = ["--tasks", "letters", "--rows", "zero-shot", "features", "--shots", "1", "2", "--seeds", "1"]
    arguments += ["--results", str(tmp_path)]
    monkeypatch.setattr(result_files, "RESULTS", tmp_path)
    run.main(arguments)
    written = (tmp_path / "few_shot.md").read_text(encoding="utf-8")
    assert "feature adapters, AdamW + temperature" in written
    assert (tmp_path / "few_shot.png").stat().st_size > 10_000
    cells = json.loads((tmp_path / "few_shot.json").read_text(encoding="utf-8"))["cells"]
    rows = ("zero-shot", "features")
    assert set(cells) == {f"letters/{row}/{shots}/1" for row, shots in itertools.product(rows, (1, 2))}
    before = (tmp_path / "few_shot.json").read_bytes()
    monkeypatch.setattr(run, "measure", None)
    run.main([*arguments, "--table"])
    run.main(arguments)
    after = json.loads((tmp_path / "few_shot.json").read_text(encoding="utf-8"))["cells"]
    assert after == json.loads(before)["cells"]
    capsys.readouterr()


def test_without_the_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`path` must be the output of benchmarks/few_shot/train_clip\.py"):
        run.main(["--weights", str(tmp_path / "none"), "--results", str(tmp_path)])
