"""``bayes-kf fit`` on text to be learned, on a causal language model's folder."""

import io
import json
import sys

import language_models as lm
import pytest
import torch
from cli_inputs import run
from peft import PeftModel
from transformers import AutoModelForCausalLM, BertConfig, BertModel

import bayes_kf as bkf
from bayes_kf.cli import main
from bayes_kf.models.language import SupervisedTokens


def ciphered(count, length=24, shift=7):
    """English with every letter replaced by another, which the model has not seen."""
    text, generator = lm.english(), torch.Generator().manual_seed(0)
    text = torch.where(text > 0, (text - 1 + shift) % (len(lm.LETTERS) - 1) + 1, 1)
    starts = torch.randint(len(text) - length, (count,), generator=generator).tolist()
    return ["".join(lm.LETTERS[letter] for letter in text[s : s + length]) for s in starts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A language model, and text that it has not seen."""
    root = tmp_path_factory.mktemp("language")
    model = lm.base()
    model.generation_config.pad_token_id = 0
    model.save_pretrained(root / "model")
    lm.tokenizer().save_pretrained(root / "model")
    rows = [{"prompt": line[:6], "completion": line[6:]} for line in ciphered(96)]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return root


def words(folder, output, *more):
    return ["fit", "--model", folder / "model", "--data", folder / "rows.jsonl", "--rank", 2, "--target-modules",
            "c_attn", "c_fc", "c_proj", "--batch-size", 4, "--output", output, *more]  # fmt: skip


def opened(folder, output):
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    return bkf.Posterior.from_pretrained(output, base)


def test_completions_are_learned_and_written(folder, tmp_path, capsys):
    assert main(list(map(str, words(folder, tmp_path / "p")))) == 0
    printed = capsys.readouterr().out
    assert "96 texts" in printed
    assert "size " in printed
    posterior = opened(folder, tmp_path / "p")
    assert isinstance(posterior.adapter, SupervisedTokens)
    plain = AutoModelForCausalLM.from_pretrained(folder / "model")
    given = lm.tokenizer()(ciphered(120)[96:], return_tensors="pt")
    untaught = -float(plain(**given, labels=given["input_ids"]).loss.detach())
    spoken = posterior.score(given)
    assert float(spoken.log_prob.sum() / spoken.counted.sum()) > untaught + 1.0
    loaded = PeftModel.from_pretrained(plain, tmp_path / "p")  # an ordinary adapter
    assert torch.isfinite(loaded(**given).logits).all()


def test_a_pipe_is_learned_online_and_resumed(folder, tmp_path, monkeypatch, capsys):
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    online = ["--online", "--data", "-", "--checkpoint-every", 5]

    def feed(some, output):
        stream = io.TextIOWrapper(io.BytesIO("\n".join(some).encode()))
        monkeypatch.setattr(sys, "stdin", stream)
        return run(*words(folder, output, *online))

    assert feed(lines[:12], tmp_path / "whole") == 0
    assert feed([*lines[:8], "no json"], tmp_path / "parts") == 2
    assert "in line 9" in capsys.readouterr().err
    assert feed(lines[:12], tmp_path / "parts") == 0
    whole, parts = (opened(folder, tmp_path / name) for name in ("whole", "parts"))
    assert whole.state.examples == parts.state.examples == 12
    assert torch.equal(whole.mean_vector, parts.mean_vector)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--members", 2], "`--members` needs labels, got text to be learned"),
        (["--likelihood", "gaussian"], "`--likelihood` must be tokens for text to be learned, got gaussian"),
        (["--classes", "a", "b"], "`--classes` needs labels, got text to be learned"),
        (["--max-length", 5], "`--data` must have a token to learn among the first 5 tokens of each row, got none"),
        (["--online", "--skip-bad"], "`--online` with text to be learned takes no `--skip-bad`"),
    ],
)
def test_bad_arguments_are_named(more, message, folder, tmp_path, capsys):
    assert run(*words(folder, tmp_path / "p", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_a_model_that_writes_no_text_is_refused(folder, tmp_path, capsys):
    config = BertConfig(vocab_size=96, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(config).save_pretrained(tmp_path / "bert")
    lm.tokenizer().save_pretrained(tmp_path / "bert")
    more = ["fit", "--model", tmp_path / "bert", "--data", folder / "rows.jsonl", "--output", tmp_path / "p"]
    assert run(*more) == 2
    assert "`--model` must hold all weights of a language model, got none for cls." in capsys.readouterr().err
