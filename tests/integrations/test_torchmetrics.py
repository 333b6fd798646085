"""The metric of torchmetrics: batches, processes and collections give the scores of all examples at once."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import EvalPrediction

from bayes_kf import evaluation as ev
from bayes_kf.integrations import calibration_metrics

torchmetrics = pytest.importorskip("torchmetrics", reason="needs the Python package torchmetrics")
from bayes_kf.integrations.torchmetrics import CalibrationMetrics  # noqa: E402


def case(count=301, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, classes, generator=generator)
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


def expected(logits, labels):
    probs = logits.double().softmax(1)
    stream = ev.StreamingScores(probs.shape[1], num_label_draws=0)
    stream.update(probs, labels)
    return stream.scores(200)


def test_batches_add_up_to_the_scores_of_all_examples():
    logits, labels = case()
    metric = CalibrationMetrics(4)
    for some, own in zip(logits.split(50), labels.split(50), strict=True):
        metric.update(some, own)
    found, wanted = metric.compute(), expected(logits, labels)
    assert {name: float(value) for name, value in found.items()} == {name: wanted[name] for name in found}
    probs = logits.double().softmax(1)
    assert float(found["accuracy"]) == ev.accuracy(probs, labels)
    assert float(found["ece"]) == pytest.approx(ev.expected_calibration_error(probs, labels))
    metric.reset()
    metric.update(logits[:10].softmax(1), labels[:10])  # probabilities this time
    assert float(metric.compute()["accuracy"]) == ev.accuracy(logits[:10].softmax(1), labels[:10])


def test_a_step_has_its_own_value_and_the_epoch_all_of_them():
    logits, labels = case()
    metric = CalibrationMetrics(4, scores=["accuracy"])
    first = metric(logits[:100], labels[:100])
    assert float(first["accuracy"]) == ev.accuracy(logits[:100].softmax(1), labels[:100])
    metric(logits[100:], labels[100:])
    assert float(metric.compute()["accuracy"]) == ev.accuracy(logits.softmax(1), labels)


def test_tokens_pixels_and_ignored_targets():
    logits, labels = case(240)
    labels[::5] = -100
    metric = CalibrationMetrics(4, scores=["accuracy", "nll"])
    metric.update(logits.view(8, 30, 4).movedim(-1, 1), labels.view(8, 30))
    kept = labels != -100
    wanted = expected(logits[kept], labels[kept])
    assert float(metric.compute()["nll"]) == pytest.approx(wanted["nll"])
    metric.update(logits[:2], torch.full((2,), -100))
    assert float(metric.compute()["accuracy"]) == wanted["accuracy"]


def test_in_a_collection_beside_others_and_drawn():
    logits, labels = case()
    both = torchmetrics.MetricCollection(
        {"own": CalibrationMetrics(4), "acc": torchmetrics.Accuracy("multiclass", num_classes=4, average="micro")}
    )
    both.update(logits, labels)
    found = both.compute()
    accuracy = next(value for name, value in found.items() if name.endswith("accuracy"))
    assert float(accuracy) == pytest.approx(float(found["acc"]))
    assert {name.rpartition("_")[2] for name in found} >= {"nll", "brier"}
    metric = both["own"]
    figure, ax = metric.plot()
    assert len(ax.lines) + len(ax.collections) > 0
    assert figure is ax.figure


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="`scores` must be one of accuracy"):
        CalibrationMetrics(3, scores=["acuracy"])
    with pytest.raises(ValueError, match="at least 2"):
        CalibrationMetrics(1)
    with pytest.raises(ValueError, match="must have 3 classes, got 4"):
        CalibrationMetrics(3).update(*case())


def _process(rank, address, folder):
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    logits, labels = case()
    metric = CalibrationMetrics(4)
    part = slice(0, 120) if rank == 0 else slice(120, None)  # uneven shares
    metric.update(logits[part], labels[part])
    torch.save({name: float(value) for name, value in metric.compute().items()}, f"{folder}/{rank}")
    dist.destroy_process_group()


def test_two_processes_have_the_scores_of_one(tmp_path):
    mp.spawn(_process, (str(tmp_path / "address"), str(tmp_path)), nprocs=2)
    metric = CalibrationMetrics(4)
    metric.update(*case())
    wanted = {name: float(value) for name, value in metric.compute().items()}
    for rank in range(2):
        found = torch.load(tmp_path / str(rank), weights_only=True)
        assert found == {name: pytest.approx(value, rel=1e-12) for name, value in wanted.items()}


def test_trainers_metrics_take_tokens_with_ignored_labels():
    logits, labels = case(240)
    labels[::5] = -100
    kept = labels != -100
    found = calibration_metrics(EvalPrediction(logits.view(8, 30, 4).numpy(), labels.view(8, 30).numpy()))
    assert found == calibration_metrics(EvalPrediction(logits[kept].numpy(), labels[kept].numpy()))
    with pytest.raises(ValueError, match="got -100 everywhere"):
        calibration_metrics(EvalPrediction(logits.numpy(), np.full(240, -100)))
