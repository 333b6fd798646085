"""KalmanTrainer with several settings: its mixture against the bank by hand, evaluation, checkpoints, resuming."""

import pytest
import torch
from peft import PeftModel
from small_classifiers import Recorder, arguments, classifier, same, sentences
from transformers import default_data_collator

import bayes_kf as bkf
from bayes_kf.inference.fitting.passes import mean_pass
from bayes_kf.integrations import KalmanTrainer
from bayes_kf.models.batch import split_batch

CONFIGS = [bkf.KalmanConfig(rank=3), bkf.KalmanConfig(rank=3, initial_logit_sd=1.0)]


def trainer(folder, configs=CONFIGS, recorder=None, **options):
    return KalmanTrainer(
        classifier(),
        arguments(folder, **options),
        data_collator=recorder or default_data_collator,
        train_dataset=sentences(40),
        eval_dataset=sentences(30, seed=1),
        kalman=configs,
    )


def test_the_members_are_those_of_a_bank_over_the_batches(tmp_path):
    recorder = Recorder()
    actual = trainer(tmp_path, recorder=recorder)
    actual.train()
    first, *batches = [split_batch(batch) for batch in recorder.batches]
    bank = bkf.Bank(classifier(), CONFIGS)
    state = bank.init(first[0])
    for inputs, targets in batches:
        state, _ = bank.update(state, inputs, targets)
    expected = bank.mixture(state)
    assert isinstance(actual.posterior, bkf.MixturePosterior)
    assert actual.posterior.weights == expected.weights
    assert expected.weights == pytest.approx(sorted(bank.weights(state).tolist(), reverse=True))
    for one, other in zip(actual.posterior.members, expected.members, strict=True):
        assert same(one.state, other.state)
    assert torch.equal(bkf.AdapterModel(actual.model).vector(), expected.best.mean_vector)
    inputs, targets = batches[0]
    torch.testing.assert_close(
        expected.predict(inputs, "mean").probs, bank.predict(state, inputs, method="mean").probs, rtol=1e-5, atol=1e-6
    )


def test_later_epochs_move_the_mean_of_every_member(tmp_path):
    recorder = Recorder()
    actual = trainer(tmp_path, recorder=recorder, num_train_epochs=2)
    actual.train()
    first, *batches = [split_batch(batch) for batch in recorder.batches]
    bank = bkf.Bank(classifier(), CONFIGS)
    state = bank.init(first[0])
    for inputs, targets in batches[:10]:
        state, _ = bank.update(state, inputs, targets)
    for kf, member in zip(bank.filters, state.states, strict=True):
        for index, (inputs, targets) in enumerate(batches[10:]):
            rate = 1.0 - index / 10
            member, _ = mean_pass.natural_gradient_step(kf.config, kf.adapter, member, inputs, targets, rate)
        found = next(m for m in actual.posterior.members if m.config == kf.config)
        assert same(found.state, member)
    assert actual.posterior.weights == bank.mixture(state).weights  # those of the first epoch


@pytest.mark.filterwarnings("ignore:`method` 'sampled' and 'linearized' disagree")
@pytest.mark.parametrize("method", ["linearized", "sampled"])
def test_evaluation_equals_evaluate_for_any_batch_size(tmp_path, method):
    actual = trainer(tmp_path)
    actual.train()
    actual.method = method
    scores = bkf.evaluate(
        actual.posterior, [default_data_collator(sentences(30, seed=1))], method=method, num_simulations=50
    ).scores
    for size in (7, 100):
        actual.args.per_device_eval_batch_size = size
        metrics = actual.evaluate()
        for name, own in (("accuracy", "accuracy"), ("log_loss", "nll"), ("brier", "brier"), ("ece", "ece")):
            assert metrics[f"eval_{name}"] == pytest.approx(scores[own], abs=2e-5), (size, name)


@pytest.mark.parametrize("stop", [4, 13])
def test_resumed_training_equals_uninterrupted_training(tmp_path, stop):
    options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": stop}
    whole = trainer(tmp_path, **options)
    whole.train()
    resumed = trainer(tmp_path, CONFIGS[::-1], **options)  # in another order
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert resumed.posterior.weights == whole.posterior.weights
    for one, other in zip(resumed.posterior.members, whole.posterior.members, strict=True):
        assert same(one.state, other.state)
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_is_a_mixture_and_a_plain_adapter(tmp_path):
    actual = trainer(tmp_path, save_strategy="epoch")
    actual.train()
    folder = tmp_path / "checkpoint-10"
    again = bkf.Posterior.from_pretrained(folder, classifier())
    assert again.weights == actual.posterior.weights
    for one, other in zip(again.members, actual.posterior.members, strict=True):
        assert same(one.state, other.state)
    assert "the best of 2 members of a mixture" in (folder / "README.md").read_text()
    plain = PeftModel.from_pretrained(classifier(lora=False), str(folder)).eval()
    inputs = split_batch(default_data_collator(sentences(5)))[0]
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).logits, actual.model.eval()(**inputs).logits)
    actual.save_model(str(tmp_path / "end"))
    actual.save_model(str(tmp_path / "end"))  # again: the files are ours
    (tmp_path / "end" / "member_1" / "kalman_state.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"member_1/kalman_state\.safetensors as it was saved"):
        bkf.Posterior.from_pretrained(tmp_path / "end", classifier())


def test_a_checkpoint_of_other_settings_raises(tmp_path):
    actual = trainer(tmp_path, save_strategy="epoch")
    actual.train()
    folder = str(tmp_path / "checkpoint-10")
    with pytest.raises(ValueError, match=r"`kalman` must be the settings of the members in .*, got members of other"):
        trainer(tmp_path, CONFIGS[:1]).train(resume_from_checkpoint=folder)
    with pytest.raises(ValueError, match=r"`kalman` must be a list of the settings of the members in .*mixture, got"):
        trainer(tmp_path, CONFIGS[0]).train(resume_from_checkpoint=folder)
    single = trainer(tmp_path / "single", CONFIGS[0], save_strategy="epoch")
    single.train()
    with pytest.raises(ValueError, match=r"`kalman` must be the settings of the members in .*, got a single posterior"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "single" / "checkpoint-10"))


def test_bad_settings_are_refused_before_training(tmp_path):
    for configs, message in [
        ([], "`kalman` must hold at least one KalmanConfig, got none"),
        ([CONFIGS[0], 3], "`kalman` must be a KalmanConfig"),
        ([CONFIGS[0], bkf.KalmanConfig(temperature=1.0)], "`kalman` must have `temperature` 'prequential', got 1.0"),
        ([CONFIGS[0], bkf.KalmanConfig(seed=1)], "`kalman` must have the same `seed`, got 0, 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, configs)
    with pytest.raises(ValueError, match="`posterior` needs a trainer that has trained"):
        _ = trainer(tmp_path).posterior
