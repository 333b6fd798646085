"""A pre-trained network adapts to another data set online: LoRA, one pass, one example at a time.

A digit transformer trained on MNIST adapts to other images; or MiniLM, with a new classifier, to SST-2's sentences.
Rows: the frozen model, AdamW at five learning rates, LoKO's setting, this package's default, and the default with a
diagonal covariance or with truncated or sampled curvature. Online scores come before each update, held-out scores after
the pass. Beside a calibration error stands the interval of a calibrated model with these confidences. Data is read from
../shared/data or $BAYES_KF_DATA; UCI's digits come with scikit-learn.

The optimizer bench (``benchmarks/bench``) asks another question: there every row tunes on a stream of its own, AdamW's
rate decays, and filters run without ``bayes_kf.fit``. This script measures ``fit`` itself on whole streams, AdamW at
constant rates chosen after the fact.

    python -m benchmarks.papers.online --data usps --seeds 3                  # everything; a stopped run continues
    python -m benchmarks.papers.online --data usps --rows default loko        # some rows
    python -m benchmarks.papers.online --data sst2 --limit 1000 --seeds 3     # needs the extra `bench` and the texts
    python -m benchmarks.papers.online --data digits --rows adamw --limit 200 # a short stream, a file of its own
    python -m benchmarks.papers.online --data usps --table                    # the table from existing results
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import sys
import time
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

import bayes_kf as bkf
from bayes_kf.data import uci_digits_split
from bayes_kf.evaluation import accuracy, calibration_test
from bayes_kf.models.zoo import lora_digits_vit
from benchmarks.common.command import Command, run_cells
from benchmarks.common.data import kmnist, usps
from benchmarks.common.learners import Pass, Stream, check_finite, draw_classifier, frozen_pass, gradient_pass, logits
from benchmarks.common.result_files import ResultFile
from benchmarks.common.text import minilm, num_sentences, sentences
from benchmarks.papers.online_table import render

RATES = {f"adamw-{text}": float(text) for text in ("1e-4", "3e-4", "1e-3", "3e-3", "1e-2")}
FILTERS = ("loko", "default", "diagonal", "truncated", "sampled")
ROWS = ("frozen", *RATES, *FILTERS)
KMNIST_STREAM = 8_000  # of its 10,000 images; the rest is held out
PROBE = 100  # AdamW steps timed before and after each row, the unit of its cost


class Task(NamedTuple):
    """A stream and held-out examples.

    Attributes:
        stream: to learn, in this order.
        heldout: to predict after the pass.
        new_classes: whether the model has not been trained on these classes.
        text: whether the inputs are tokens.
    """

    stream: Stream
    heldout: Stream
    new_classes: bool = False
    text: bool = False


def task(data: str, seed: int, limit: int | None) -> Task:
    """The task of a seed, which sets the order and, for data sets without an official split, the split."""
    generator = torch.Generator().manual_seed(seed)
    if data == "usps":
        train, test = usps("train"), usps("test")
        order = torch.randperm(len(train.labels), generator=generator)[:limit]
        return Task(Stream(train.images[order], train.labels[order]), Stream(*test))
    if data == "digits":
        train, test = uci_digits_split(seed=seed)
        return Task(Stream(train.images[:limit], train.labels[:limit]), Stream(*test))
    if data == "sst2":
        order = torch.randperm(num_sentences("sst2", "train"), generator=generator)[:limit]
        return Task(sentences("sst2", "train", order), sentences("sst2", "dev"), new_classes=True, text=True)
    images, labels = kmnist()
    order = torch.randperm(len(labels), generator=generator)
    first, rest = order[:KMNIST_STREAM][:limit], order[KMNIST_STREAM:]
    return Task(Stream(images[first], labels[first]), Stream(images[rest], labels[rest]), new_classes=True)


def make_model(seed: int, rank: int, new_classes: bool, text: bool = False) -> PeftModel:
    """A model with trainable LoRA and classifier; the classifier is new if the classes are."""
    if text:
        return minilm(seed, rank, num_labels=2)
    model = lora_digits_vit(rank=rank, seed=seed)
    if new_classes:
        draw_classifier(model, seed)
    return model


def config_of(row: str, seed: int) -> bkf.KalmanConfig | None:
    """The settings of a filter; None for the other rows."""
    if row == "loko":
        return bkf.KalmanConfig.loko(seed=seed)
    if row == "diagonal":
        return bkf.KalmanConfig(covariance=row, seed=seed)
    if row in ("truncated", "sampled"):
        return bkf.KalmanConfig(curvature=row, seed=seed)
    return bkf.KalmanConfig(seed=seed) if row == "default" else None


def distinct_rows() -> list[str]:
    """All rows, without the diagonal one if that is the default."""
    return [row for row in ROWS if row != "diagonal" or config_of(row, 0) != config_of("default", 0)]


def measure(row: str, seed: int, given: Task, rank: int) -> dict[str, Any]:
    """The numbers of a row on one stream that the results file keeps."""
    model, config = make_model(seed, rank, given.new_classes, given.text), config_of(row, seed)
    before = probe(seed, given, rank)
    if config is not None:
        result, probs, log_prob = learn_filter(model, given, config)
    else:
        result = frozen_pass(model, given.stream) if row == "frozen" else learn_adamw(model, given.stream, RATES[row])
        probs, log_prob = softmax_predictions(model, given.heldout)
    step = (before + probe(seed, given, rank)) / 2
    numbers = online_scores(result, step) | heldout_scores(probs, log_prob, given.heldout.labels)
    return numbers if config is None else numbers | {"config": dataclasses.asdict(config)}


def learn_adamw(model: nn.Module, stream: Stream, rate: float) -> Pass:
    """A pass of AdamW at a constant rate, with torch's weight decay (1e-2)."""
    return gradient_pass(model, stream, lambda parameters: torch.optim.AdamW(parameters, lr=rate))


def learn_filter(model: nn.Module, given: Task, config: bkf.KalmanConfig) -> tuple[Pass, Tensor, Tensor]:
    """A pass of ``bayes_kf.fit``, and the posterior's predictions: probabilities (N, C) and log p(label) (N,)."""
    posterior: bkf.Posterior | None
    start, refused = time.process_time(), None
    try:
        posterior = bkf.fit(model, given.stream.batches(), config, progress=sys.stderr.isatty())
    except bkf.DivergenceError as error:
        posterior, refused = error.posterior, error
    assert posterior is not None  # fit returns it or puts it into the error
    seconds = time.process_time() - start
    check_finite("state", posterior.state)
    history, nothing = posterior.history, torch.empty(0)
    correct, log_loss = history.get("correct", nothing), history.get("log_loss", nothing)
    check_finite("log_loss", log_loss)
    result = Pass(correct.bool(), log_loss, seconds / max(1, len(correct)))
    if refused is not None:
        result = result._replace(diverged_at=refused.step, cause=refused.cause)
    prediction = posterior.predict_loader(given.heldout.batches(256))
    assert prediction.probs is not None  # a classifier
    assert prediction.log_prob is not None  # with labels
    return result, prediction.probs, prediction.log_prob


@torch.no_grad()
def softmax_predictions(model: nn.Module, heldout: Stream) -> tuple[Tensor, Tensor]:
    """Softmax probabilities (N, C) and log p(label) (N,)."""
    outputs = torch.cat([logits(model, inputs) for inputs, _ in heldout.batches(256)])
    log_probs = outputs.double().log_softmax(1)
    return log_probs.exp(), log_probs.gather(1, heldout.labels[:, None]).squeeze(1)


def probe(seed: int, given: Task, rank: int) -> float:
    """Processor seconds of an AdamW step on this stream, measured now."""
    model = make_model(seed, rank, given.new_classes, given.text)
    return learn_adamw(model, given.stream.first(PROBE), 1e-4).seconds


def online_scores(result: Pass, adamw_seconds: float) -> dict[str, Any]:
    """Numbers of the pass, up to a divergence, and whether each example was predicted correctly, as bits."""
    numbers: dict[str, Any] = {
        "online_accuracy": result.correct.double().mean().item() if len(result.correct) else None,
        "online_log_loss": result.log_loss.double().mean().item() if len(result.correct) else None,
        "steps": len(result.correct),
        "milliseconds": 1e3 * result.seconds,
        "adamw_milliseconds": 1e3 * adamw_seconds,
        "correct": base64.b64encode(np.packbits(result.correct.numpy()).tobytes()).decode(),
    }
    return numbers if result.cause is None else numbers | {"diverged_at": result.diverged_at, "cause": result.cause}


def heldout_scores(probs: Tensor, log_prob: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, log loss, and calibration error with its interval under perfect calibration."""
    check_finite("probs", probs)
    ece = calibration_test(probs, labels, "ece")
    return {
        "accuracy": accuracy(probs, labels),
        "nll": -log_prob.double().mean().item(),
        "ece": ece.value,
        "ece_null_low": ece.null_low,
        "ece_null_high": ece.null_high,
        "confidence": probs.double().max(1).values.mean().item(),
    }


def parse() -> argparse.Namespace:
    """The options."""
    command = Command(__doc__).option("--data", choices=("usps", "digits", "kmnist", "sst2"), default="usps").seeds(3)
    command.names("--rows", (*ROWS, "adamw"), ROWS, "rows to run, adamw for all five rates")
    args = (
        command.option("--rank", type=int, default=4, help="of LoRA")
        .limit("examples in the stream")
        .redo()
        .table()
        .parse()
    )
    args.rows = [row for name in args.rows for row in (RATES if name == "adamw" else [name])]
    return args


def main() -> None:
    """The command line."""
    args = parse()
    parts = [f"online-{args.data}", f"rank{args.rank}" * (args.rank != 4), f"limit{args.limit}" * bool(args.limit)]
    file = ResultFile("-".join(part for part in parts if part))
    if not args.table:
        work = {f"{row}/{seed}": partial(run, row, seed, args) for seed in args.seeds for row in args.rows}
        run_cells(file, work, args.redo, show, is_stale)
    title = "MiniLM on SST-2" if args.data == "sst2" else f"MNIST to {args.data}"
    print(file.write_markdown(f"Online adaptation, {title}", render(file.cells, ROWS, args.data)))


def is_stale(key: str, measured: dict[str, Any]) -> bool:
    """Whether a measured row has other settings than today's."""
    row, _, seed = key.rpartition("/")
    config = config_of(row, int(seed))
    return config is not None and measured["config"] != dataclasses.asdict(config)


def run(row: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """A measured row."""
    return measure(row, seed, task(args.data, seed, args.limit), args.rank)


def show(measured: dict[str, Any]) -> str:
    """A measured row in one line."""
    tail = f"  diverged at {measured['diverged_at']}: {measured['cause']}" if "cause" in measured else ""
    online = "none" if measured["online_accuracy"] is None else format(measured["online_accuracy"], ".4f")
    scores = f"online {online}  held-out {measured['accuracy']:.4f}  NLL {measured['nll']:.4f}"
    times = f"{measured['milliseconds']:.1f} ms/step, AdamW {measured['adamw_milliseconds']:.1f}"
    return f"{scores}  ECE {measured['ece']:.4f}  {times}{tail}"


if __name__ == "__main__":
    main()
