"""Several labels an example, as transformers' multi-label classifiers have them: Bernoulli outputs."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

import bayes_kf as bkf
from bayes_kf.inference.fitting.defaults.default_likelihood import default_likelihood, is_multi_label
from bayes_kf.integrations.kalman_trainer import KalmanTrainer
from bayes_kf.models import AdapterModel

LABELS, WORDS = 3, 24


def classifier(problem_type="multi_label_classification"):
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=WORDS, num_labels=LABELS, problem_type=problem_type, initializer_range=0.2, **small)
    model = BertForSequenceClassification(config).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("classifier", "bert.pooler")))
    return model


def batches(count, seed=0, size=8):
    """The first three words say whether their labels are true: those below 12 are."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(WORDS, (count, size, 6), generator=generator)
    return [
        {"input_ids": one, "attention_mask": torch.ones_like(one), "labels": (one[:, :LABELS] < 12).float()}
        for one in ids
    ]


def test_the_config_of_the_model_decides():
    zeros = [torch.tensor([[0.0, 1.0, 1.0]])]
    assert is_multi_label(classifier())
    assert is_multi_label(AdapterModel(classifier()))
    assert not is_multi_label(classifier(None))
    assert not is_multi_label(torch.nn.Linear(2, 2))
    assert default_likelihood(zeros, classifier()) == {"likelihood": "bernoulli"}
    with pytest.raises(ValueError, match=r"or the model's own config by `problem_type` 'multi_label_classification'"):
        default_likelihood(zeros, classifier(None))


def test_fits_without_a_config_have_bernoulli_outputs(tmp_path):
    data, test = batches(24), batches(6, seed=1)
    for posterior in (
        bkf.fit(classifier(), data, progress=False),
        bkf.fit(classifier(), iter(data), progress=False),
        bkf.fit(classifier(), data, start="trained", progress=False),
        bkf.fit(classifier(), data, checkpoint=tmp_path, progress=False),
    ):
        assert posterior.config.likelihood == "bernoulli"
        assert posterior.predict_loader(test).probs.shape == (48, LABELS)
    soft = [batch | {"labels": 0.9 * batch["labels"]} for batch in data]
    with pytest.raises(ValueError, match="`config` must say by `likelihood` 'gaussian' that targets are numbers if"):
        bkf.fit(classifier(), soft, progress=False)


def test_the_report_is_over_all_labels_and_each_label_has_its_own():
    data, test = batches(16), batches(6, seed=1)
    posterior = bkf.fit(classifier(), iter(data), progress=False)
    prediction = posterior.predict_loader(test)
    report = bkf.evaluate(posterior, test, num_simulations=39)
    right = (prediction.probs > 0.5) == (prediction.targets > 0.5)
    assert report.scores["accuracy"] == pytest.approx(float(right.double().mean()))
    ones = prediction.probs[:, 1]
    single = bkf.evaluation.evaluate_predictions(
        torch.stack([1 - ones, ones], 1), prediction.targets[:, 1].long(), num_simulations=39
    )
    assert single.scores["accuracy"] == pytest.approx(float(right[:, 1].double().mean()))


def test_the_trainer_takes_several_labels(tmp_path):
    rows = [{name: values[k] for name, values in batch.items()} for batch in batches(8) for k in range(8)]
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, num_train_epochs=1, save_strategy="no"
    )
    trainer = KalmanTrainer(classifier(), arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.posterior.config.likelihood == "bernoulli"
    assert trainer.evaluate()["eval_loss"] < LABELS * before  # a sum over the labels, where Trainer has their mean
