"""KalmanTrainer on ordinary batches of a language model."""

import language_models as lm
import pytest
import torch
from transformers import DataCollatorForLanguageModeling, TrainingArguments

import bayes_kf as bkf
from bayes_kf.integrations.kalman_trainer import KalmanTrainer
from bayes_kf.models.language import SupervisedTokens
from bayes_kf.models.likelihoods.tokens import COUNT, LOG_PROB


def rows(count, seed=0, length=20):
    text, generator = lm.english(), torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - length, (count,), generator=generator).tolist()
    ids = [torch.where(text[s : s + length] > 0, (text[s : s + length] + 7) % len(lm.LETTERS), 0) for s in starts]
    labels = [torch.cat([torch.tensor([-100]), one[1:]]) for one in ids]  # Trainer would count the first token
    return [
        {"input_ids": one, "attention_mask": torch.ones_like(one), "labels": some}
        for one, some in zip(ids, labels, strict=True)
    ]


def arguments(folder, **options):
    common = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "per_device_train_batch_size": 4}
    return TrainingArguments(str(folder), num_train_epochs=1, **common, **options)


def nats_a_token(posterior, data):
    reading = SupervisedTokens(posterior.adapter.model)
    given = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    outputs = reading.outputs(posterior.mean_vector, given)
    return -float(outputs[:, LOG_PROB].sum() / outputs[:, COUNT].sum())


def test_text_is_learned_evaluated_saved_and_resumed(tmp_path):
    train, test = rows(48), rows(16, seed=1)
    trainer = KalmanTrainer(
        lm.lora(), arguments(tmp_path, save_strategy="steps", save_steps=6), train_dataset=train, eval_dataset=test
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    posterior = trainer.posterior
    assert posterior.config.likelihood == "tokens"
    assert posterior.state.examples == 48
    after = trainer.evaluate()["eval_loss"]
    assert after == pytest.approx(nats_a_token(posterior, test), rel=1e-4)
    assert after < before - 0.3
    resumed = KalmanTrainer(lm.lora(), arguments(tmp_path, save_strategy="no"), train_dataset=train, eval_dataset=test)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert torch.equal(resumed.posterior.mean_vector, posterior.mean_vector)
    trainer.save_model(str(tmp_path / "saved"))
    opened = bkf.Posterior.from_pretrained(tmp_path / "saved", lm.base())
    assert torch.equal(opened.mean_vector, posterior.mean_vector)


def test_the_labels_of_a_collator_are_learned(tmp_path):
    """Labels are copies of the inputs with −100 for padding, made by transformers' own collator."""

    class Tokenizer(lm.Letters):
        pad_token, mask_token = "", None

        def pad(self, examples, **_):
            widest = max(len(one["input_ids"]) for one in examples)
            fill = lambda values, by: torch.nn.functional.pad(values, (0, widest - len(values)), value=by)  # noqa: E731
            return {
                "input_ids": torch.stack([fill(one["input_ids"], self.pad_token_id) for one in examples]),
                "attention_mask": torch.stack([fill(one["attention_mask"], 0) for one in examples]),
            }

    data = [{k: row[k][: 12 + n % 5] for k in ("input_ids", "attention_mask")} for n, row in enumerate(rows(16))]
    collator = DataCollatorForLanguageModeling(Tokenizer(), mlm=False)
    trainer = KalmanTrainer(
        lm.lora(), arguments(tmp_path, save_strategy="no"), train_dataset=data, data_collator=collator,
        held_out_fraction=0.0,
    )  # fmt: skip
    trainer.train()
    assert trainer.posterior.config.likelihood == "tokens"
    assert trainer.posterior.state.examples == 16
