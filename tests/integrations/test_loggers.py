"""Reports in experiment trackers: what is read back is what the report says."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from bayes_kf import evaluation as ev
from bayes_kf.integrations.evaluate_module import CalibrationModule
from bayes_kf.integrations.loggers import log_report


def case() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    probs = (2 * torch.randn(120, 3, generator=generator)).double().softmax(dim=1)
    return probs, torch.multinomial(probs, 1, generator=generator)[:, 0]


@pytest.fixture(scope="module")
def report():
    return ev.evaluate_predictions(*case(), num_simulations=39)


def test_tensorboard_holds_every_score_and_figure(report, tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        log_report(report, writer, step=7)
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) == {f"calibration/{name}" for name in report.scores}
    value = events.Scalars("calibration/ece")[0]
    assert (value.step, value.value) == (7, pytest.approx(report.scores["ece"], rel=1e-6))
    assert set(tags["images"]) == {f"calibration/{name}" for name in report.figures}
    (text,) = events.Tensors("calibration/headline/text_summary")
    assert report.headline[0] in text.tensor_proto.string_val[0].decode()


def test_mlflow_and_wandb_get_numbers_and_page_by_their_public_calls(report, monkeypatch):
    calls = []
    mlflow = SimpleNamespace(
        log_metrics=lambda scores, step: calls.append((scores, step)),
        log_text=lambda text, path: calls.append((text, path)),
    )
    log_report(report, mlflow, step=3, name="test")
    assert calls[0] == ({f"test/{name}": value for name, value in report.scores.items()}, 3)
    assert calls[1] == (report.to_html(), "test-3.html")
    wandb = ModuleType("wandb")
    wandb.Html = lambda page: ("html", page)
    wandb.log = lambda numbers, step: calls.append((numbers, step))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log_report(report, wandb)
    numbers, step = calls[2]
    assert step is None
    assert numbers.pop("calibration/report") == ("html", report.to_html())
    assert numbers == {f"calibration/{name}": value for name, value in report.scores.items()}


def test_scores_that_are_not_finite_are_left_out_and_others_refused(tmp_path):
    impossible = ev.evaluate_predictions([[1.0, 0.0], [0.4, 0.6]], [1, 1], num_simulations=39)
    with SummaryWriter(str(tmp_path)) as writer:
        log_report(impossible, writer)
    assert "calibration/nll" not in EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"]
    with pytest.raises(ValueError, match=r"^`to` must be a SummaryWriter of TensorBoard, .*, got dict\.$"):
        log_report(impossible, {})


def test_batches_of_a_module_are_all_examples_at_once():
    probs, labels = case()
    module = CalibrationModule()
    for start in range(0, 120, 50):
        module.add_batch(predictions=probs[start : start + 50].numpy(), references=labels[start : start + 50].tolist())
    module.add(prediction=[0.2, 0.3, 0.5], reference=1)
    stream = ev.StreamingScores(3)
    stream.update(torch.cat([probs, torch.tensor([[0.2, 0.3, 0.5]])]), torch.cat([labels, torch.tensor([1])]))
    found, expected = module.compute(num_simulations=39), stream.scores(39)
    for name in ("accuracy", "nll", "ece", "ks", "accuracy_low", "brier_resolution"):
        assert found[name] == pytest.approx(expected[name], abs=1e-9)
    with pytest.raises(ValueError, match=r"^`compute` needs at least one example, got none\.$"):
        module.compute()
    chosen = CalibrationModule(["accuracy"])
    tokens = torch.tensor([[0, 1, -100], [2, -100, -100]])
    assert chosen.compute(predictions=torch.eye(3).expand(2, 3, 3), references=tokens) == {"accuracy": 2 / 3}
    with pytest.raises(ValueError, match=r"^`scores` must be names of scores, got 'acuracy'; there are accuracy,"):
        CalibrationModule(["acuracy"]).compute(predictions=probs, references=labels)
    module.add_batch(predictions=probs, references=labels)
    with pytest.raises(ValueError, match=r"^`probs` must have 3 classes, got 2\.$"):
        module.add_batch(predictions=[[0.5, 0.5]], references=[0])
