"""Time and memory of long streams, large adapters, many classes and many threads.

OMP_NUM_THREADS=1 python -m benchmarks.reliability.load                      # under an hour; results/load.md
OMP_NUM_THREADS=1 python -m benchmarks.reliability.load --only adapter classes threads
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizer

import bayes_kf as bkf
from bayes_kf.cli.stream_files import STREAM_FILE
from benchmarks.common.command import Command
from benchmarks.common.result_files import ResultFile, markdown_table

GOOD, BAD = ("fine", "good", "superb", "warm", "bright"), ("dull", "bad", "awful", "cold", "grey")
FILLING = ("a", "film", "so", "the", "very", "and", "story", "it", "was", "with")


def field(name: str) -> float:
    """A field of this process's memory status, MiB."""
    return int(Path("/proc/self/status").read_text().partition(name + ":")[2].split()[0]) / 1024


def peak(call: Callable[[], Any]) -> float:
    """Peak memory of a call above the memory in use before it, MiB."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = field("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    call()
    return field("VmHWM") - before


def sentence(rng: random.Random) -> dict[str, str]:
    """A sentence with more good words or more bad ones."""
    good = rng.randrange(4)
    words = rng.sample(GOOD, good) + rng.sample(BAD, 3 - good) + rng.sample(FILLING, 5)
    rng.shuffle(words)
    return {"text": " ".join(words), "label": "good" if good >= 2 else "bad"}


def online(examples: int = 100_000, every: int = 5_000) -> dict[str, Any]:
    """``bayes-kf fit --online`` on ``examples`` lines, killed half-way and started again."""
    with TemporaryDirectory() as scratch:
        folder, out = Path(scratch) / "bert", Path(scratch) / "out"
        folder.mkdir()
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *FILLING]
        (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
        BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
        )
        BertModel(config).save_pretrained(folder)
        rng = random.Random(0)  # noqa: S311 (no secrets)
        lines = "".join(json.dumps(sentence(rng)) + "\n" for _ in range(examples))
        (Path(scratch) / "stream.jsonl").write_text(lines, encoding="utf-8")
        command = [sys.executable, "-m", "bayes_kf", "fit", "--online", "--quiet", "--model", folder, "--rank", "4"]
        command += ["--data", Path(scratch) / "stream.jsonl", "--classes", "bad", "good", "--output", out]
        command = [*map(str, command), "--checkpoint-every", str(every)]
        begun, most, killed = time.perf_counter(), 0.0, False
        memory: list[float] = []
        while True:
            with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:  # noqa: S603 (our own)
                while process.poll() is None:
                    time.sleep(1.0)
                    status = Path(f"/proc/{process.pid}/status")
                    text = status.read_text() if status.exists() else ""
                    if "VmRSS:" in text:
                        memory.append(int(text.partition("VmRSS:")[2].split()[0]) / 1024)
                        most = max(most, memory[-1])
                    done = json.loads((out / STREAM_FILE).read_text())["lines"] if out.exists() else 0
                    if not killed and done >= examples // 2:
                        process.kill()
                        killed = True
                error = process.stderr.read() if process.stderr else ""
            if process.returncode == 0:
                break
            if process.returncode != -9:
                raise RuntimeError(error)
        seconds = time.perf_counter() - begun
        noted = json.loads((out / STREAM_FILE).read_text())
    return {
        "examples": noted["examples"],
        "checkpoints_every": every,
        "online_accuracy": noted["correct"] / noted["examples"],
        "alarms": len(noted["alarms"]),
        "examples_a_second": examples / seconds,
        "mib_early": memory[min(len(memory) - 1, 60)],
        "mib_most": most,
    }


def adapter() -> dict[str, Any]:
    """An adapter of 25 million parameters with a diagonal covariance."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=1024,
        num_hidden_layers=12,
        num_attention_heads=16,
        intermediate_size=4096,
        num_labels=2,
        vocab_size=1000,
    )
    targets = ["query", "key", "value", "dense"]
    lora = LoraConfig(task_type="SEQ_CLS", r=113, target_modules=targets)
    model = get_peft_model(BertForSequenceClassification(config), lora)
    ids = torch.randint(0, 1000, (1, 32))
    kf = bkf.KalmanFilter(model, bkf.KalmanConfig(covariance="diagonal"))
    held: dict[str, Any] = {}

    def begin() -> None:
        held["state"] = kf.init({"input_ids": ids})

    def step() -> None:
        held["state"], _ = kf.update(held["state"], {"input_ids": ids}, torch.tensor([1]))

    first = peak(begin)
    step()
    later = peak(step)
    begun = time.perf_counter()
    for _ in range(5):
        step()
    seconds = (time.perf_counter() - begun) / 5
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def adamw() -> None:
        loss = model(input_ids=ids, labels=torch.tensor([1])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    adamw()
    begun = time.perf_counter()
    for _ in range(5):
        adamw()
    theirs = (time.perf_counter() - begun) / 5
    numbers = kf.adapter.num_parameters
    state = 2 * numbers * 4 / 2**20
    return {
        "parameters": numbers,
        "belief_mib": state,
        "init_copies": first / state,
        "step_copies": later / state,
        "seconds_a_step": seconds,
        "adamw_steps": seconds / theirs,
    }


def classes() -> dict[str, Any]:
    """Ten thousand classes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 10_000))
    numbers: dict[str, Any] = {}
    for curvature in ("sampled", "truncated"):
        kf = bkf.KalmanFilter(model, bkf.KalmanConfig(curvature=curvature, rank=5))
        x, y = torch.randn(4, 32), torch.tensor([0, 17, 9_999, 5_000])
        state = kf.init(x)
        state, _ = kf.update(state, x, y)
        begun = time.perf_counter()
        state, info = kf.update(state, x, y)
        numbers[f"seconds_{curvature}"] = time.perf_counter() - begun
        probs = bkf.Posterior(kf, state).predict(x).probs
        numbers[f"finite_{curvature}"] = bool(torch.isfinite(probs).all() and torch.isfinite(info.log_loss).all())
    return {"classes": 10_000} | numbers


def threads(number: int = 64) -> dict[str, Any]:
    """Threads that predict with one posterior at the same time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5))
    data = [(torch.randn(8, 8), torch.randint(5, (8,))) for _ in range(20)]
    posterior = bkf.fit(model, data, bkf.KalmanConfig(rank=5), progress=False)
    inputs = [torch.randn(6, 8) for _ in range(number)]
    expected = [posterior.predict(x).probs for x in inputs]
    equal = [0] * number

    def ask(which: int) -> None:
        equal[which] = sum(torch.equal(posterior.predict(inputs[which]).probs, expected[which]) for _ in range(20))

    running = [threading.Thread(target=ask, args=(which,)) for which in range(number)]
    [thread.start() for thread in running]
    [thread.join() for thread in running]
    return {"threads": number, "predictions": 20 * number, "equal_to_the_bit": sum(equal)}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "adapter": adapter,
    "classes": classes,
    "threads": threads,
    "online": online,
}


def main() -> None:
    """The command line."""
    command = Command(__doc__).names("--only", PARTS, text="parts to run")
    args = command.hidden("--part", choices=list(PARTS)).parse()  # in its own process
    if args.part:
        print(json.dumps(PARTS[args.part]()))
        return
    file = ResultFile("load")
    file.begin()
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # so that freed memory returns to the system at once
    for part in args.only:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.reliability.load", "--part", part]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            raise RuntimeError(done.stderr)
        file.put(part, json.loads(done.stdout.splitlines()[-1]))
        print(part, file.cells[part], flush=True)
    rows = [
        [part, name.replace("_", " "), f"{value:,.3g}" if isinstance(value, float) else f"{value:,}"]
        for part in PARTS
        for name, value in file.cells.get(part, {}).items()
    ]
    text = (
        "Copies: memory above that of the model, by the belief's own (mean and variance, float32). The stream was "
        "killed half-way (SIGKILL) and started again on the same lines."
    )
    file.write_markdown("Load", [*markdown_table(["", "", "found"], rows), "", text])


if __name__ == "__main__":
    main()
