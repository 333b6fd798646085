"""The command line on real files: arrays, image folders and text, with the bundled model and one made here."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_inputs import REVIEWS, run, write_inputs
from safetensors.torch import load_file

from bayes_kf import KalmanConfig, Posterior, fit
from bayes_kf.cli import commands, main
from bayes_kf.cli.base_model import load_base, restore_head
from bayes_kf.cli.inputs import open_data
from bayes_kf.cli.lora_adapters import add_adapter
from bayes_kf.cli.parser import EXAMPLES, build_parser
from bayes_kf.cli.posterior_folder import read_labels, read_new_head
from bayes_kf.evaluation import evaluate_predictions
from bayes_kf.inference.fitting.fit import fit_default
from bayes_kf.models.zoo import quiet_transformers
from tutorials.digits_demo import Size, run_demo


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def test_fit_and_evaluate_arrays(folder, tmp_path, capsys):
    posterior, page = tmp_path / "posterior", tmp_path / "pages" / "report.html"
    fit = ["fit", "--model", "digits-vit", "--data", folder / "digits.npz", "--rank", 2, "--output", posterior]
    assert main(list(map(str, fit))) == 0
    printed = capsys.readouterr()
    assert "24 examples, 2,698 trainable parameters" in printed.out
    assert "classes: 0, 1, 2" in printed.out
    assert "24/24" not in printed.err  # no bar where standard error is no terminal
    assert {p.name for p in posterior.iterdir()} >= {"labels.json", "history.npz", "adapter_model.safetensors"}
    assert not (posterior / "new_head.safetensors").exists()
    assert len(np.load(posterior / "history.npz")["log_loss"]) == 21  # of the first member, which holds 3 out

    evaluate = ["evaluate", posterior, "--model", "digits-vit", "--data", folder / "heldout.npz", "--output", page]
    assert main([*map(str, evaluate), "--ood", f"strange={folder / 'strange.npz'}", "--method", "probit"]) == 0
    printed = capsys.readouterr()
    assert "50 targets" in printed.out
    assert str(page) in printed.out
    report = json.loads(page.with_suffix(".json").read_text())
    assert report["config"]["method"] == "probit"
    assert 0 <= report["scores"]["ood_strange_auroc"] <= 1
    assert sorted(p.name for p in page.parent.iterdir()) == ["report.html", "report.json", "report.png"]


@pytest.mark.parametrize("start", ["prior", "trained"])
def test_without_settings_it_is_the_librarys_fit(folder, tmp_path, start):
    """To the bit, with the same settings chosen; a seed alone is no setting."""
    words = ["fit", "--model", "digits-vit", "--data", str(folder / "digits.npz"), "--rank", "1", "--batch-size", "2",
             "--seed", "3", "--in-order", "--start", start, "--output", str(tmp_path / "p"), "--quiet"]  # fmt: skip
    assert main(words) == 0
    args = build_parser().parse_args(words)
    model_folder = commands.model_folder("digits-vit")
    model = add_adapter(load_base(model_folder, "image", 10, 3), args, 3)
    loader = open_data(args, args.data, model_folder, KalmanConfig(), None, seed=3).loader
    commands.check_takes(model, loader, args.data)  # the loader shuffles with a generator of its own, and this draws
    expected = fit_default(model, loader, start, False, seed=3)
    loaded = Posterior.from_pretrained(tmp_path / "p", add_adapter(load_base(model_folder, "image", 10, 3), args, 3))
    assert type(loaded) is type(expected)
    assert loaded.config == expected.config
    assert all(torch.equal(loaded.mean[name], mean) for name, mean in expected.mean.items())
    assert all(torch.equal(loaded.variance[name], variance) for name, variance in expected.variance.items())
    plain = fit(model, loader, start=start, progress=False)  # the library's, whose seed is 0
    assert set(plain.config.differences(loaded.config)) <= {"seed", "softmax_temperature"}
    assert loaded.config.mean_passes == (0 if start == "trained" else plain.config.mean_passes)


def test_without_settings_a_folder_holds_a_mixture(folder, tmp_path, capsys):
    common = ("--model", "digits-vit", "--data", folder / "heldout.npz")
    fit = [*map(str, ("fit", *common, "--rank", 1, "--output", tmp_path / "p"))]
    assert main(fit) == 0
    told = capsys.readouterr().out
    assert re.search(r"mixture of 2 members, sharpness [\d.]+ \(90 % interval [\d.]+ to [\d.]+\)", told)
    assert re.search(r"member 2: weight 0\.50, size [\d.]+ \(90 % interval [\d.]+ to [\d.]+\)", told)
    assert "50 examples" in told
    listed = {line.split("  ")[1] for line in (tmp_path / "p" / "SHA256SUMS").read_text().splitlines()}
    assert listed >= {"mixture.json", "labels.json", "history.npz", "member_1/kalman_state.safetensors"}
    model = load_base(commands.model_folder("digits-vit"), "image", 10, 0).model
    posterior = Posterior.from_pretrained(tmp_path / "p", model)
    with np.load(folder / "heldout.npz") as data:
        probs = posterior.predict_loader([(torch.tensor(data["x"]), torch.tensor(data["y"]))], method="probit").probs
    options = (*common, "--method", "probit", "--output", tmp_path / "r.html")
    assert run("evaluate", tmp_path / "p", *options) == 0
    scores = json.loads((tmp_path / "r.json").read_text())["scores"]
    assert scores["confidence"] == pytest.approx(probs.max(1).values.mean().item(), abs=1e-6)  # float32
    assert run("compare", f"a={tmp_path / 'p'}", f"b={tmp_path / 'p'}", *options) == 0
    assert json.loads((tmp_path / "r.json").read_text())["scores"]["a/nll"] == pytest.approx(scores["nll"], abs=1e-6)
    assert main([*fit, "--covariance", "diagonal"]) == 0  # a single posterior in its place
    assert not (tmp_path / "p" / "mixture.json").exists()
    assert not (tmp_path / "p" / "member_1").exists()


def test_members_asks_for_a_larger_mixture(folder, tmp_path, capsys):
    fit = [
        *map(
            str,
            ("fit", "--model", "digits-vit", "--data", folder / "heldout.npz", "--rank", 1, "--output", tmp_path / "p"),
        )
    ]
    assert main([*fit, "--members", "3"]) == 0
    assert "mixture of 3 members" in capsys.readouterr().out
    assert (tmp_path / "p" / "member_2" / "kalman_state.safetensors").exists()
    for other in (["--covariance", "diagonal"], ["--start", "trained"], ["--online"]):
        assert main([*fit, "--members", "3", *other]) == 2
        assert "`--members` needs a fit without settings and `--online`, and `--start` prior" in capsys.readouterr().err
    assert main([*fit, "--members", "0"]) == 2
    assert "`--members` must be a whole number >= 1, got 0" in capsys.readouterr().err


def test_evaluate_says_what_the_library_says(folder, tmp_path):
    run("fit", "--model", "digits-vit", "--data", folder / "digits.npz", "--batch-size", 8, "--output", tmp_path / "p")
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


def test_image_folder_keeps_the_models_classes(folder, tmp_path, capsys):
    fit = ("fit", "--model", "digits-vit", "--data", folder / "images", "--batch-size", 4, "--output", tmp_path / "p")
    assert main([*map(str, fit), "--covariance", "diagonal_information", "--no-damping"]) == 0
    told = capsys.readouterr().out
    assert "an example before its update" in told
    assert "mixture" not in told
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
    assert "new modules, which the model lacks at this size: classifier" in capsys.readouterr().out
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
    assert posterior.best.state.examples == len(REVIEWS)


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


def test_trained_adapter_keeps_its_mean(folder, tmp_path, capsys):
    common = ["fit", "--model", "digits-vit", "--data", str(folder / "digits.npz"), "--batch-size", "8"]
    assert main([*common, "--rank", "1", "--output", str(tmp_path / "first")]) == 0
    assert "member 1: weight" in capsys.readouterr().out
    further = ["--start", "trained", "--adapter", str(tmp_path / "first"), "--output", str(tmp_path / "second")]
    assert main([*common, *further]) == 0
    told = capsys.readouterr().out
    assert "training log loss" in told
    assert "(training examples of the adapter)" in told
    assert "before its update" not in told
    assert "innovation" not in told
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_numbers_are_regressed_on(folder, tmp_path):
    (tmp_path / "marks.csv").write_text("text,label\ngood,1.5\nbad,-2\nso fine,1\nawful,-3\n", encoding="utf-8")
    common = ("--model", folder / "bert", "--data", tmp_path / "marks.csv")
    assert run("fit", *common, "--likelihood", "gaussian", "--noise-variance", 0.5, "--output", tmp_path / "p") == 0
    assert read_labels(tmp_path / "p") == ((), 1)
    assert run("evaluate", tmp_path / "p", *common, "--output", tmp_path / "r.html") == 0
    assert "rmse" in json.loads((tmp_path / "r.json").read_text())["scores"]
    assert run("fit", *common, "--likelihood", "heteroscedastic_gaussian", "--output", tmp_path / "h") == 0
    assert read_labels(tmp_path / "h") == ((), 2)  # a mean and a log variance
    assert run("evaluate", tmp_path / "h", *common, "--output", tmp_path / "h.html") == 0
    assert "rmse" in json.loads((tmp_path / "h.json").read_text())["scores"]


def test_float_targets_of_an_array_are_regressed_on_without_settings(folder, tmp_path):
    with np.load(folder / "digits.npz") as data:
        np.savez(tmp_path / "n.npz", x=data["x"], y=np.linspace(-1, 1, len(data["x"]), dtype=np.float32))
    common = ("fit", "--model", "digits-vit", "--data", tmp_path / "n.npz", "--rank", 1, "--batch-size", 8)
    assert run(*common, "--output", tmp_path / "p") == 0
    assert read_labels(tmp_path / "p") == ((), 1)
    settings = KalmanConfig.from_pretrained(tmp_path / "p")
    assert (settings.likelihood, settings.noise_variance) == ("gaussian", "estimated")
    assert run(*common, "--covariance", "diagonal", "--output", tmp_path / "q") != 0  # settings name the likelihood


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
    run(*common, "--config", "dataset", "--mean-passes", "1", "--output", tmp_path / "r")
    assert KalmanConfig.from_pretrained(tmp_path / "r") == KalmanConfig.dataset(mean_passes=1)
    run(*common, "--config", tmp_path / "q", "--output", tmp_path / "q")  # a posterior's settings, and it is replaced
    assert KalmanConfig.from_pretrained(tmp_path / "q") == KalmanConfig.loko()


def test_examples_of_the_help_run(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_demo("demo-output", Size(stream=20, heldout=40), progress=False)
    (tmp_path / "bert-folder").symlink_to(folder / "bert")
    for name in ("reviews.csv", "lora.json"):
        (tmp_path / name).symlink_to(folder / name)
    for name in ("predictions.csv", "theirs.csv"):
        (tmp_path / name).write_text("target,cat,dog\ncat,0.9,0.1\ndog,0.4,0.6\ncat,0.7,0.3\n", encoding="utf-8")
    rows = [json.dumps({"text": "so fine", "label": "good"}), json.dumps({"text": "awful", "label": "bad"})]
    (tmp_path / "stream.jsonl").write_text("\n".join(rows), encoding="utf-8")
    np.savez(tmp_path / "ours.npz", probs=[[0.8, 0.2], [0.3, 0.7], [0.6, 0.4]], targets=[0, 1, 0])
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


def save_predictions(path: Path, seed: int, sharpness: float = 1.0) -> Path:
    rng = np.random.default_rng(7)
    logits = 2 * rng.normal(size=(150, 4))
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    targets = np.array([rng.choice(4, p=p) for p in probs])
    noisy = sharpness * (logits + 0.3 * np.random.default_rng(seed).normal(size=logits.shape))
    probs = np.exp(noisy) / np.exp(noisy).sum(1, keepdims=True)
    np.savez(path, probs=probs, targets=targets, class_names=["cat", "dog", "<b>cow</b>", "hen"])
    return path


def test_evaluate_somebodys_predictions(tmp_path):
    save_predictions(tmp_path / "test.npz", 0)
    save_predictions(tmp_path / "calibration.npz", 1)
    np.savez(tmp_path / "far.npz", probs=np.full((30, 4), 0.25))
    assert run("evaluate", tmp_path / "test.npz", "--ood", f"far={tmp_path / 'far.npz'}", "--ordered",
               "--calibration", tmp_path / "calibration.npz", "--recalibrate", "temperature", "--conformal", 0.9,
               "--output", tmp_path / "r.html") == 0  # fmt: skip
    report = json.loads((tmp_path / "r.json").read_text())
    stored = np.load(tmp_path / "test.npz")
    direct = evaluate_predictions(stored["probs"], stored["targets"], ordered=True)
    assert report["scores"]["nll"] == pytest.approx(direct.scores["nll"], abs=1e-12)
    assert report["scores"]["rps"] == pytest.approx(direct.scores["rps"], abs=1e-12)
    assert report["scores"]["ood_far_auroc"] > 0.9
    page = (tmp_path / "r.html").read_text()
    assert "&lt;b&gt;cow&lt;/b&gt;" in page
    assert "calibration.npz" in page


def test_evaluate_predictions_of_real_values(tmp_path):
    (tmp_path / "p.csv").write_text("target,mean,variance\n1,1.1,0.2\n2,1.5,0.3\n0,0.3,0.2\n", encoding="utf-8")
    assert run("evaluate", tmp_path / "p.csv", "--output", tmp_path / "r.html") == 0
    assert json.loads((tmp_path / "r.json").read_text())["scores"]["rmse"] == pytest.approx((0.35 / 3) ** 0.5)


def test_compare_a_posterior_with_somebodys_predictions(folder, tmp_path):
    run("fit", "--model", "digits-vit", "--data", folder / "digits.npz", "--batch-size", 8, "--output", tmp_path / "p")
    heldout = np.load(folder / "heldout.npz")
    np.savez(tmp_path / "uniform.npz", probs=np.full((len(heldout["y"]), 10), 0.1), y=heldout["y"])
    assert run("compare", f"ours={tmp_path / 'p'}", f"uniform={tmp_path / 'uniform.npz'}", "--model", "digits-vit",
               "--data", folder / "heldout.npz", "--method", "mean", "--output", tmp_path / "c.html") == 0  # fmt: skip
    report = json.loads((tmp_path / "c.json").read_text())
    assert report["scores"]["uniform/nll"] == pytest.approx(np.log(10))
    assert report["scores"]["ours/nll"] < 1.5
    assert any(sentence.startswith("Best in negative log-likelihood: ours") for sentence in report["verdict"])


def test_compare_files_alone(tmp_path, capsys):
    paths = [save_predictions(tmp_path / f"{name}.npz", 0, sharpness) for name, sharpness in (("a", 1), ("b", 4))]
    assert main(["compare", *(f"{p.stem}={p}" for p in paths), "--output", str(tmp_path / "c.html")]) == 0
    assert "Best in negative log-likelihood: a" in capsys.readouterr().out


def test_python_dash_m():
    completed = subprocess.run(
        [sys.executable, "-m", "bayes_kf", "--version"], capture_output=True, text=True, check=True
    )
    assert completed.stdout.startswith("bayes-kf ")
