"""What the command line says of bad input: one line, status 2, and nothing written."""

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_inputs import bert_config, run, write_inputs
from transformers import BertForSequenceClassification, BertTokenizer

from bayes_kf.cli import commands, main
from bayes_kf.models.zoo import quiet_transformers


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


BAD = {
    "no model there": (
        "--model nowhere --data digits.npz",
        "`--model` must be digits-vit, or a folder or repository with config.json",
    ),
    "no data there": (
        "--model digits-vit --data nowhere.npz",
        "`--data` must be an existing file or folder, got nowhere.npz.",
    ),
    "image model, text": ("--model digits-vit --data reviews.csv", "able to classify text data, got a vit"),
    "text model, images": ("--model bert --data digits.npz", "able to classify image data, got a bert"),
    "bad setting": (
        "--model digits-vit --data digits.npz --beta 2",
        "`beta` must lie strictly between 0 and 1, got 2.",
    ),
    "bad rank": ("--model digits-vit --data digits.npz --rank 0", "`--rank` must be at least 1, got 0."),
    "bad device": ("--model digits-vit --data digits.npz --device toaster", "`--device` must be a torch device"),
    "no such module": (
        "--model digits-vit --data digits.npz --target-modules nose",
        "`--target-modules` must name modules of the model, got 'nose'; its linear layers are",
    ),
    "misspelt module": (
        "--model digits-vit --data digits.npz --target-modules q_proj v_prj",
        "got 'v_prj'; did you mean 'v_proj'?",
    ),
    "misspelt preset": (
        "--model digits-vit --data digits.npz --config steam",
        "`--config` must be a file, a folder, or one of loko, dataset, stream, got 'steam'; did you mean 'stream'?",
    ),
    "other columns": ("--model bert --data reviews.csv --text-column sentence", "`--text-column` must"),
    "no adapter there": ("--model digits-vit --data digits.npz --adapter images", "with adapter_config.json, got none"),
    "bad LoRA": ("--model bert --data reviews.csv --lora reviews.csv", "`--lora` must be a PEFT config"),
    "bad config": (
        "--model bert --data reviews.csv --config lora.json",
        "`--config` must hold settings of KalmanConfig, got 'r' in lora.json; the settings",
    ),
    "numbers, not classes": (
        "--model digits-vit --data floats.npz --covariance diagonal",
        "categorical needs labels, got numbers",
    ),
    "zeros, without a likelihood": (
        "--model digits-vit --data floats.npz",
        "`--likelihood` must say what float targets that are all 0 or 1 mean",
    ),
    "wrong input size": ("--model digits-vit --data small.npz", "`--model` must take the inputs of"),
    "NaN in inputs": ("--model digits-vit --data nan.npz", "must hold finite inputs"),
    "three yes or no": ("--model bert --data reviews.csv --likelihood bernoulli", "bernoulli needs two classes, got 3"),
    "ordered": (
        "--model bert --data reviews.csv --likelihood ordinal",
        "ordinal, which needs an OrdinalHead in Python",
    ),
    "batch of none": ("--model digits-vit --data digits.npz --batch-size 0", "`--batch-size` must be at least 1"),
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


def test_files_in_the_way_are_refused_before_the_work(folder, tmp_path, capsys):
    (tmp_path / "labels.json").write_text("years of work")
    assert run("fit", "--model", "digits-vit", "--data", folder / "digits.npz", "--output", tmp_path) == 2
    message = (
        "`--output` cannot hold the posterior: `folder` must have no other files where this would write, got labels"
    )
    assert message in capsys.readouterr().err
    (tmp_path / "r.json").write_text("mine")
    assert run("evaluate", tmp_path, "--model", "m", "--data", "d", "--output", tmp_path / "r.html") == 2
    assert "`--output` must be a new name or that of an earlier report, got" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels.json", "r.json"]


def test_a_bad_command_line_is_one_line(capsys):
    for words in (["fly"], ["fit"], ["evaluate", "p", "--model", "m", "--data", "d", "--ood", "nameless"]):
        with pytest.raises(SystemExit, match="2"):
            main(words)
        printed = capsys.readouterr().err
        assert printed.startswith("bayes-kf: error: ")
        assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (["fit", "--model", "m", "--data", "d", "--output", "o", "--forgeting", "0.9"], "--forgetting"),
        (["fit", "--model", "m", "--data", "d", "--output", "o", "--covariance", "low-rank"], "low_rank"),
        (["evalute", "p"], "evaluate"),
    ],
)
def test_a_misspelt_word_has_a_suggestion(words, nearest, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert f"; did you mean '{nearest}'? See bayes-kf" in capsys.readouterr().err


def test_what_is_missing_is_named_as_it_was_given(folder, tmp_path, capsys):
    page, digits = ("--output", tmp_path / "r.html"), folder / "digits.npz"
    predictions = tmp_path / "a.csv"
    predictions.write_text("target,cat,dog\ncat,0.9,0.1\ndog,0.4,0.6\n")
    cases = {
        "`POSTERIOR` must hold a readable kalman_config.json": (
            *("evaluate", tmp_path / "none", "--model", "digits-vit", "--data", digits),
        ),
        "`POSTERIOR` must be an existing file of predictions": ("evaluate", tmp_path / "none.csv"),
        "`NAME=PATH` must be an existing file of predictions": ("compare", f"a={predictions}", "b=none.csv"),
        "`--ood` must be an existing file of predictions": ("evaluate", predictions, "--ood", "x=none.csv"),
    }
    for message, words in cases.items():
        assert run(*words, *page) == 2
        assert message in capsys.readouterr().err


def test_bad_input_to_evaluate(folder, tmp_path, capsys):
    run("fit", "--model", folder / "bert", "--data", folder / "reviews.csv", "--output", tmp_path / "p")
    common = ("evaluate", tmp_path / "p", "--data", folder / "reviews.csv", "--model")
    assert run(*common, folder / "bert", "--output", tmp_path / "r.pdf") == 2
    assert "must end in .html" in capsys.readouterr().err
    twice = ("--ood", f"a={folder / 'reviews.csv'}") * 2
    assert run(*common, folder / "bert", *twice, "--output", tmp_path / "r.html") == 2
    assert "`--ood` must give each data set a different name, got a, a." in capsys.readouterr().err
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
    assert "must hold labels.json as it was saved" in capsys.readouterr().err
    (tmp_path / "p" / "SHA256SUMS").unlink()  # as in folders of earlier versions
    assert run(*common, folder / "bert", "--output", tmp_path / "r.html") == 2
    assert "must hold a sound labels.json" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_bad_input_to_evaluate_and_compare_predictions(folder, tmp_path, capsys):
    file, other, real = (tmp_path / name for name in ("a.csv", "b.csv", "real.csv"))
    file.write_text("target,cat,dog\ncat,0.9,0.1\ndog,0.4,0.6\n")
    other.write_text("target,cat,dog\ncat,0.9,0.1\ncat,0.4,0.6\n")
    real.write_text("target,mean,variance\n1,1,1\n")
    page = ("--output", tmp_path / "r.html")
    cases = (
        (
            ("evaluate", file, "--model", "digits-vit"),
            "`--model` must be left out for saved predictions, got digits-vit.",
        ),
        (("evaluate", tmp_path), "`--model` must be given for the posterior"),
        (("evaluate", file, "--recalibrate", "vector"), "`--calibration` must name examples to fit --recalibrate"),
        (("evaluate", file, "--conformal", "0.9"), "`--calibration` must name examples to fit --conformal"),
        (("evaluate", real, "--ood", f"x={file}"), "`--ood` and `--calibration` must be left out"),
        (("evaluate", file, "--ood", f"x={real}"), "`PATH` must hold class probabilities, got real values"),
        (("evaluate", tmp_path / "none.csv"), "`POSTERIOR` must be an existing file of predictions"),
        (("compare", f"a={file}"), "`NAME=PATH` must be given at least twice, with different names, got a."),
        (("compare", f"a={file}", f"a={other}"), "with different names, got a, a."),
        (
            ("compare", f"a={file}", f"b={other}"),
            "must hold the same targets in the same order, got different targets",
        ),
        (("compare", f"a={file}", f"b={real}"), "`PATH` must hold class probabilities, got real values"),
        (("compare", f"a={file}", f"b={tmp_path}"), "`--model` must be given for the posterior"),
    )
    for words, message in cases:
        assert run(*words, *page) == 2, words
        printed = capsys.readouterr().err
        assert message in printed
        assert printed.count("\n") == 1
    assert not (tmp_path / "r.html").exists()


def test_what_goes_wrong_inside_is_one_line(tmp_path, monkeypatch, capsys):
    def fail(args):
        raise RuntimeError("not enough memory:\nyou tried to allocate 1 TB")

    monkeypatch.setitem(commands.COMMANDS, "evaluate", fail)
    assert run("evaluate", tmp_path / "p.csv") == 2
    expected = "bayes-kf: error: RuntimeError: not enough memory: you tried to allocate 1 TB\n"
    assert capsys.readouterr().err == expected
