"""``bayes-kf fit --online``: lines learned as they come, through kills, restarts, bad lines and drift."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from cli_inputs import bert_config, own, run, write_bert
from transformers import BertModel

import bayes_kf as bkf
from bayes_kf.cli.stream_files import Stream
from bayes_kf.evaluation import DriftDetector
from bayes_kf.models.zoo import quiet_transformers

WORDS = {"pos": ("good", "fine"), "neg": ("bad", "awful")}


def review(index):
    label = ("pos", "neg")[(index * index // 7) % 2]
    return {"text": f"a {WORDS[label][index % 2]} film", "label": label}


def lines(number, change=None):
    """JSON lines; from ``change`` on, labels are the other way round."""
    rows = [review(index) for index in range(number)]
    for row in rows[change if change is not None else number :]:
        row["label"] = "neg" if row["label"] == "pos" else "pos"
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("online") / "bert"
    with quiet_transformers():
        write_bert(folder)
        torch.manual_seed(0)
        BertModel(bert_config(initializer_range=0.3)).save_pretrained(folder)  # whose first token sees the others
    return folder


def words(model, output, *more, data="-"):
    plain = ["fit", "--online", "--model", model, "--data", data, "--classes", "neg", "pos", "--output", output]
    return [*plain, "--rank", 2, "--covariance", "diagonal", "--quiet", *more]


def fed(text, monkeypatch, model, output, *more):
    """Run with ``text`` on standard input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))
    return run(*words(model, output, *more))


def tensors(folder):
    from safetensors.torch import load_file

    return load_file(folder / "kalman_state.safetensors")


def equal(first, second):
    one, two = tensors(first), tensors(second)
    same = {name: torch.equal(tensor, two[name]) for name, tensor in one.items()}
    return set(one) == set(two) and all(same.values())


def stream(folder):
    return Stream(**json.loads((folder / "stream.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """What was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "lines.jsonl").write_text(lines(70), encoding="utf-8")
    assert run(*words(model, folder / "out", data=folder / "lines.jsonl")) == 0
    return folder / "out"


def test_lines_are_learned_one_by_one(model, whole):
    """As the filter does by hand, the prior's scale measured on the first 32."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [review(index) for index in range(70)]

    def tokens(texts):
        return dict(tokenizer(texts, padding=True, return_tensors="pt"))

    posterior = opened(model, whole)
    fresh = opened(model, whole).adapter
    fresh.assign(posterior.state.prior.mean)
    kf = bkf.KalmanFilter(fresh.model, posterior.config)
    state = kf.init(tokens([row["text"] for row in rows[:32]]))
    right = 0
    for row in rows:
        state, info = kf.update(state, tokens([row["text"]]), torch.tensor([int(row["label"] == "pos")]))
        right += int(info.correct.sum())
    torch.testing.assert_close(state.belief.mean, posterior.state.belief.mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(state.belief.variance, posterior.state.belief.variance, rtol=1e-6, atol=1e-9)
    saved = stream(whole)
    assert (saved.lines, saved.examples, saved.correct, saved.bad) == (70, 70, right, 0)
    assert 0 < saved.log_loss < 70


def opened(model, folder):
    from bayes_kf.cli.base_model import load_base, restore_head
    from bayes_kf.cli.posterior_folder import read_new_head

    with quiet_transformers():
        base = load_base(model, "text", 2, 0)
    restore_head(base, read_new_head(folder), folder)
    return bkf.Posterior.from_pretrained(folder, base.model)


@pytest.mark.parametrize("every", [1, 7, 1000])
def test_a_pipe_a_file_and_any_number_of_checkpoints_are_the_same(model, whole, tmp_path, monkeypatch, every):
    assert fed(lines(70), monkeypatch, model, tmp_path / "out", "--checkpoint-every", every) == 0
    assert equal(tmp_path / "out", whole)
    assert stream(tmp_path / "out") == stream(whole)


@pytest.mark.parametrize("stops", [(40,), (3, 50, 51), (70,)], ids=str)
def test_fed_again_from_the_beginning_it_skips_what_it_knows(model, whole, tmp_path, monkeypatch, stops):
    """Its input ended, and started again with more; a first part too short to measure the prior's scale on included."""
    ends = [*stops, 70]
    for end in ends:
        assert fed(lines(end), monkeypatch, model, tmp_path / "out") == 0
    assert stream(tmp_path / "out").examples == 70
    if stops[0] >= 32:
        assert equal(tmp_path / "out", whole)


@pytest.mark.slow
def test_killed_at_random_and_started_again(model, whole, tmp_path):
    """SIGKILL, twice, while it reads from a pipe: nothing lost, nothing twice, the same bits."""
    (tmp_path / "lines.jsonl").write_text(lines(70), encoding="utf-8")
    command = [sys.executable, "-m", "bayes_kf", *map(str, words(model, tmp_path / "out", "--checkpoint-every", 2))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    text, seen = lines(70).splitlines(keepends=True), []
    for kill_at in (36, 60):
        with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, text=True) as process:
            assert process.stdin is not None
            process.stdin.write("".join(text[:kill_at]))
            process.stdin.flush()
            for _ in range(600):
                if (tmp_path / "out" / "stream.json").is_file() and stream(tmp_path / "out").lines >= kill_at - 1:
                    break
                time.sleep(0.1)
            process.send_signal(signal.SIGKILL)
            process.wait()
        seen.append(stream(tmp_path / "out").lines)
    assert seen == [36, 60]
    completed = subprocess.run(command, input=lines(70), env=environment, text=True, check=False, capture_output=True)
    assert (completed.returncode, own(completed.stderr)) == (0, "")
    assert equal(tmp_path / "out", whole)
    assert stream(tmp_path / "out") == stream(whole)


def test_asked_to_end_it_saves(model, tmp_path):
    command = [sys.executable, "-m", "bayes_kf", *map(str, words(model, tmp_path / "out"))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    ) as process:
        assert process.stdin is not None
        process.stdin.write(lines(40))
        process.stdin.flush()
        for _ in range(600):
            with open(f"/proc/{process.pid}/wchan", encoding="utf-8") as file:
                waiting = "pipe" in file.read()
            if waiting:
                break
            time.sleep(0.1)
        time.sleep(1.0)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate()
    assert (process.returncode, own(error)) == (130, "bayes-kf: interrupted")
    assert stream(tmp_path / "out").lines == 40


def test_ended_between_an_update_and_its_count(model, whole, tmp_path, monkeypatch):
    """Neither half a line nor a line twice: what is saved ends with the line before, and going on gives the same."""
    update, calls = DriftDetector.update, []

    def ending(self, prob, num_classes):
        calls.append(prob)
        if len(calls) == 50:
            raise KeyboardInterrupt
        return update(self, prob, num_classes)

    with monkeypatch.context() as patched:
        patched.setattr(DriftDetector, "update", ending)
        assert fed(lines(70), monkeypatch, model, tmp_path / "out") == 130
    assert stream(tmp_path / "out").lines == 49
    assert fed(lines(70), monkeypatch, model, tmp_path / "out") == 0
    assert equal(tmp_path / "out", whole)
    assert stream(tmp_path / "out") == stream(whole)


@pytest.mark.parametrize(("more", "option"), [(("--classes", "a", "b"), "--classes"), (("--skip-bad",), "--skip-bad")])
def test_options_of_a_stream_without_one(model, tmp_path, capsys, more, option):
    """Left out they would be ignored without a word."""
    (tmp_path / "lines.jsonl").write_text(lines(4), encoding="utf-8")
    plain = ("fit", "--model", model, "--data", tmp_path / "lines.jsonl", "--output", tmp_path / "out")
    assert run(*plain, *more) == 2
    assert f"`{option}` needs `--online`, got none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_drift_is_told(model, tmp_path, monkeypatch, capsys):
    """Where the labels turn round; the number of lines between false alarms is the user's."""
    assert fed(lines(240, change=160), monkeypatch, model, tmp_path / "out", "--alarm", 500) == 0
    saved = stream(tmp_path / "out")
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("drift alarm at line ")]
    assert [int(line.split()[4].rstrip(":")) for line in printed] == saved.alarms
    assert 160 < saved.alarms[0] <= 200
    assert saved.run_length == 500.0
    assert DriftDetector(500.0, saved.detector).statistic > 0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "must hold one JSON object per line, got .* in line 36"),
        ("[1, 2]", "`--text-column` must be in every line, got none called 'text' in line 36"),
        ('{"text": "a film"}', "`--label-column` must be in every line, got none called 'label' in line 36"),
        ('{"text": 3, "label": "pos"}', "must hold text and a label, got 3 and 'pos' in line 36"),
        (
            '{"text": "so", "label": "meh"}',
            "`--classes` must hold every label, got 'meh' in line 36; they are neg, pos",
        ),
    ],
)
def test_a_bad_line(model, tmp_path, monkeypatch, capsys, bad, message):
    """The lines before it are learned and saved; with --skip-bad the lines after it are, too."""
    rows = lines(40).splitlines(keepends=True)
    text = "".join([*rows[:35], bad + "\n", "\n", *rows[35:]])
    assert fed(text, monkeypatch, model, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    import re

    assert re.search(message, error), error
    assert "The lines before it are saved" in error
    assert (stream(tmp_path / "out").lines, stream(tmp_path / "out").examples) == (35, 35)
    assert fed(text, monkeypatch, model, tmp_path / "out", "--skip-bad") == 0
    saved = stream(tmp_path / "out")
    assert (saved.lines, saved.examples, saved.bad) == (42, 40, 1)
    assert re.search(message, capsys.readouterr().err)
    assert fed(lines(40), monkeypatch, model, tmp_path / "plain") == 0
    assert equal(tmp_path / "out", tmp_path / "plain")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--checkpoint-every", 0), "`--checkpoint-every` must be at least 1, got 0"),
        (("--alarm", 1), "`--alarm` must be greater than 1, got 1.0"),
        (("--batch-size", 2), "`--online` learns one example at a time from the prior, got --batch-size 2"),
        (("--config", "dataset"), "`--online` learns in one pass, with `mean_passes` 0, got 3"),
        (("--start", "trained"), "`--online` learns one example at a time from the prior, got .*--start trained"),
        (("--classes", "pos"), "`--classes` must name at least two different classes, got"),
        (("--classes", "pos", "pos"), "`--classes` must name at least two different classes, got"),
        (("--data", "reviews.csv"), r"`--data` must be a \.jsonl file or - with --online, got reviews\.csv"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(model, tmp_path, monkeypatch, capsys, more, message):
    import re

    assert fed(lines(3), monkeypatch, model, tmp_path / "out", *more) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_other_streams_are_not_gone_on_with(model, whole, tmp_path, monkeypatch, capsys):
    import shutil

    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert fed(lines(80), monkeypatch, model, folder, "--beta", 0.5, "--seed", 3) == 2
    assert "`--output` must hold a stream of the same settings, got another beta, seed" in capsys.readouterr().err
    assert fed(lines(80), monkeypatch, model, folder, "--classes", "pos", "neg") == 2
    assert "`--classes` must be those of" in capsys.readouterr().err
    assert fed(lines(80), monkeypatch, model, folder, "--alarm", 77) == 2
    assert "`--alarm` must be that of" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    damaged = (
        "{}]",
        "[]",
        '{"lines": "70"}',
        '{"lines": -1}',
        '{"detector": "abc"}',
        '{"log_loss": null}',
        '{"new": 1}',
    )
    for text in damaged:
        (folder / "stream.json").write_text(text, encoding="utf-8")
        assert fed(lines(80), monkeypatch, model, folder) == 2
        assert "`--output` must hold a sound stream.json" in capsys.readouterr().err
    (folder / "stream.json").unlink()
    assert fed(lines(80), monkeypatch, model, folder) == 2
    assert "`--output` must be new or hold a stream, got a posterior without stream.json" in capsys.readouterr().err


def test_what_was_learned_is_evaluated_like_any_posterior(model, whole, tmp_path, capsys):
    (tmp_path / "heldout.csv").write_text(
        "text,label\n" + "\n".join(f"{row['text']},{row['label']}" for row in map(review, range(30))), encoding="utf-8"
    )
    data, page = tmp_path / "heldout.csv", tmp_path / "report.html"
    assert run("evaluate", whole, "--model", model, "--data", data, "--output", page, "--quiet") == 0
    assert page.stat().st_size > 50_000
    capsys.readouterr()


def test_settings_that_the_first_lines_choose(model, tmp_path, monkeypatch):
    """The choice is that of ``fit``; the stream is one of the chosen setting from its first line on, also resumed."""
    from transformers import AutoTokenizer

    tune = ("--config", "stream", "--tune-examples", 40)
    assert fed(lines(70), monkeypatch, model, tmp_path / "whole", *tune) == 0
    chosen = opened(model, tmp_path / "whole").config
    assert chosen.tune is None

    settings = bkf.KalmanConfig.stream(tune_examples=40, covariance="diagonal")
    tokenizer, rows = AutoTokenizer.from_pretrained(model), [review(index) for index in range(70)]
    batches = [
        (dict(tokenizer([row["text"]], return_tensors="pt")), torch.tensor([int(row["label"] == "pos")]))
        for row in rows
    ]
    fresh = opened(model, tmp_path / "whole")
    fresh.adapter.assign(fresh.state.prior.mean)
    assert bkf.fit(fresh.adapter.model, batches, settings, progress=False).config == chosen

    plain = ("--initial-logit-sd", chosen.initial_logit_sd, "--initial-bias-sd", 1.0, "--tune-examples", 40)
    plain = (*plain, "--tune-burn-in", 0.0, "--tune-margin", 1.0)
    assert fed(lines(70), monkeypatch, model, tmp_path / "plain", *plain) == 0
    assert equal(tmp_path / "whole", tmp_path / "plain")
    assert stream(tmp_path / "whole") == stream(tmp_path / "plain")

    assert fed(lines(55), monkeypatch, model, tmp_path / "twice", *tune) == 0
    assert fed(lines(70), monkeypatch, model, tmp_path / "twice", *tune) == 0
    assert equal(tmp_path / "whole", tmp_path / "twice")


def test_tuned_settings_of_another_stream(model, tmp_path, monkeypatch, capsys):
    assert fed(lines(40), monkeypatch, model, tmp_path / "out", "--config", "stream", "--tune-examples", 40) == 0
    other = ("--config", "stream", "--tune-examples", 40, "--forgetting", 0.9)
    assert fed(lines(41), monkeypatch, model, tmp_path / "out", *other) == 2
    assert "`--output` must hold a stream of the same settings, got another forgetting." in capsys.readouterr().err
    assert fed(lines(40), monkeypatch, model, tmp_path / "new", "--passes", 2) == 2
    assert "`--online` learns in one pass, with `passes` 1, got 2." in capsys.readouterr().err
