"""KalmanTrainer against the filter by hand on the batches that its collator saw, and what a Trainer script expects."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from small_classifiers import Recorder, arguments, by_hand, classifier, same, sentences
from transformers import (
    BertForSequenceClassification,
    EarlyStoppingCallback,
    EvalPrediction,
    Trainer,
    default_data_collator,
)

import bayes_kf as bkf
from bayes_kf.evaluation import calibration_test
from bayes_kf.inference.filtering import prequential_temperature
from bayes_kf.inference.fitting.passes import mean_pass
from bayes_kf.integrations import KalmanTrainer, calibration_metrics
from bayes_kf.integrations.kalman_trainer import SCALE_EXAMPLES
from bayes_kf.models.batch import split_batch
from bayes_kf.models.language import NextToken
from benchmarks.reliability.folder_snapshots import killed_at, snapshot

WHITENED = {"lora_inputs": "whitened"}


def trained(folder, config=None, model=None, data=None, trainer=KalmanTrainer, held_out_fraction=0.0, **options):
    recorder = Recorder()
    actual = trainer(
        classifier() if model is None else model,
        arguments(folder, **options),
        data_collator=recorder,
        train_dataset=sentences(40) if data is None else data,
        eval_dataset=sentences(30, seed=1),
        kalman=config,
        held_out_fraction=held_out_fraction,
    )
    actual.train()
    return actual, recorder.batches


@pytest.mark.parametrize("settings", [{"covariance": "diagonal"}, {"covariance": "low_rank"}, WHITENED])
def test_an_epoch_equals_the_filter_over_its_batches(tmp_path, settings):
    config = bkf.KalmanConfig(**settings)
    actual, batches = trained(tmp_path, config)
    assert len(split_batch(batches[0])[1]) == SCALE_EXAMPLES
    assert [len(batch["labels"]) for batch in batches[1:]] == [4] * 10
    order = torch.cat([batch["input_ids"] for batch in batches[1:]])
    assert not torch.equal(order, torch.stack([one["input_ids"] for one in sentences(40)]))  # Trainer's shuffle
    assert same(actual.posterior.state, by_hand(batches, config))


def test_later_epochs_move_only_the_mean(tmp_path):
    config = bkf.KalmanConfig(rank=4)
    actual, batches = trained(tmp_path, config, num_train_epochs=3)
    expected = by_hand(batches, config, epochs=3)
    once = by_hand(batches[:11], config)
    state = actual.posterior.state
    torch.testing.assert_close(state.belief.mean, expected.belief.mean, rtol=1e-6, atol=1e-8)
    assert state.examples == 40
    assert same(state._replace(belief=state.belief._replace(mean=once.belief.mean)), once)
    assert float((state.belief.mean - once.belief.mean).norm()) > 1e-3


def test_an_epoch_cut_short_by_max_steps_moves_only_the_mean(tmp_path):
    """16 steps of 10 an epoch: the rate falls to zero at their end."""
    config = bkf.KalmanConfig(rank=4)
    actual, batches = trained(tmp_path, config, max_steps=16)
    kf = bkf.KalmanFilter(classifier(), config)
    state = by_hand(batches[:11], config)
    for step, batch in enumerate(batches[11:17]):
        inputs, targets = split_batch(batch)
        state, _ = mean_pass.natural_gradient_step(config, kf.adapter, state, inputs, targets, 1.0 - step / 6)
    torch.testing.assert_close(actual.posterior.mean_vector, state.belief.mean, rtol=1e-5, atol=1e-7)


def test_batches_of_an_accumulated_step_are_updates(tmp_path):
    config = bkf.KalmanConfig(covariance="diagonal")
    actual, batches = trained(tmp_path, config, gradient_accumulation_steps=3)
    assert actual.state.global_step == 4  # 3 + 3 + 3 + 1 batches
    assert actual.posterior.state.step == 10
    assert same(actual.posterior.state, by_hand(batches, config))


def test_default_settings(tmp_path):
    once, _ = trained(tmp_path / "one")
    assert once.posterior.config == bkf.KalmanConfig()
    more, _ = trained(tmp_path / "two", num_train_epochs=2)
    assert more.posterior.config == bkf.KalmanConfig.dataset(mean_passes=0)


def test_a_stream_without_a_length(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(sentences(24))

    config = bkf.KalmanConfig(covariance="diagonal")
    actual, batches = trained(tmp_path, config, data=Stream(), max_steps=5)
    kf = bkf.KalmanFilter(classifier(), config)
    state = kf.init(split_batch(batches[0])[0])  # the prior's scale is that of the first batch
    for batch in batches[:5]:
        state, _ = kf.update(state, *split_batch(batch))
    assert same(actual.posterior.state, state)
    again, _ = trained(tmp_path / "again", config, data=Stream(), max_steps=9)  # the stream begins again: no update
    assert (again.posterior.state.step, again.posterior.state.examples) == (6, 24)


def test_the_model_has_the_mean_and_nothing_else_changes(tmp_path):
    model = classifier()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    actual, _ = trained(tmp_path, model=model)
    mean = actual.posterior.mean
    for name, tensor in model.named_parameters():
        expected = mean[name] if tensor.requires_grad else before[name]
        assert torch.equal(tensor, expected), name
        assert tensor.grad is None


# ---- evaluation ----


def test_evaluation_predicts_with_the_posterior(tmp_path):
    actual, _ = trained(tmp_path)
    metrics = actual.evaluate()
    data = sentences(30, seed=1)
    batches = [default_data_collator(data[first : first + 8]) for first in range(0, 30, 8)]
    expected = actual.posterior.predict_loader(batches)
    output = actual.predict(data)
    np.testing.assert_allclose(np.exp(output.predictions), expected.probs.numpy(), rtol=1e-5)
    sums = output.predictions[np.arange(30), output.label_ids]
    assert metrics["eval_log_loss"] == pytest.approx(-sums.mean(), rel=1e-5)
    assert metrics["eval_accuracy"] == pytest.approx(np.mean(output.predictions.argmax(1) == output.label_ids))
    probs = torch.from_numpy(output.predictions).double().softmax(1)
    ece = calibration_test(probs, torch.from_numpy(output.label_ids), "ece")
    assert (metrics["eval_ece"], metrics["eval_ece_null_high"]) == pytest.approx((ece.value, ece.null_high))
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_log_loss"], rel=0.1)  # batches count alike in Trainer's
    mean = actual.posterior.predict_loader(batches, method="mean")
    assert not np.allclose(np.exp(output.predictions), mean.probs.numpy(), atol=1e-3)


@pytest.mark.filterwarnings("ignore:`method` 'sampled' and 'linearized' disagree")
@pytest.mark.parametrize("method", ["linearized", "sampled"])
def test_evaluation_equals_evaluate_for_any_batch_size(tmp_path, method):
    actual, _ = trained(tmp_path)
    actual.method = method
    data = sentences(30, seed=1)
    one = [default_data_collator(data)]
    scores = bkf.evaluate(actual.posterior, one, method=method, num_simulations=50).scores
    for size in (1, 7, 100):
        actual.args.per_device_eval_batch_size = size
        metrics = actual.evaluate()
        for name, own in (("accuracy", "accuracy"), ("log_loss", "nll"), ("brier", "brier"), ("ece", "ece")):
            assert metrics[f"eval_{name}"] == pytest.approx(scores[own], abs=2e-5), (size, name)


def test_before_training_evaluation_predicts_with_the_model(tmp_path):
    model = classifier()
    options = {"eval_dataset": sentences(30, seed=1), "data_collator": default_data_collator}
    actual = KalmanTrainer(model, arguments(tmp_path), **options).evaluate()
    plain = Trainer(model, arguments(tmp_path), **options).evaluate()
    assert actual["eval_loss"] == pytest.approx(plain["eval_loss"])
    assert actual["eval_log_loss"] == pytest.approx(plain["eval_loss"], rel=1e-3)


def test_own_metrics_are_kept(tmp_path):
    actual = KalmanTrainer(
        classifier(),
        arguments(tmp_path),
        train_dataset=sentences(8),
        eval_dataset=sentences(8, seed=1),
        compute_metrics=lambda p: {"accuracy": 7.0, "classes": p.predictions.shape[1]},
    )
    actual.train()
    metrics = actual.evaluate()
    assert (metrics["eval_accuracy"], metrics["eval_classes"]) == (7.0, 3)
    assert 0 <= metrics["eval_ece"] <= 1


def test_predictions_without_labels(tmp_path):
    actual, _ = trained(tmp_path)
    bare = [{name: value for name, value in one.items() if name != "labels"} for one in sentences(9)]
    output = actual.predict(bare)
    assert output.label_ids is None
    np.testing.assert_allclose(np.exp(output.predictions).sum(1), np.ones(9), rtol=1e-5)


def test_regression(tmp_path):
    data = [one | {"labels": float(one["labels"])} for one in sentences(40)]
    config = bkf.KalmanConfig(likelihood="gaussian", noise_variance=0.3)
    actual = KalmanTrainer(
        classifier(labels=1), arguments(tmp_path), train_dataset=data, eval_dataset=data, kalman=config,
        held_out_fraction=0.0,
    )  # fmt: skip
    before = actual.evaluate()["eval_loss"]
    actual.train()
    metrics = actual.evaluate()
    assert "eval_ece" not in metrics
    batches = [default_data_collator(data[first : first + 8]) for first in range(0, 40, 8)]
    batches = [b | {"labels": b["labels"].unsqueeze(1)} for b in batches]
    expected = actual.posterior.predict_loader(batches)
    assert metrics["eval_loss"] == pytest.approx(-float(expected.log_prob.mean()), rel=1e-5)
    assert before > 0.5


def test_float_labels_are_regressed_on_by_default(tmp_path):
    data = [one | {"labels": float(one["labels"]) + 0.5} for one in sentences(24)]
    trainer = KalmanTrainer(
        classifier(labels=1), arguments(tmp_path), train_dataset=data, eval_dataset=data, held_out_fraction=0.0
    )
    trainer.train()
    settings = trainer.posterior.config
    assert (settings.likelihood, settings.noise_variance) == ("gaussian", "estimated")
    assert "eval_ece" not in trainer.evaluate()


def test_an_estimated_noise_variance_is_that_of_the_last_mean(tmp_path):
    """σ² = SSE/(N − γ) with γ = Σ(1 − P_ii/p₀_i) after the last epoch, as of ``fit`` with passes of the mean."""
    data = [one | {"labels": float(one["labels"])} for one in sentences(40)]
    config = bkf.KalmanConfig(likelihood="gaussian", noise_variance="estimated", mean_passes=0)
    actual = KalmanTrainer(
        classifier(labels=1), arguments(tmp_path, num_train_epochs=3), train_dataset=data, kalman=config,
        held_out_fraction=0.0,
    )  # fmt: skip
    actual.train()
    posterior, batch = actual.posterior, default_data_collator(data)
    targets = batch.pop("labels").unsqueeze(1)
    squares = (targets - posterior.adapter.outputs(posterior.mean_vector, batch)).double().square().sum()
    gamma = (1.0 - posterior.variance_vector.double() / posterior.state.prior.variance.double()).sum()
    assert float(posterior.state.noise.variance) == pytest.approx(float(squares / (40 - gamma)), rel=1e-3)
    assert 0.5 < gamma < 39


def test_a_temperature_at_the_cold_end_warns_after_training(tmp_path, monkeypatch):
    monkeypatch.setattr(prequential_temperature, "MEAN_ALONE", 1e9)
    with pytest.warns(UserWarning, match="predictions are those of the mean alone"):
        trained(tmp_path)


def test_adapters_of_language_models_and_bad_arguments_raise(tmp_path):
    class Language(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(5, 5)

        def forward(self, input_ids, attention_mask=None):
            return {"logits": self.table(input_ids)}

    message = (
        r"`model` must be a torch module for KalmanTrainer, got NextToken, which is an AdapterModel; "
        r"`bayes_kf\.fit` takes it"
    )
    with pytest.raises(ValueError, match=message):
        KalmanTrainer(NextToken(Language()))
    with pytest.raises(ValueError, match=message):
        KalmanTrainer(model=NextToken(Language()))
    with pytest.raises(ValueError, match=r"`kalman` must be a KalmanConfig, got dict; `KalmanConfig\(\*\*settings\)`"):
        KalmanTrainer(Language(), kalman={"covariance": "full"})
    with pytest.raises(ValueError, match=r"got 'linearised'; did you mean 'linearized'\?"):
        KalmanTrainer(Language(), method="linearised")


def test_metrics_of_a_tuple_and_of_bad_shapes():
    logits = np.log(np.array([[0.9, 0.1], [0.2, 0.8]]))
    actual = calibration_metrics(EvalPrediction((logits, logits), np.array([0, 0])))
    assert actual["log_loss"] == pytest.approx(-(math.log(0.9) + math.log(0.2)) / 2)
    assert actual["brier"] == pytest.approx((0.02 + 1.28) / 2)
    with pytest.raises(ValueError, match=r"predictions \(N, classes\) and labels \(N,\), got \(2, 2\) and \(3,\)"):
        calibration_metrics(EvalPrediction(logits, np.zeros(3)))


# ---- logs ----


def test_logs_have_prequential_scores_and_none_of_an_optimizer(tmp_path):
    actual, batches = trained(tmp_path, logging_strategy="steps", logging_steps=5)
    logs = [entry for entry in actual.state.log_history if "loss" in entry]
    assert len(logs) == 2
    kf, model = bkf.KalmanFilter(classifier(), bkf.KalmanConfig()), []
    state = kf.init(split_batch(batches[0])[0])
    for batch in batches[1:6]:
        state, info = kf.update(state, *split_batch(batch))
        model.append(info)
    assert logs[0]["loss"] == pytest.approx(float(torch.cat([i.log_loss for i in model]).mean()), abs=1e-4)
    assert logs[0]["online_accuracy"] == pytest.approx(float(torch.cat([i.correct for i in model]).double().mean()))
    total = sum(i.innovation for i in model) / sum(i.degrees_of_freedom for i in model)
    assert logs[0]["innovation"] == pytest.approx(total)
    assert logs[0]["temperature"] == kf.temperature(state)
    assert not {"grad_norm", "learning_rate"} & set().union(*map(set, actual.state.log_history))


def test_tensorboard(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    actual, _ = trained(
        tmp_path, report_to="tensorboard", logging_strategy="steps", logging_steps=5, eval_strategy="epoch"
    )
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder)).Reload()
    wanted = {
        "train/loss",
        "train/online_accuracy",
        "train/innovation",
        "train/temperature",
        "eval/ece",
        "eval/log_loss",
    }
    assert wanted <= set(events.Tags()["scalars"])
    assert not {"train/grad_norm", "train/learning_rate"} & set(events.Tags()["scalars"])
    logged = [event.value for event in events.Scalars("train/online_accuracy")]
    kept = [entry["online_accuracy"] for entry in actual.state.log_history if "online_accuracy" in entry]
    assert logged == pytest.approx(kept)


# ---- checkpoints ----


@pytest.mark.parametrize("covariance", ["diagonal", "low_rank", "block_diagonal"])
@pytest.mark.parametrize("stop", [4, 10, 13])
def test_resumed_training_equals_uninterrupted_training(tmp_path, covariance, stop):
    """In the middle of the filter's epoch, between the epochs, and in the middle of a later one."""
    config = bkf.KalmanConfig(covariance=covariance, rank=3)
    options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": stop}
    whole, _ = trained(tmp_path / "whole", config, **options)
    resumed = KalmanTrainer(
        classifier(seed=0),
        arguments(tmp_path / "whole", **options),
        train_dataset=sentences(40),
        data_collator=default_data_collator,
        kalman=config,
        held_out_fraction=0.0,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert same(resumed.posterior.state, whole.posterior.state)
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_is_a_posterior_and_a_plain_adapter(tmp_path):
    actual, _ = trained(tmp_path, save_strategy="epoch")
    folder = tmp_path / "checkpoint-10"
    assert not list(folder.glob("optimizer*"))
    assert not list(folder.glob("scheduler*"))
    base = classifier().get_base_model().__class__(classifier().config)  # of other weights: refused
    with pytest.raises(ValueError, match="`base_model` must be the model"):
        bkf.Posterior.from_pretrained(folder, base)
    again = bkf.Posterior.from_pretrained(folder, classifier())
    assert same(again.state, actual.posterior.state)
    plain = PeftModel.from_pretrained(classifier(lora=False), str(folder))
    inputs = split_batch(default_data_collator(sentences(5)))[0]
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(**inputs).logits, actual.model.eval()(**inputs).logits)
    actual.save_model(str(tmp_path / "end"))
    assert same(bkf.Posterior.from_pretrained(tmp_path / "end", classifier()).state, actual.posterior.state)


class Words:
    """A tokenizer, as far as saving goes."""

    def save_pretrained(self, folder):
        (Path(folder) / "tokenizer.json").write_text('{"words": 20}')


def test_a_saved_model_leaves_other_files_unchanged(tmp_path):
    """The tokenizer and what else Trainer writes stay when the posterior is saved over it, and so do all others."""
    actual, _ = trained(tmp_path / "run", save_strategy="no")
    actual.processing_class = Words()
    folder = tmp_path / "end"
    (folder / "checkpoint-500").mkdir(parents=True)
    (folder / "checkpoint-500" / "optimizer.pt").write_text("x")
    (folder / "README.md").write_text("mine")
    (folder / "training_args.bin").write_text("of an earlier run")  # Trainer replaces its own names
    with pytest.warns(UserWarning, match=r"README\.md was edited, or bayes_kf did not write it, and stays"):
        actual.save_model(str(folder))
    assert (folder / "training_args.bin").stat().st_size > 1000
    kept = {name: what for name, what in snapshot(folder).items() if "kalman" not in name and name != "SHA256SUMS"}
    with pytest.warns(UserWarning, match=r"README\.md was edited"):
        actual.posterior.save_pretrained(folder)
    after = snapshot(folder)
    assert kept.keys() | {"SHA256SUMS", "kalman_config.json", "kalman_state.safetensors"} == after.keys()
    assert {name: after[name] for name in kept} == kept
    assert same(bkf.Posterior.from_pretrained(folder, classifier()).state, actual.posterior.state)
    with pytest.warns(UserWarning, match=r"README\.md was edited"):
        actual.save_model(str(folder))
    assert snapshot(folder).keys() == after.keys()


def test_files_in_the_way_of_a_checkpoint_raise_before_trainer_writes(tmp_path):
    actual, _ = trained(tmp_path / "run", save_strategy="no")
    (tmp_path / "end").mkdir()
    for name in ("kalman_config.json", "adapter_config.json"):
        (tmp_path / "end" / name).write_text("mine")
    before = snapshot(tmp_path / "end")
    with pytest.raises(ValueError, match=r"got kalman_config\.json \(not written by bayes_kf\) in .*end"):
        actual.save_model(str(tmp_path / "end"))
    assert snapshot(tmp_path / "end") == before


def test_the_trained_part_of_a_model_does_not_replace_a_whole_one(tmp_path):
    """Both are called model.safetensors, and Trainer's holds the frozen layers too."""
    model = classifier(lora=False)
    for name, tensor in model.named_parameters():
        tensor.requires_grad_("classifier" in name)
    actual = KalmanTrainer(model, arguments(tmp_path), train_dataset=sentences(8))
    actual.train()
    actual.save_model(str(tmp_path / "end"))
    before = snapshot(tmp_path / "end")
    with pytest.raises(ValueError, match=r"got model\.safetensors \(not written by bayes_kf\)"):
        actual.posterior.save_pretrained(tmp_path / "end")
    assert snapshot(tmp_path / "end") == before
    actual.save_model(str(tmp_path / "end"))
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "end")
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )


@pytest.mark.skipif(sys.platform == "win32", reason="the process to be killed is made by os.fork, which Windows lacks")
def test_a_checkpoint_killed_while_saving_opens_as_the_old_or_the_new_one(tmp_path):
    first, _ = trained(tmp_path / "run", save_strategy="no")
    second, _ = trained(tmp_path / "run", bkf.KalmanConfig(covariance="diagonal"), save_strategy="no")
    folder, kinds = tmp_path / "end", []
    for step in range(1, 60, 4):
        first.save_model(str(folder))
        done = not killed_at(step, lambda: second.save_model(str(folder)))
        opened = bkf.Posterior.from_pretrained(folder, classifier())
        kinds.append(opened.config.covariance)
        assert same(opened.state, (second if kinds[-1] == "diagonal" else first).posterior.state)
    assert done
    assert sorted(kinds, key="diagonal".__eq__) == kinds  # the old one, then the new one
    assert len(set(kinds)) == 2


def test_checkpoints_and_saved_models_have_the_posterior_s_card(tmp_path):
    """PEFT's own is a form with an empty base model."""
    actual, _ = trained(tmp_path / "run", save_strategy="epoch")
    actual.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "run" / "checkpoint-10", tmp_path / "saved"):
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert "40 examples in 10 updates" in text
        assert "base_model:" not in text
        assert "None" not in text
        assert f'Posterior.from_pretrained("{folder.name}"' in text


def test_early_stopping_and_the_best_belief(tmp_path):
    actual = KalmanTrainer(
        classifier(),
        arguments(
            tmp_path,
            num_train_epochs=4,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_log_loss",
            greater_is_better=False,
        ),
        train_dataset=sentences(40),
        eval_dataset=sentences(30, seed=1),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
        held_out_fraction=0.0,
    )
    actual.train()
    losses = {e["step"]: e["eval_log_loss"] for e in actual.state.log_history if "eval_log_loss" in e}
    best = min(losses, key=losses.get)
    assert actual.state.global_step < 40  # stopped early
    assert actual.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    expected = bkf.Posterior.from_pretrained(actual.state.best_model_checkpoint, classifier())
    assert same(actual.posterior.state, expected.state)
    assert actual.evaluate()["eval_log_loss"] == pytest.approx(losses[best])


def test_an_incomplete_checkpoint_raises(tmp_path):
    trained(tmp_path, save_strategy="steps", save_steps=5)
    folder = tmp_path / "checkpoint-5"
    (folder / "trainer_state.json").unlink()
    fresh = KalmanTrainer(classifier(), arguments(tmp_path), train_dataset=sentences(40))
    with pytest.raises(ValueError, match=r"`resume_from_checkpoint` must be complete, got .*checkpoint-5 without"):
        fresh.train(resume_from_checkpoint=str(folder))
    (tmp_path / "checkpoint-10" / "kalman_state.safetensors").unlink()
    with pytest.raises(ValueError, match=r"`folder` must hold a readable kalman_state\.safetensors"):
        fresh.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    with pytest.raises(ValueError, match="`posterior` needs a trainer that has trained"):
        _ = fresh.posterior


def test_a_checkpoint_of_other_settings_raises(tmp_path):
    trained(tmp_path, bkf.KalmanConfig(rank=3), save_strategy="steps", save_steps=5)
    model = classifier()
    before = [tensor.clone() for tensor in model.parameters()]
    fresh = KalmanTrainer(
        model, arguments(tmp_path), train_dataset=sentences(40), kalman=bkf.KalmanConfig(rank=4, seed=1)
    )
    with pytest.raises(ValueError, match=r"`kalman` must be as in .*checkpoint-5, got another rank, seed"):
        fresh.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# ---- what is refused ----


def test_training_twice_on_the_same_data_raises(tmp_path):
    actual, _ = trained(tmp_path)
    with pytest.raises(ValueError, match="`train_dataset` must be a new one to continue training"):
        actual.train()
    actual.train_dataset = sentences(12, seed=5)
    actual.train()
    assert actual.posterior.state.examples == 52


@pytest.mark.parametrize("setting", [{"noise": "ema_taylor"}, {"drift_variance": 0.1}], ids=str)
def test_settings_that_exclude_several_epochs_raise(tmp_path, setting):
    with pytest.raises(ValueError, match="`num_train_epochs` must be 1 with these settings"):
        trained(tmp_path, bkf.KalmanConfig(**setting), num_train_epochs=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "exact"}, "`method` must be one of .*, got 'exact'"),
        ({"optimizers": (torch.optim.SGD([torch.zeros(1)]), None)}, "KalmanTrainer needs no `optimizers`"),
        ({"compute_loss_func": print}, "KalmanTrainer needs no `compute_loss_func`"),
    ],
    ids=["method", "optimizers", "loss"],
)
def test_unsupported_arguments_raise(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        KalmanTrainer(classifier(), arguments(tmp_path), train_dataset=sentences(4), **options)


def test_label_smoothing(tmp_path):
    with pytest.raises(ValueError, match="KalmanTrainer needs no `label_smoothing_factor`"):
        KalmanTrainer(classifier(), arguments(tmp_path, label_smoothing_factor=0.1))


def test_data_without_labels(tmp_path):
    bare = [{name: value for name, value in one.items() if name != "labels"} for one in sentences(8)]
    actual = KalmanTrainer(classifier(), arguments(tmp_path), train_dataset=bare)
    with pytest.raises(ValueError, match="`train_dataset` must have 'labels', got batches of input_ids"):
        actual.train()


def test_divergence_keeps_the_belief_before(tmp_path, monkeypatch):
    real, calls = bkf.KalmanFilter.update, []

    def update(self, state, inputs, targets, **options):
        calls.append(state)
        if len(calls) == 4:
            raise bkf.DivergenceError(state.step, "a test", state)
        return real(self, state, inputs, targets, **options)

    monkeypatch.setattr(bkf.KalmanFilter, "update", update)
    actual = KalmanTrainer(classifier(), arguments(tmp_path), train_dataset=sentences(40))
    with pytest.raises(bkf.DivergenceError):
        actual.train()
    assert same(actual.posterior.state, calls[-1])
    assert actual.posterior.state.step == 3


def test_the_settings_of_a_checkpoint_are_json(tmp_path):
    actual, _ = trained(tmp_path, bkf.KalmanConfig(rank=5), save_strategy="epoch")
    kept = json.loads((tmp_path / "checkpoint-10" / "kalman_config.json").read_text(encoding="utf-8"))
    assert kept["rank"] == 5
    assert dataclasses.replace(actual.posterior.config) == bkf.KalmanConfig(rank=5)


class Broken(list):
    """A data set whose examples cannot all be read."""

    def __getitem__(self, index):
        if index >= 56:
            raise OSError("the disk is gone")
        return super().__getitem__(index)


def test_training_again_after_an_interruption_raises(tmp_path):
    data = Broken(sentences(80))
    trainer = KalmanTrainer(
        classifier(), arguments(tmp_path, train_sampling_strategy="sequential"), train_dataset=data,
        kalman=bkf.KalmanConfig(initial_variance=0.01),
    )  # fmt: skip
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.train()
    learned = trainer.posterior.state.examples
    assert 0 < learned <= 56
    with pytest.raises(ValueError, match="`train_dataset` must be a new one to continue training"):
        trainer.train()
    assert trainer.posterior.state.examples == learned


def test_several_epochs_of_a_second_data_set_raise(tmp_path):
    trainer, _ = trained(tmp_path, bkf.KalmanConfig(initial_variance=0.01))
    before = trainer.posterior.mean_vector
    trainer.train_dataset = sentences(20, seed=5)
    trainer.args.num_train_epochs = 2
    with pytest.raises(ValueError, match="`num_train_epochs` must be 1 for a second data set, got 2"):
        trainer.train()
    assert torch.equal(trainer.posterior.mean_vector, before)
    trainer.args.num_train_epochs = 1
    trainer.train()
    assert trainer.posterior.state.examples == 60


def test_ignoring_the_data_skip_raises(tmp_path):
    with pytest.raises(ValueError, match="no `ignore_data_skip`, which would count batches twice"):
        trained(tmp_path, ignore_data_skip=True)
