"""The last steps of a KalmanTrainer: held-out examples set size and sharpness, and are learned."""

import itertools
from typing import Any

import pytest
import torch
from small_classifiers import arguments, by_hand, classifier, same, sentences
from transformers import EarlyStoppingCallback, default_data_collator

import bayes_kf as bkf
from bayes_kf.inference.fitting.passes.covariance_pass import add_at_mean
from bayes_kf.inference.fitting.passes.mean_pass import natural_gradient_step
from bayes_kf.integrations import KalmanTrainer
from bayes_kf.integrations.kalman_trainer import SCALE_EXAMPLES
from bayes_kf.integrations.trainer_held_out import MOST_EXAMPLES, hold_out
from bayes_kf.models.batch import split_batch

CONFIG = bkf.KalmanConfig(rank=4)


def trainer(folder, train=None, evaluation=None, seen=None, config=CONFIG, fraction=0.125, **options):
    """A trainer whose collator appends its batches to ``seen``."""

    def collate(features):
        batch = default_data_collator(features)
        if seen is not None:
            seen.append(batch)
        return batch

    return KalmanTrainer(
        classifier(), arguments(folder, **options), train_dataset=sentences(40) if train is None else train,
        eval_dataset=evaluation, data_collator=collate, kalman=config, held_out_fraction=fraction,
    )  # fmt: skip


def batches(data, size=8):
    return [split_batch(default_data_collator(data[k : k + size])) for k in range(0, len(data), size)]


def test_the_evaluation_set_chooses_size_and_sharpness(tmp_path):
    evaluation, without = sentences(30, seed=1), trainer(tmp_path / "0", fraction=0.0)
    without.train()
    actual = trainer(tmp_path / "1", evaluation=evaluation)
    metrics = actual.train().metrics
    expected = without.posterior.calibrate(batches(evaluation))
    assert same(actual.posterior.state, expected.state)
    assert actual.posterior.config == expected.config
    assert actual.posterior.state.examples == 40  # the evaluation set is not learned
    assert (actual.held_out, without.held_out) == ("eval_dataset", None)
    assert metrics["held_out_examples"] == 30
    for name in ("size", "sharpness"):
        assert torch.equal(actual.posterior.history[name], expected.history[name])
        assert metrics[name] == float(expected.history[name][0])
    assert len(actual.train_dataset) == 40


def parts(data):
    """The examples that are trained on, and the held-out ones."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    cut = len(data) // 8
    return [data[k] for k in sorted(order[cut:])], [data[k] for k in sorted(order[:cut])]


def test_one_epoch_learns_the_held_out_share_last(tmp_path):
    seen: list[Any] = []
    fitted, held_out = parts(sentences(80))
    actual = trainer(tmp_path, sentences(80), seen=seen)
    actual.train()
    first = next(k for k, batch in enumerate(seen) if len(batch["labels"]) == SCALE_EXAMPLES)
    learned = [seen[first], *(batch for k, batch in enumerate(seen) if k != first)][: 1 + 18]
    tokens = torch.cat([batch["input_ids"] for batch in learned[1:]])
    assert sorted(tokens.tolist()) == sorted(one["input_ids"].tolist() for one in fitted)
    kf = bkf.KalmanFilter(classifier(), CONFIG)
    expected = bkf.Posterior(kf, by_hand(learned, CONFIG)).calibrate(batches(held_out))
    state = expected.state
    for inputs, targets in batches(held_out):
        state, _ = expected.kf.update(state, inputs, targets)
    assert same(actual.posterior.state, state)
    assert actual.posterior.state.examples == 80
    assert actual.posterior.softmax_temperature == expected.softmax_temperature
    assert actual.held_out == "train_dataset"
    weight = dict(actual.model.named_parameters())
    assert all(torch.equal(weight[name], tensor) for name, tensor in actual.posterior.mean.items())


def test_several_epochs_end_with_a_mean_pass_over_all_examples(tmp_path):
    data, seen = sentences(80), []
    fitted, held_out = parts(data)
    actual = trainer(tmp_path / "1", data, seen=seen, num_train_epochs=2)
    actual.train()
    before = trainer(tmp_path / "0", fitted, num_train_epochs=2, fraction=0.0)
    before.train()
    calibrated = before.posterior.calibrate(batches(held_out))
    state = add_at_mean(calibrated.kf, calibrated.state, batches(held_out))
    last = seen[-20:]
    assert sorted(torch.cat([b["input_ids"] for b in last]).tolist()) == sorted(o["input_ids"].tolist() for o in data)
    for number, batch in enumerate(last):
        rate = 0.5 * (1.0 - number / 20)
        state, _ = natural_gradient_step(CONFIG, calibrated.adapter, state, *split_batch(batch), rate)
    torch.testing.assert_close(actual.posterior.mean_vector, state.belief.mean, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(actual.posterior.variance_vector, state.belief.marginal_variance())
    assert actual.posterior.state.examples == 80


@pytest.mark.parametrize("evaluation", [None, sentences(30, seed=1)], ids=["train_dataset", "eval_dataset"])
@pytest.mark.parametrize(("epochs", "stop"), [(1, 4), (2, 13)])
def test_resumed_training_equals_uninterrupted_training(tmp_path, evaluation, epochs, stop):
    options = {"num_train_epochs": epochs, "save_strategy": "steps", "save_steps": stop}
    whole = trainer(tmp_path, evaluation=evaluation, **options)
    whole.train()
    resumed = trainer(tmp_path, evaluation=evaluation, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert same(resumed.posterior.state, whole.posterior.state)
    assert resumed.posterior.config == whole.posterior.config
    with pytest.raises(ValueError, match="`train_dataset` must be a new one to continue training"):
        resumed.train()


def test_the_best_checkpoint_is_the_one_that_is_calibrated(tmp_path):
    evaluation = sentences(30, seed=1)
    actual = trainer(
        tmp_path, evaluation=evaluation, num_train_epochs=4, eval_strategy="steps", eval_steps=2, save_strategy="steps",
        save_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_log_loss", greater_is_better=False,
    )  # fmt: skip
    actual.add_callback(EarlyStoppingCallback(early_stopping_patience=1))
    actual.train()
    best = bkf.Posterior.from_pretrained(actual.state.best_model_checkpoint, classifier())
    expected = best.calibrate(batches(evaluation))
    assert same(actual.posterior.state, expected.state)


def test_a_saved_model_keeps_what_was_chosen(tmp_path):
    actual = trainer(tmp_path / "run", evaluation=sentences(30, seed=1))
    actual.train()
    actual.save_model(str(tmp_path / "end"))
    actual.save_state()
    opened = bkf.Posterior.from_pretrained(tmp_path / "end", classifier())
    assert opened.softmax_temperature == actual.posterior.softmax_temperature
    assert torch.equal(opened.history["size"], actual.posterior.history["size"])
    again = trainer(tmp_path / "again", sentences(12, seed=5), evaluation=sentences(30, seed=1))
    again._trained.restore(tmp_path / "end", again.model, CONFIG)  # its temperature differs, since it was calibrated
    again.train()
    assert again.posterior.state.examples == 52


@pytest.mark.parametrize("config", [None, bkf.KalmanConfig(temperature=1.0)], ids=["defaults", "temperature"])
def test_a_given_temperature_stays(tmp_path, config):
    actual = trainer(tmp_path, evaluation=sentences(30, seed=1), config=config)
    actual.train()
    assert ("size" in actual.posterior.history) == (config is None)
    assert actual.held_out == (None if config else "eval_dataset")


def test_which_examples_are_held_out():
    data, bare = sentences(40), [{"input_ids": torch.ones(2)}] * 9
    fitted, held_out = parts(data)
    labelled = hold_out(data, data[:9], 0.125, "labels")
    assert (labelled.fitted, labelled.examples, labelled.name) == (data, data[:9], "eval_dataset")
    for evaluation in (None, {"first": data, "second": data}, bare, []):
        share = hold_out(data, evaluation, 0.125, "labels")
        assert share.name == "train_dataset"
        assert [one["labels"] for one in share.examples] == [one["labels"] for one in held_out]
        assert [one["labels"] for one in share.fitted] == [one["labels"] for one in fitted]
    many = hold_out(data, [{"labels": k} for k in range(2 * MOST_EXAMPLES + 1)], 0.125, "labels")
    numbers = [one["labels"] for one in many.examples]
    assert numbers == list(itertools.islice(range(0, 2 * MOST_EXAMPLES + 1, 3), len(numbers)))
    assert len(numbers) <= MOST_EXAMPLES
    assert hold_out(data, data, 0.0, "labels") is None
    assert hold_out(data[:7], None, 0.125, "labels") is None
    assert hold_out(iter(data), None, 0.125, "labels") is None


@pytest.mark.parametrize("fraction", [1.0, -0.1, "an eighth", True])
def test_a_fraction_must_lie_in_the_unit_interval(tmp_path, fraction):
    with pytest.raises(ValueError, match=rf"^`held_out_fraction` must lie in \[0, 1\), got {fraction!r}\.$"):
        trainer(tmp_path, fraction=fraction)
