"""Reward models from preferences between English texts: fits, folders, checkpoints and trainers."""

import functools
from types import SimpleNamespace

import language_models as lm
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    TrainingArguments,
)

import bayes_kf as bkf
from bayes_kf.integrations import KalmanTrainer
from bayes_kf.models.language import PreferencePairs

SIZES = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VOWELS = torch.tensor([lm.LETTERS.index(letter) for letter in "aeiou"])


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(lm.LETTERS), **SIZES, pad_token_id=lm.END, num_labels=1, initializer_range=0.2)
    lora = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"])
    return get_peft_model(LlamaForSequenceClassification(config), lora).eval()


def bert():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(lm.LETTERS), **SIZES, num_labels=1, initializer_range=0.2)
    lora = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    return get_peft_model(BertForSequenceClassification(config), lora).eval()


@functools.cache
def examples(size=160, seed=0):
    """TRL's examples: of two pieces of English, the one with more vowels is chosen."""
    generator, text = torch.Generator().manual_seed(seed), lm.english()
    made = []
    while len(made) < size:
        starts = torch.randint(len(text) - 20, (2,), generator=generator).tolist()
        lengths = torch.randint(8, 14, (2,), generator=generator).tolist()
        texts = [text[start : start + length] for start, length in zip(starts, lengths, strict=True)]
        shares = [torch.isin(piece, VOWELS).double().mean().item() for piece in texts]
        if abs(shares[0] - shares[1]) > 0.1:
            better = int(shares[1] > shares[0])
            made.append({"chosen_ids": texts[better].tolist(), "rejected_ids": texts[1 - better].tolist()})
    return made


def collate(some):
    """As TRL's DataCollatorForPreference."""
    rows = [torch.tensor(one[name]) for name in ("chosen_ids", "rejected_ids") for one in some]
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return {
        "input_ids": pad(rows, padding_value=lm.END),
        "attention_mask": pad([torch.ones_like(row) for row in rows]),
    }


def batches(size, step=8, seed=0):
    rows = examples(size, seed)
    return [collate(rows[k : k + step]) for k in range(0, size, step)]


def accuracy(model_or_posterior, held_out):
    """The share of pairs whose chosen text has the larger reward."""
    if isinstance(model_or_posterior, bkf.AdapterModel):
        read = model_or_posterior
        wins = [read.outputs(read.vector(), read.read(batch)) > 0 for batch in held_out]
        return torch.cat(wins).double().mean().item()
    return (model_or_posterior.predict_loader(held_out).probs > 0.5).double().mean().item()


@pytest.mark.parametrize("make", [llama, bert])
def test_the_default_fit_learns_preferences(make):
    """From TRL's batches without labels; held-out accuracy above the start's, and rewards of both texts agree."""
    read, held_out = PreferencePairs(make()), batches(96, 32, seed=1)
    before = accuracy(read, held_out)
    posterior = bkf.fit(read, batches(160), progress=False)
    assert posterior.config.likelihood == "bernoulli"
    assert accuracy(posterior, held_out) > max(before, 0.5) + 0.1
    batch = held_out[0]
    rewards, half = bkf.rewards(posterior, batch), len(batch["input_ids"]) // 2
    assert bool((rewards.sd > 0).all())
    probs = posterior.predict(batch, num_samples=4_000).mean[:, 0].double()
    pairs = rewards.preference_probs()[:half, half:].diagonal()
    torch.testing.assert_close(probs, pairs, rtol=0, atol=0.03)  # Monte Carlo: 4,000 draws, sd below 0.5


def test_a_loader_over_trls_examples_needs_no_reading():
    """Its columns are known; the fit equals that of the reading to the bit."""
    config = bkf.KalmanConfig(likelihood="bernoulli")
    loader = DataLoader(examples(40), batch_size=8, collate_fn=collate)
    one, other = (bkf.fit(model, loader, config, progress=False) for model in (llama(), PreferencePairs(llama())))
    assert type(one.adapter) is PreferencePairs
    assert torch.equal(one.mean_vector, other.mean_vector)
    stream = bkf.fit(PreferencePairs(llama()), iter(batches(40)), config, progress=False)
    assert torch.equal(one.mean_vector, stream.mean_vector)
    margin = [batch | {"margin": torch.zeros(8)} for batch in batches(40)]
    assert torch.equal(bkf.fit(llama(), margin, config, progress=False).mean_vector, one.mean_vector)
    with pytest.raises(
        ValueError, match=r"^`loader` must yield targets with every batch, got none in batch 0; `PreferencePairs\("
    ):
        bkf.fit(llama(), batches(16), config, progress=False)  # could be texts without labels


class Both(torch.nn.Module):
    """A model of one's own that takes both texts, and chooses between two classes."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(len(lm.LETTERS), 2)

    def forward(self, input_ids_chosen, input_ids_rejected, **_):
        return self.table(input_ids_chosen).mean(1) - self.table(input_ids_rejected).mean(1)


def test_a_model_that_takes_both_texts_stays_as_it_is():
    pairs = [PreferencePairs(llama()).read(batch) | {"labels": torch.arange(8) % 2} for batch in batches(16)]
    posterior = bkf.fit(Both(), pairs, bkf.KalmanConfig(), progress=False)
    assert type(posterior.adapter) is bkf.AdapterModel


def test_folders_and_checkpoints(tmp_path):
    """What is loaded predicts as before; a pass that was stopped goes on to the bit."""
    config, data = bkf.KalmanConfig(likelihood="bernoulli"), batches(40)
    whole = bkf.fit(PreferencePairs(llama()), data, config, progress=False)
    whole.save_pretrained(tmp_path / "saved")
    base = llama().unload()
    loaded = bkf.Posterior.from_pretrained(tmp_path / "saved", base)
    texts = bkf.rewards(loaded, data[0])
    assert torch.equal(texts.mean, bkf.rewards(whole, data[0]).mean)
    again = loaded.with_adapter(PreferencePairs(loaded.adapter.model))
    assert torch.equal(again.predict(data[0]).mean, whole.predict(data[0]).mean)

    def stopped():
        yield from data[:3]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        bkf.fit(PreferencePairs(llama()), stopped(), config, checkpoint=tmp_path / "run", every=3, progress=False)
    resumed = bkf.fit(PreferencePairs(llama()), data, config, checkpoint=tmp_path / "run", every=3, progress=False)
    assert torch.equal(resumed.mean_vector, whole.mean_vector)


def test_a_trained_reward_model_gets_a_covariance():
    """As after TRL's training: the mean stays, and held-out pairs choose the size."""
    read, held_out = PreferencePairs(llama()), batches(56, seed=1)
    posterior = bkf.fit(read, batches(40), start="trained", progress=False)
    assert torch.equal(posterior.mean_vector, read.vector())
    assert "size" in posterior.calibrate(held_out).history
    learned = bkf.fit(read, batches(40), start="trained", held_out=held_out, progress=False)
    assert learned.state.examples == 96


def test_soft_and_flipped_labels():
    data = [batch | {"labels": torch.full((8,), 0.5)} for batch in batches(40)]
    undecided = bkf.fit(PreferencePairs(llama()), data, progress=False)
    probs = undecided.predict_loader(data).probs
    assert float((probs - 0.5).abs().mean()) < 0.2
    config = bkf.KalmanConfig(likelihood="bernoulli")
    flipped = [batch | {"labels": torch.zeros(8)} for batch in batches(40)]
    swapped = [{n: torch.cat(v.chunk(2)[::-1]) for n, v in batch.items()} for batch in batches(40)]
    one, other = (bkf.fit(PreferencePairs(llama()), data, config, progress=False) for data in (flipped, swapped))
    torch.testing.assert_close(one.mean_vector, other.mean_vector, rtol=1e-4, atol=1e-5)


def arguments(folder, **more):
    off = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 2}
    return TrainingArguments(folder, per_device_train_batch_size=8, num_train_epochs=1, **off, **more)


def test_kalman_trainer_takes_trls_examples_and_resumes(tmp_path):
    """Columns that are not the model's stay; the evaluation set without labels is held out."""
    data, held_out = examples(48), examples(24, 1)
    made = functools.partial(KalmanTrainer, data_collator=collate, train_dataset=data, eval_dataset=held_out)
    trainer = made(llama(), arguments(tmp_path / "one", save_steps=3))
    trainer.train()
    assert type(trainer.posterior.adapter) is PreferencePairs
    assert (trainer.posterior.config.likelihood, trainer.held_out) == ("bernoulli", "eval_dataset")
    assert trainer.posterior.state.examples == 48
    loss = trainer.evaluate()["eval_loss"]
    assert 0.0 < loss < 5.0
    resumed = made(llama(), arguments(tmp_path / "one", save_steps=3))
    resumed.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-3"))
    assert torch.equal(resumed.posterior.mean_vector, trainer.posterior.mean_vector)
    assert resumed.evaluate()["eval_loss"] == loss


def test_data_sets_with_columns_are_known():
    """As ``datasets.Dataset`` has them; a subset of examples too."""
    from bayes_kf.inference.fitting.reading import has_pair_columns

    assert has_pair_columns(SimpleNamespace(column_names=["chosen_ids", "rejected_ids", "margin"]))
    assert has_pair_columns(torch.utils.data.Subset(examples(40), [0, 1]))
    assert not has_pair_columns([{"input_ids": [1], "labels": 0}])
    assert not has_pair_columns(torch.utils.data.TensorDataset(torch.ones(2)))
    assert not has_pair_columns(None)
