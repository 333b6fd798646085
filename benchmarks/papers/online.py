"""A digit transformer trained on MNIST meets other images: LoRA learns them online, one pass, one example at a time.

Or MiniLM, with a new classifier, meets the sentences of SST-2. Rows: the frozen model, AdamW at five learning rates,
LoKO's setting, this package's default, and the default with a diagonal belief, or with truncated or
sampled curvature. Online scores come before each update, held-out ones after the pass. Calibration errors
have beside them the interval that a calibrated model with these confidences would show. Data is read from
../shared/data or $BAYES_KF_DATA; UCI's digits come with scikit-learn.

    python benchmarks/online.py --data usps --seeds 3                  # everything; a stopped run goes on where it was
    python benchmarks/online.py --data usps --rows default loko        # some rows
    python benchmarks/online.py --data sst2 --limit 1000 --seeds 3     # needs the extra `bench` and the text data
    python benchmarks/online.py --data digits --rows adamw --limit 200 # a short stream, in a file of its own name
    python benchmarks/online.py --data usps --table                    # print what is there
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import itertools
import sys
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm

import bayes_kf as bkf
from bayes_kf.data import uci_digits_split
from bayes_kf.evaluation import accuracy, calibration_test
from bayes_kf.models.zoo import lora_digits_vit
from benchmarks.common.data import kmnist, usps
from benchmarks.common.learners import Pass, Stream, check_finite, draw_classifier, frozen_pass, gradient_pass, logits
from benchmarks.common.result_files import ResultFile
from benchmarks.common.text import minilm, num_sentences, sentences
from benchmarks.papers.online_table import render

RATES = {f"adamw-{text}": float(text) for text in ("1e-4", "3e-4", "1e-3", "3e-3", "1e-2")}
FILTERS = ("loko", "default", "diagonal", "truncated", "sampled")
ROWS = ("frozen", *RATES, *FILTERS)
KMNIST_STREAM = 8_000  # of its 10,000 images; the rest is held out
PROBE = 100  # AdamW steps timed before and after each row, to state its cost in


class Task(NamedTuple):
    """What is learned, what is held out, whether the classes are new to the model, and whether it is text."""

    stream: Stream
    heldout: Stream
    new_classes: bool = False
    text: bool = False


def task(data: str, seed: int, limit: int | None) -> Task:
    """The stream of a seed: order, and for the sets without an official split also the split."""
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
    """LoRA and the classifier trainable; the classifier drawn afresh where the classes are new."""
    if text:
        return minilm(seed, rank, num_labels=2)
    model = lora_digits_vit(rank=rank, seed=seed)
    if new_classes:
        draw_classifier(model, seed)
    return model


def config_of(row: str, seed: int) -> bkf.KalmanConfig | None:
    """Settings of a filter; None for the other rows."""
    if row == "loko":
        return bkf.KalmanConfig.loko(seed=seed)
    if row == "diagonal":
        return bkf.KalmanConfig(covariance=row, seed=seed)
    if row in ("truncated", "sampled"):
        return bkf.KalmanConfig(curvature=row, seed=seed)
    return bkf.KalmanConfig(seed=seed) if row == "default" else None


def distinct_rows() -> list[str]:
    """All rows but a belief that is the default anyway."""
    return [row for row in ROWS if row != "diagonal" or config_of(row, 0) != config_of("default", 0)]


def measure(row: str, seed: int, given: Task, rank: int) -> dict[str, Any]:
    """Run a row on one stream; what the result file keeps of it."""
    model, config = make_model(seed, rank, given.new_classes, given.text), config_of(row, seed)
    before = probe(seed, given, rank)
    if config is not None:
        found, probs, log_prob = learn_filter(model, given, config)
    else:
        found = frozen_pass(model, given.stream) if row == "frozen" else learn_adamw(model, given.stream, RATES[row])
        probs, log_prob = softmax_predictions(model, given.heldout)
    step = (before + probe(seed, given, rank)) / 2
    kept = online_scores(found, step) | heldout_scores(probs, log_prob, given.heldout.labels)
    return kept if config is None else kept | {"config": dataclasses.asdict(config)}


def learn_adamw(model: nn.Module, stream: Stream, rate: float) -> Pass:
    """A pass of AdamW at a constant rate, weight decay as torch sets it (1e-2)."""
    return gradient_pass(model, stream, lambda parameters: torch.optim.AdamW(parameters, lr=rate))


def learn_filter(model: nn.Module, given: Task, config: bkf.KalmanConfig) -> tuple[Pass, Tensor, Tensor]:
    """A pass of ``bayes_kf.fit``, and the posterior's predictions: probabilities (N, C), log p(label) (N,)."""
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
    found = Pass(correct.bool(), log_loss, seconds / max(1, len(correct)))
    if refused is not None:
        found = found._replace(diverged_at=refused.step, cause=refused.cause)
    prediction = posterior.predict_loader(given.heldout.batches(256))
    assert prediction.probs is not None  # a classifier
    assert prediction.log_prob is not None  # with labels
    return found, prediction.probs, prediction.log_prob


@torch.no_grad()
def softmax_predictions(model: nn.Module, heldout: Stream) -> tuple[Tensor, Tensor]:
    """Softmax probabilities (N, C) and log p(label) (N,)."""
    outputs = torch.cat([logits(model, inputs) for inputs, _ in heldout.batches(256)])
    log_probs = outputs.double().log_softmax(1)
    return log_probs.exp(), log_probs.gather(1, heldout.labels[:, None]).squeeze(1)


def probe(seed: int, given: Task, rank: int) -> float:
    """Processor seconds of an AdamW step on this stream, now."""
    model = make_model(seed, rank, given.new_classes, given.text)
    return learn_adamw(model, given.stream.first(PROBE), 1e-4).seconds


def online_scores(found: Pass, adamw_seconds: float) -> dict[str, Any]:
    """Numbers of the pass, up to a divergence, and each example's success as bits."""
    kept: dict[str, Any] = {
        "online_accuracy": found.correct.double().mean().item() if len(found.correct) else None,
        "online_log_loss": found.log_loss.double().mean().item() if len(found.correct) else None,
        "steps": len(found.correct),
        "milliseconds": 1e3 * found.seconds,
        "adamw_milliseconds": 1e3 * adamw_seconds,
        "correct": base64.b64encode(np.packbits(found.correct.numpy()).tobytes()).decode(),
    }
    return kept if found.cause is None else kept | {"diverged_at": found.diverged_at, "cause": found.cause}


def heldout_scores(probs: Tensor, log_prob: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, log loss and calibration error with its interval under perfect calibration."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("usps", "digits", "kmnist", "sst2"), default="usps")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument(
        "--rows", nargs="+", default=ROWS, metavar="ROW", help=f"{', '.join(ROWS)}; or adamw for all five"
    )
    parser.add_argument("--rank", type=int, default=4, help="of LoRA")
    parser.add_argument("--limit", type=int, help="examples in the stream; all by default")
    parser.add_argument("--redo", action="store_true", help="run the rows again that are already there")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table")
    args = parser.parse_args()
    args.rows = [row for name in args.rows for row in (RATES if name == "adamw" else [name])]
    unknown = sorted(set(args.rows) - set(ROWS))
    if unknown:
        parser.error(f"`--rows` must be among {', '.join(ROWS)}, adamw; got {', '.join(unknown)}.")
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    parts = [f"online-{args.data}", f"rank{args.rank}" * (args.rank != 4), f"limit{args.limit}" * bool(args.limit)]
    file = ResultFile("-".join(part for part in parts if part))
    if not args.table:
        file.begin()
        places = list(itertools.product(range(args.seeds), args.rows))
        for seed, row in tqdm(places, unit="row", disable=not sys.stderr.isatty()):
            if args.redo or stale(row, seed, file):
                run(row, seed, file, args)
    title = "MiniLM on SST-2" if args.data == "sst2" else f"MNIST to {args.data}"
    print(file.write_markdown(f"Online adaptation, {title}", render(file.cells, ROWS, args.data)))


def stale(row: str, seed: int, file: ResultFile) -> bool:
    """Whether a row has to be run: it is missing, or of other settings than today's."""
    kept, config = file.cells.get(f"{row}/{seed}"), config_of(row, seed)
    return kept is None or (config is not None and kept["config"] != dataclasses.asdict(config))


def run(row: str, seed: int, file: ResultFile, args: argparse.Namespace) -> None:
    """Measure a row, write it, and say how it went."""
    kept = measure(row, seed, task(args.data, seed, args.limit), args.rank)
    file.put(f"{row}/{seed}", kept)
    tail = f"  diverged at {kept['diverged_at']}: {kept['cause']}" if "cause" in kept else ""
    scores = f"online {kept['online_accuracy']:.4f}  held-out {kept['accuracy']:.4f}  NLL {kept['nll']:.4f}"
    times = f"{kept['milliseconds']:.1f} ms/step, AdamW {kept['adamw_milliseconds']:.1f}"
    tqdm.write(f"{row}/{seed}: {scores}  ECE {kept['ece']:.4f}  {times}{tail}", file=sys.stderr)


if __name__ == "__main__":
    main()
