"""Equal seeds give equal bits on one machine; differences between thread counts, processors and devices.

Every run is a process of its own: it fits, predicts, evaluates and writes the report. The parent process compares its
files with those of the first run. "AVX2" and "SSE4" forbid torch, MKL and oneDNN newer instructions, as on an older
processor.

    python -m benchmarks.reliability.reproducibility           # some five minutes; results/reproducibility.md
    python -m benchmarks.reliability.reproducibility --table   # the table from existing results
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import bayes_kf as bkf
from bayes_kf.models.zoo import lora_digits_vit
from benchmarks.common import text
from benchmarks.common.command import Command
from benchmarks.common.result_files import ResultFile, markdown_table
from tutorials.digits_demo.data import Size, demo_data

AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}

SSE4 = {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"}


class Case(NamedTuple):
    """A model, its stream, the examples to predict, and settings of the filter."""

    model: nn.Module
    stream: Iterable[Any]
    heldout: Iterable[Any]
    config: dict[str, Any]


def digits() -> Case:
    """The bundled digit transformer with LoRA, one UCI digit at a time, at the default."""
    data = demo_data(Size(150, 150))
    return Case(lora_digits_vit(seed=0), data.stream_loader, data.heldout_loader, {})


def minilm_sst2() -> Case:
    """MiniLM with LoRA and a new head, SST-2, one sentence at a time."""
    batches = text.sentences("sst2", "train", torch.arange(120)).batches()
    return Case(text.minilm(0, 4, 2), batches[:60], batches[60:], {})


def sentences() -> Case:
    """A BERT from a configuration with LoRA on all its matrices; token sequences with padding."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=500, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, num_labels=3
    )
    lora = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "key", "value", "dense"])
    model = get_peft_model(BertForSequenceClassification(config), lora)
    batches = []
    for _ in range(60):
        ids, mask = torch.randint(1, 500, (4, 16)), (torch.arange(16) < torch.randint(4, 17, (4, 1))).long()
        batches.append(({"input_ids": ids * mask, "attention_mask": mask}, ids[:, 0] % 3))
    return Case(model, batches[:40], batches[40:], {})


def network(**config: Any) -> Case:
    """A network of two layers that classifies."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 6))
    inputs, way = torch.randn(800, 20), torch.randn(20, 6)
    labels = (inputs @ way).argmax(1)
    batches = list(zip(inputs.split(4), labels.split(4), strict=True))
    return Case(model, batches[:100], batches[100:], config)


def values() -> Case:
    """A network of two layers for regression, with an estimated noise."""
    case = network(likelihood="gaussian", noise="ema_taylor")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 1))
    batches = [(x, torch.sin(x[:, :1]) + 0.1 * x[:, 1:2]) for x, _ in [*case.stream, *case.heldout]]
    return Case(model, batches[:100], batches[100:], case.config)


CASES: dict[str, Callable[[], Case]] = {
    "digit transformer, LoRA": digits,
    "BERT, LoRA": sentences,
    "MiniLM on SST-2, LoRA": minilm_sst2,
    "network, low rank": lambda: network(rank=20),
    "network, diagonal": lambda: network(covariance="diagonal"),
    "network, block diagonal": lambda: network(covariance="block_diagonal"),
    "network, full": lambda: network(covariance="full"),
    "network, four passes": lambda: network(rank=20, passes=4),
    "network, values": values,
}
RUNS: dict[str, dict[str, Any]] = {
    "first": {},
    "again": {},
    "2 threads": {"threads": 2},
    "2 threads, again": {"threads": 2},
    "AVX2": {"environment": AVX2},
    "SSE4": {"environment": SSE4},
}


def run(case: str, folder: Path, threads: int, device: str) -> None:
    """Fit, predict and report; write the results into ``folder``."""
    torch.set_num_threads(threads)
    model, stream, heldout, settings = CASES[case]()
    posterior = bkf.fit(model.to(device), stream, bkf.KalmanConfig(**settings), progress=False)
    predicted = posterior.predict_loader(heldout)
    report = bkf.evaluate(posterior, heldout)
    report.save(folder / "report.html")
    tensors: dict[str, Tensor] = {
        "mean": posterior.mean_vector,
        "variance": posterior.kf.marginal_variance(posterior.state),
        "prediction": predicted.mean if predicted.probs is None else predicted.probs,
        "scores": torch.tensor(list(report.scores.values()), dtype=torch.float64),
    }
    save_file(
        {name: value.detach().cpu().contiguous() for name, value in tensors.items()}, folder / "found.safetensors"
    )


def start(case: str, folder: Path, setting: dict[str, Any]) -> None:
    """One run in its own process."""
    folder.mkdir()
    threads = setting.get("threads", 1)
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.reliability.reproducibility"]
    command += ["--case", case, "--folder", str(folder)]
    command += ["--threads", str(threads), "--device", setting.get("device", "cpu")]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)} | setting.get("environment", {})
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603 (our own)
    if done.returncode:
        raise RuntimeError(done.stderr)


def compared(first: Path, second: Path) -> dict[str, Any]:
    """Differences of the second run from the first."""
    here, there = (load_file(folder / "found.safetensors") for folder in (first, second))
    pages = [hashlib.sha256((folder / "report.html").read_bytes()).hexdigest() for folder in (first, second)]
    sd = here["variance"].sqrt()
    return {
        "same_bits": all(torch.equal(here[name], there[name]) for name in ("mean", "variance", "prediction")),
        "same_page": pages[0] == pages[1],
        "mean_sd": float(((there["mean"] - here["mean"]).abs() / sd).max()),
        "variance": float((there["variance"] / here["variance"] - 1).abs().max()),
        "prediction": float((there["prediction"] - here["prediction"]).abs().max()),
        "scores": float((there["scores"] - here["scores"]).abs().nan_to_num().max()),
    }


def main() -> None:
    """The command line."""
    command = Command(__doc__).names("--only", CASES, text="cases to run").table()
    args = command.hidden("--case", "--folder", "--device").parse()  # of a run in its own process
    if args.case:
        run(args.case, Path(args.folder), args.threads, args.device)
        return
    file = ResultFile("reproducibility")
    if not args.table:
        run_all(file, args.only)
    write(file)


def run_all(file: ResultFile, cases: Iterable[str]) -> None:
    """Run the cases in every setting and compare."""
    file.begin()
    runs = RUNS | ({"GPU": {"device": "cuda"}, "GPU, again": {"device": "cuda"}} if torch.cuda.is_available() else {})
    for case in cases:
        with TemporaryDirectory() as scratch:
            for name, setting in runs.items():
                start(case, Path(scratch) / name, setting)
            for name in list(runs)[1:]:
                first = name.removesuffix(", again") if name.endswith(", again") else "first"
                cell = compared(Path(scratch) / first, Path(scratch) / name) | {"against": first}
                file.put(f"{case}|{name}", cell)
                print(case, name, cell, flush=True)


def write(file: ResultFile) -> None:
    """The table."""
    rows = []
    for key, cell in file.cells.items():
        case, name = key.split("|")
        numbers = [
            f"{cell[which]:.0e}" if cell[which] else "0" for which in ("mean_sd", "variance", "prediction", "scores")
        ]
        same = [("yes" if cell[which] else "no") for which in ("same_bits", "same_page")]
        rows.append([case, name, cell["against"], *same, *numbers])
    rows.sort(key=lambda row: (list(CASES).index(row[0]), [*RUNS, "GPU", "GPU, again"].index(row[1])))
    header = ["", "run", "against", "same bits", "same page", "mean, sd", "variance, relative", "prediction", "scores"]
    text = (
        "Largest differences: of the mean in posterior standard deviations, of variances relative, of predicted "
        "probabilities or values and of the report's scores as they are. Float32."
    )
    file.write_markdown("Reproducibility", [text, "", *markdown_table(header, rows)])


if __name__ == "__main__":
    main()
