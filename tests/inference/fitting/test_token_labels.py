"""Token classification with transformers and PEFT: fits, saving, KalmanTrainer, and masked language models."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    DataCollatorForTokenClassification,
    TrainingArguments,
)

import bayes_kf as bkf
from bayes_kf.integrations.kalman_trainer import KalmanTrainer
from bayes_kf.models.language import LabelledTokens

WORDS, CLASSES, SPECIAL, PADDING = 20, 3, 1, 0


def config(**more):
    small = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertConfig(vocab_size=WORDS, num_labels=CLASSES, max_position_embeddings=32, **small, **more)


def tagger(peft=None):
    torch.manual_seed(0)
    lora = LoraConfig(task_type="TOKEN_CLS", r=2, target_modules=["query", "value"], modules_to_save=["classifier"])
    return get_peft_model(BertForTokenClassification(config()), peft or lora).eval()


def examples(count, seed=0):
    """Words 2 to 19 between special tokens; the class of a word is its number modulo 3, and some have no label."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        words = torch.randint(2, WORDS, (int(torch.randint(4, 9, (), generator=generator)),), generator=generator)
        labels = torch.where(torch.rand(len(words), generator=generator) < 0.2, -100, words % CLASSES)
        ends, no_label = torch.tensor([SPECIAL]), torch.tensor([-100])
        ids = torch.cat([ends, words, ends])
        labels = torch.cat([no_label, labels, no_label])
        rows.append({"input_ids": ids.tolist(), "attention_mask": [1] * len(ids), "labels": labels.tolist()})
    return rows


class Tokenizer:
    """What the collator of transformers asks of a tokenizer."""

    padding_side, pad_token_id = "right", PADDING

    def pad(self, features, return_tensors=None, **_):
        widest = max(len(one["input_ids"]) for one in features)
        filled = {
            name: [one[name] + [fill] * (widest - len(one[name])) for one in features]
            for name, fill in (("input_ids", PADDING), ("attention_mask", 0))
        }
        return {name: torch.tensor(values) for name, values in filled.items()}


def collator():
    return DataCollatorForTokenClassification(Tokenizer())


def batches(count, seed=0, size=8):
    rows, collate = examples(count * size, seed), collator()
    return [collate([dict(row) for row in rows[n : n + size]]) for n in range(0, len(rows), size)]


def test_a_fit_without_a_config_learns_and_predicts_every_labelled_token(tmp_path):
    model, test = tagger(), batches(6, seed=1)
    posterior = bkf.fit(model, batches(16), progress=False)
    assert isinstance(posterior.adapter, LabelledTokens)
    assert posterior.state.examples == 128
    prediction = posterior.predict_loader(test)
    labels = torch.cat([batch["labels"][batch["labels"] >= 0] for batch in test])
    assert torch.equal(prediction.targets, labels)
    assert float((prediction.probs.argmax(1) == labels).double().mean()) > 0.9
    report = bkf.evaluate(posterior, test, num_simulations=39)
    assert report.scores["accuracy"] == pytest.approx(float((prediction.probs.argmax(1) == labels).double().mean()))
    posterior.save_pretrained(tmp_path)
    torch.manual_seed(0)
    opened = bkf.Posterior.from_pretrained(tmp_path, BertForTokenClassification(config()))
    assert isinstance(opened.adapter, LabelledTokens)
    again = opened.predict_loader(test)
    torch.testing.assert_close(again.probs, prediction.probs)
    more, _ = opened.kf.update(opened.state, *bkf.models.batch.split_batch(test[0]))
    assert more.examples == 136


def test_streams_checkpoints_and_trained_starts_take_token_labels(tmp_path):
    data = batches(6)
    streamed = bkf.fit(tagger(), iter(data), progress=False)
    assert len(streamed.history["log_loss"]) == 48
    posthoc = bkf.fit(tagger(), data, start="trained", progress=False)
    assert posthoc.config.likelihood == "tokens"
    settings = bkf.KalmanConfig(likelihood="tokens", curvature="sampled")
    whole = bkf.fit(tagger(), data, settings, checkpoint=tmp_path, every=2, progress=False)
    assert whole.state.step == 6
    calibrated = streamed.calibrate(batches(3, seed=2))
    assert "size" in calibrated.history


def test_labels_of_a_masked_language_model_are_at_their_own_places():
    torch.manual_seed(0)
    model = BertForMaskedLM(config()).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("cls.predictions.bias"))
    data = batches(4)
    for batch in data:
        hidden = (batch["labels"] >= 0) & (torch.arange(batch["labels"].shape[1]) % 3 == 1)
        batch["labels"] = torch.where(hidden, batch["input_ids"], -100)
        batch["input_ids"] = torch.where(hidden, SPECIAL, batch["input_ids"])
    posterior = bkf.fit(model, iter(data), progress=False)
    first = posterior.predict(data[0], method="mean")
    with torch.no_grad():
        inputs = {name: data[0][name] for name in ("input_ids", "attention_mask")}
        probs = model(**inputs).logits.softmax(-1)[data[0]["labels"] >= 0]
    assert first.probs.shape == probs.shape
    bias = torch.zeros(WORDS)
    bias += posterior.mean["cls.predictions.bias"] - model.cls.predictions.bias
    torch.testing.assert_close(first.probs, (probs.log() + bias).softmax(-1))


def test_sequences_longer_than_the_context_are_refused():
    longer = {"input_ids": torch.full((2, 33), 3), "labels": torch.zeros(2, 33, dtype=torch.long)}
    with pytest.raises(ValueError, match="`input_ids` must fit the context of 32 tokens, got 33"):
        bkf.fit(tagger(), iter([longer]), progress=False)


def test_virtual_tokens_of_a_learned_prompt_have_no_labels():
    prompt = PromptTuningConfig(task_type="TOKEN_CLS", num_virtual_tokens=3, token_dim=24, num_attention_heads=2,
                                num_layers=1, num_transformer_submodules=1)  # fmt: skip
    model, (batch,) = tagger(prompt), batches(1)
    reading = LabelledTokens(model)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = model(**inputs).logits[:, 3:]
    expected = logits[batch["labels"] >= 0]
    torch.testing.assert_close(reading.logits.outputs(reading.vector(), batch), expected)


def test_the_trainer_with_the_collator_of_token_classification(tmp_path):
    metrics = []

    def own(prediction):
        labelled = prediction.label_ids >= 0
        metrics.append(prediction.predictions.shape)
        right = prediction.predictions.argmax(-1)[labelled] == prediction.label_ids[labelled]
        return {"mine": float(right.mean())}

    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, num_train_epochs=2, save_strategy="no",
        per_device_train_batch_size=8,
    )  # fmt: skip
    trainer = KalmanTrainer(
        tagger(), arguments, train_dataset=examples(96), eval_dataset=examples(24, seed=1), data_collator=collator(),
        compute_metrics=own,
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert isinstance(trainer.posterior.adapter, LabelledTokens)
    assert after["eval_mine"] == pytest.approx(after["eval_accuracy"])
    assert after["eval_accuracy"] > before["eval_accuracy"] + 0.2
    rows = examples(24, seed=1)
    collate = collator()
    held = [collate([dict(row) for row in rows[n : n + 8]]) for n in range(0, 24, 8)]
    expected = trainer.posterior.predict_loader(held, generator=torch.Generator().manual_seed(0))
    assert after["eval_log_loss"] == pytest.approx(-float(expected.log_prob.mean()), rel=1e-4)
    assert metrics[0][2] == CLASSES
