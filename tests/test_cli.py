"""The command line on real files: arrays, image folders and text, with the bundled model and one made here."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizer

from bayes_kf import KalmanConfig, Posterior
from bayes_kf.cli import commands, main
from bayes_kf.cli.base_model import load_base, restore_head
from bayes_kf.cli.folder import read_labels, read_new_head
from bayes_kf.cli.parser import EXAMPLES
from bayes_kf.cli.quiet import quiet_transformers
from bayes_kf.data import uci_digits, uci_digits_split
from bayes_kf.demo import Size

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "film", "so", "good", "fine", "dull", "bad", "awful"]
REVIEWS = [("a good film", "pos"), ("so fine", "pos"), ("a bad film", "neg"), ("awful", "neg"), ("so dull", "meh")] * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Every kind of input, once."""
    root = tmp_path_factory.mktemp("inputs")
    stream, rest = uci_digits_split(24)
    np.savez(root / "digits.npz", x=stream.images.numpy(), y=stream.labels.numpy())
    np.savez(root / "heldout.npz", x=rest.images[:50].numpy(), y=rest.labels[:50].numpy())
    np.savez(root / "strange.npz", x=rest.images[:20].flip(-1).numpy(), y=np.arange(20))  # labels beyond the model's
    write_images(root / "images", (3, 7))
    with quiet_transformers():
        write_bert(root / "bert")
    (root / "reviews.csv").write_text("text,label\n" + "\n".join(",".join(row) for row in REVIEWS), encoding="utf-8")
    rows = [json.dumps({"sentence": text, "mark": label}) for text, label in REVIEWS]
    (root / "reviews.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (root / "lora.json").write_text(json.dumps({"r": 2, "lora_alpha": 4, "target_modules": ["query", "value"]}))
    return root


def write_images(path: Path, digits: tuple[int, ...]) -> None:
    """Six grey pictures of each digit, in a folder of its name."""
    images, labels = uci_digits()
    for digit in digits:
        (path / str(digit)).mkdir(parents=True)
        for i, image in enumerate(images[labels == digit][:6]):
            pixels = ((image[0] + 1) * 127.5).to(torch.uint8).numpy()
            Image.fromarray(pixels).save(path / str(digit) / f"{i}.png")


def write_bert(path: Path) -> None:
    """An untrained encoder without a head, and a tokenizer of thirteen words."""
    path.mkdir()
    (path / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    BertTokenizer(str(path / "vocab.txt")).save_pretrained(path)
    torch.manual_seed(0)
    BertModel(bert_config()).save_pretrained(path)


def bert_config(**fields) -> BertConfig:
    return BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
        **fields,
    )


def run(*words: object) -> int:
    """The exit status of a quiet command."""
    return main([*map(str, words), "--quiet"])


def test_fit_and_evaluate_arrays(folder, tmp_path, capsys):
    posterior, page = tmp_path / "posterior", tmp_path / "pages" / "report.html"
    fit = ["fit", "--model", "digits-vit", "--data", folder / "digits.npz", "--rank", 2, "--output", posterior]
    assert main(list(map(str, fit))) == 0
    printed = capsys.readouterr()
    assert "24 examples, 2,698 trainable numbers" in printed.out
    assert "classes: 0, 1, 2" in printed.out
    assert "24/24" in printed.err  # the bar
    assert {p.name for p in posterior.iterdir()} >= {"labels.json", "history.npz", "adapter_model.safetensors"}
    assert not (posterior / "new_head.safetensors").exists()
    assert len(np.load(posterior / "history.npz")["log_loss"]) == 24

    evaluate = ["evaluate", posterior, "--model", "digits-vit", "--data", folder / "heldout.npz", "--output", page]
    assert main([*map(str, evaluate), "--ood", f"strange={folder / 'strange.npz'}", "--method", "probit"]) == 0
    printed = capsys.readouterr()
    assert "50 targets" in printed.out
    assert str(page) in printed.out
    found = json.loads(page.with_suffix(".json").read_text())
    assert found["config"]["method"] == "probit"
    assert 0 <= found["scores"]["ood_strange_auroc"] <= 1
    assert sorted(p.name for p in page.parent.iterdir()) == ["report.html", "report.json", "report.png"]


def test_evaluate_says_what_the_library_says(folder, tmp_path):
    run("fit", "--model", "digits-vit", "--data", folder / "digits.npz", "--batch-size", 8, "--output", tmp_path / "p")
    run(
        "evaluate",
        tmp_path / "p",
        "--model",
        "digits-vit",
        "--data",
        folder / "heldout.npz",
        "--output",
        tmp_path / "r.html",
    )
    base = load_base(commands.model_folder("digits-vit"), "image", 10, 0)
    posterior = Posterior.from_pretrained(tmp_path / "p", base.model)
    heldout = np.load(folder / "heldout.npz")
    probs = posterior.predict_loader([(torch.tensor(heldout["x"]), torch.tensor(heldout["y"]))], method="mean").probs
    run("evaluate", tmp_path / "p", "--model", "digits-vit", "--data", folder / "heldout.npz", "--method", "mean",
        "--output", tmp_path / "mean.html")  # fmt: skip
    scores = json.loads((tmp_path / "mean.json").read_text())["scores"]
    assert probs is not None
    assert scores["accuracy"] == (probs.argmax(1).numpy() == heldout["y"]).mean()
    assert scores["confidence"] == pytest.approx(probs.max(1).values.mean().item(), abs=1e-6)  # float32


def test_same_seed_same_posterior(folder, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run("fit", "--model", "digits-vit", "--data", folder / "digits.npz", "--batch-size", 8, "--rank", 1,
            "--seed", seed, "--output", tmp_path / name)  # fmt: skip
    a, b, c = (load_file(tmp_path / name / "kalman_state.safetensors")["belief.mean"] for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_image_folder_keeps_the_models_classes(folder, tmp_path):
    fit = ("fit", "--model", "digits-vit", "--data", folder / "images", "--batch-size", 4, "--output", tmp_path / "p")
    assert run(*fit, "--covariance", "diagonal_information", "--no-damping") == 0
    labels = read_labels(tmp_path / "p")
    assert labels is not None
    assert labels.class_names == tuple("0123456789")
    config = KalmanConfig.from_pretrained(tmp_path / "p")
    assert (config.covariance, config.damping) == ("diagonal_information", False)
    assert run("evaluate", tmp_path / "p", "--model", "digits-vit", "--data", folder / "images",
               "--output", tmp_path / "r.html") == 0  # fmt: skip


@pytest.mark.parametrize("data", ["reviews.csv", "reviews.jsonl"])
def test_text_gets_a_head_of_its_own_size(folder, tmp_path, data, capsys):
    columns = ("--text-column", "sentence", "--label-column", "mark") if data.endswith("jsonl") else ()
    common = ("--model", folder / "bert", "--data", folder / data, *columns)
    assert main([*map(str, ("fit", *common, "--lora", folder / "lora.json", "--output", tmp_path / "p"))]) == 0
    assert "new, as the model had none of this size: classifier" in capsys.readouterr().out
    labels = read_labels(tmp_path / "p")
    assert labels == (("meh", "neg", "pos"), 3)
    assert run("evaluate", tmp_path / "p", *common, "--output", tmp_path / "r.html") == 0
    assert "neg" in (tmp_path / "r.html").read_text()
    head = read_new_head(tmp_path / "p")
    assert {name: tuple(t.shape) for name, t in head.items()} == {"classifier.bias": (3,), "classifier.weight": (3, 32)}
    with quiet_transformers():
        base = load_base(folder / "bert", "text", 3, seed=99)  # another draw, put right by what was saved
    assert not torch.equal(base.model.state_dict()["classifier.weight"], head["classifier.weight"])
    restore_head(base, head, tmp_path / "p")
    posterior = Posterior.from_pretrained(tmp_path / "p", base.model)
    assert posterior.state.examples == len(REVIEWS)


def test_labels_of_a_few_classes_keep_their_place(folder, tmp_path):
    run("fit", "--model", folder / "bert", "--data", folder / "reviews.csv", "--output", tmp_path / "p")
    (tmp_path / "good.csv").write_text("text,label\nso fine,pos\ngood,pos\n", encoding="utf-8")
    run(
        "evaluate",
        tmp_path / "p",
        "--model",
        folder / "bert",
        "--data",
        tmp_path / "good.csv",
        "--output",
        tmp_path / "r.html",
    )
    assert json.loads((tmp_path / "r.json").read_text())["sizes"] == {"examples": 2, "classes": 3}


def test_trained_adapter_keeps_its_mean(folder, tmp_path):
    run("fit", "--model", "digits-vit", "--data", folder / "digits.npz", "--rank", 1, "--batch-size", 8,
        "--output", tmp_path / "first")  # fmt: skip
    run("fit", "--model", "digits-vit", "--data", folder / "digits.npz", "--batch-size", 8, "--start", "trained",
        "--adapter", tmp_path / "first", "--output", tmp_path / "second")  # fmt: skip
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_numbers_are_regressed_on(folder, tmp_path):
    (tmp_path / "marks.csv").write_text("text,label\ngood,1.5\nbad,-2\nso fine,1\nawful,-3\n", encoding="utf-8")
    common = ("--model", folder / "bert", "--data", tmp_path / "marks.csv")
    assert run("fit", *common, "--likelihood", "gaussian", "--noise-variance", 0.5, "--output", tmp_path / "p") == 0
    assert read_labels(tmp_path / "p") == ((), 1)
    assert run("evaluate", tmp_path / "p", *common, "--output", tmp_path / "r.html") == 0
    assert "rmse" in json.loads((tmp_path / "r.json").read_text())["scores"]


def test_yes_or_no(folder, tmp_path):
    (tmp_path / "two.csv").write_text("text,label\ngood,yes\nbad,no\nso fine,yes\nawful,no\n", encoding="utf-8")
    common = ("--model", folder / "bert", "--data", tmp_path / "two.csv")
    assert run("fit", *common, "--likelihood", "bernoulli", "--output", tmp_path / "p") == 0
    assert read_labels(tmp_path / "p") == (("no", "yes"), 1)
    assert run("evaluate", tmp_path / "p", *common, "--output", tmp_path / "r.html") == 0


def test_settings_from_file_and_flags(folder, tmp_path):
    (tmp_path / "kalman.json").write_text('{"noise": "identity", "initial_logit_sd": 1.5, "seed": 5}')
    common = ("fit", "--model", "digits-vit", "--data", folder / "digits.npz", "--batch-size", 12, "--rank", 1)
    run(
        *common,
        "--config",
        tmp_path / "kalman.json",
        "--noise",
        "decaying",
        "--gate-quantile",
        "none",
        "--output",
        tmp_path / "p",
    )
    expected = KalmanConfig(noise="decaying", initial_logit_sd=1.5, seed=5, gate_quantile=None)
    assert KalmanConfig.from_pretrained(tmp_path / "p") == expected
    run(*common, "--config", "loko", "--output", tmp_path / "q")
    assert KalmanConfig.from_pretrained(tmp_path / "q") == KalmanConfig.loko()
    run(*common, "--config", tmp_path / "q", "--output", tmp_path / "q")  # a posterior's settings, and it is replaced
    assert KalmanConfig.from_pretrained(tmp_path / "q") == KalmanConfig.loko()


def test_examples_of_the_help_run(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "QUICK", Size(stream=20, heldout=40))
    (tmp_path / "bert-folder").symlink_to(folder / "bert")
    for name in ("reviews.csv", "lora.json"):
        (tmp_path / name).symlink_to(folder / name)
    for command, examples in EXAMPLES.items():
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        shown = capsys.readouterr().out
        for example in examples:
            assert f"  {example}\n" in shown
            program, *words = shlex.split(example)
            assert (program, main(words)) == ("bayes-kf", 0), example
            if "peft-folder" not in example:
                (tmp_path / "peft-folder").unlink(missing_ok=True)
                (tmp_path / "peft-folder").symlink_to(tmp_path / "reviews")


BAD = {
    "no model there": ("--model nowhere --data digits.npz", "`--model` must be digits-vit or a folder"),
    "no data there": ("--model digits-vit --data nowhere.npz", "`path` must be an existing file or folder"),
    "image model, text": ("--model digits-vit --data reviews.csv", "able to classify text data, got a vit"),
    "text model, images": ("--model bert --data digits.npz", "able to classify image data, got a bert"),
    "bad setting": (
        "--model digits-vit --data digits.npz --beta 2",
        "`beta` must lie strictly between 0 and 1, got 2.",
    ),
    "bad rank": ("--model digits-vit --data digits.npz --rank 0", "`--rank` must be at least 1, got 0."),
    "bad device": ("--model digits-vit --data digits.npz --device toaster", "`--device` must be a torch device"),
    "no such module": ("--model digits-vit --data digits.npz --target-modules nose", "`--rank` must fit the model"),
    "no adapter there": ("--model digits-vit --data digits.npz --adapter images", "with adapter_config.json, got none"),
    "bad LoRA": ("--model bert --data reviews.csv --lora reviews.csv", "`--lora` must be a PEFT config"),
    "bad config": ("--model bert --data reviews.csv --config lora.json", "must hold fields among likelihood,"),
    "numbers, not classes": ("--model digits-vit --data floats.npz", "categorical needs labels, got numbers"),
    "wrong input size": ("--model digits-vit --data small.npz", "`--model` must take the inputs of"),
    "NaN in inputs": ("--model digits-vit --data nan.npz", "must hold finite inputs"),
    "three yes or no": ("--model bert --data reviews.csv --likelihood bernoulli", "bernoulli needs two classes, got 3"),
    "batch of none": ("--model digits-vit --data digits.npz --batch-size 0", "`batch_size` must be at least 1"),
    "two adapters": ("--model bert --data reviews.csv --lora lora.json --target-modules query", "must be left out"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_to_fit(folder, tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(folder)
    np.savez("floats.npz", x=np.zeros((3, 1, 28, 28)), y=np.zeros(3))
    np.savez("small.npz", x=np.zeros((3, 1, 8, 8)), y=np.zeros(3, int))
    np.savez("nan.npz", x=np.full((3, 1, 28, 28), np.nan), y=np.zeros(3, int))
    words, message = BAD[case]
    assert main(["fit", *shlex.split(words), "--output", str(tmp_path / "p"), "--quiet"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("bayes-kf: error: ")
    assert printed.err.count("\n") == 1
    assert message in printed.err
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []


def test_other_folders_are_not_replaced(folder, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert run("fit", "--model", "digits-vit", "--data", folder / "digits.npz", "--output", tmp_path) == 2
    assert "`--output` must be a new folder or a posterior to replace" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").exists()


def test_a_bad_command_line_is_one_line(capsys):
    for words in (["fly"], ["fit"], ["evaluate", "p", "--model", "m", "--data", "d", "--ood", "nameless"]):
        with pytest.raises(SystemExit, match="2"):
            main(words)
        printed = capsys.readouterr().err
        assert printed.startswith("bayes-kf: error: ")
        assert printed.count("\n") == 1


def test_bad_input_to_evaluate(folder, tmp_path, capsys):
    run("fit", "--model", folder / "bert", "--data", folder / "reviews.csv", "--output", tmp_path / "p")
    common = ("evaluate", tmp_path / "p", "--data", folder / "reviews.csv", "--model")
    assert run(*common, folder / "bert", "--output", tmp_path / "r.pdf") == 2
    assert "must end in .html" in capsys.readouterr().err
    with quiet_transformers():
        torch.manual_seed(1)
        BertForSequenceClassification(bert_config(num_labels=3)).save_pretrained(tmp_path / "other")
        BertTokenizer(str(folder / "bert" / "vocab.txt")).save_pretrained(tmp_path / "other")
    assert run(*common, tmp_path / "other", "--output", tmp_path / "r.html") == 2
    assert "got one with other frozen weights" in capsys.readouterr().err
    (tmp_path / "new.csv").write_text("text,label\ngood,superb\n", encoding="utf-8")
    assert (
        run(*common[:2], "--data", tmp_path / "new.csv", "--model", folder / "bert", "--output", tmp_path / "r.html")
        == 2
    )
    assert "'superb'" in capsys.readouterr().err
    (tmp_path / "p" / "labels.json").write_text('{"class_names": 3}')
    assert run(*common, folder / "bert", "--output", tmp_path / "r.html") == 2
    assert "must hold a sound labels.json" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_python_dash_m():
    found = subprocess.run([sys.executable, "-m", "bayes_kf", "--version"], capture_output=True, text=True, check=True)
    assert found.stdout.startswith("bayes-kf ")
