"""The tokens of right answers as text to learn: held-out log loss a token, beside AdamW at about equal cost.

The model is SmolLM2-135M-Instruct with the bench's adapter (``language_model.py``): LoRA of rank 8 on queries and
values of the last five layers. It reads 200 questions with their right answers, of which the answers' tokens are
learned, and is tested on 300. AdamW: three rates, at most four epochs in batches of 16, early stopping by a held-out
eighth. This package: its default fit of text.

    python -m benchmarks.language.supervised_text
    python -m benchmarks.language.supervised_text --table
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader

import bayes_kf as bkf
from bayes_kf.models.batch import IGNORED
from benchmarks.common.command import Command, run_cells
from benchmarks.common.result_files import ResultFile, markdown_table
from benchmarks.common.smollm2 import smollm2
from benchmarks.common.subprocesses import run_in_process
from benchmarks.language.language_model import RANK, TARGETS, Halves
from benchmarks.language.measured import mean_gap
from benchmarks.language.questions import TEST, TRAIN, splits, text_parts

SETS = ("arc_easy", "openbookqa")
RATES, EPOCHS, BATCH = (3e-4, 1e-3, 3e-3), 4, 16
Row = dict[str, Tensor]
Batch = dict[str, Tensor]


class Losses(NamedTuple):
    """Summed log loss of each text's learned tokens, and their number."""

    sums: Tensor
    counts: Tensor

    @property
    def a_token(self) -> float:
        """Mean log loss of a token."""
        return float(self.sums.sum() / self.counts.sum())


class Texts(NamedTuple):
    """Questions with their right answers.

    Attributes:
        halves: the language model.
        features: what enters the layers with the adapter, a row for every token (computed once, as in the bench).
        train: to learn; ``input_ids`` are numbers of those rows, ``labels`` tokens.
        test: the same, the shortest first.
    """

    halves: Halves
    features: Tensor
    train: list[Row]
    test: list[Row]


def load(name: str, seed: int) -> Texts:
    """The texts of a set."""
    tokenizer, model = smollm2()
    train, test = splits(name)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:TRAIN].tolist()
    texts = []
    for question in [*(train[number] for number in order), *test[:TEST]]:
        before, after = text_parts(question)[question.answer]
        asked, answer = tokenizer(before)["input_ids"], tokenizer(after, add_special_tokens=False)["input_ids"]
        texts.append((asked, [*answer, tokenizer.eos_token_id]))
    halves, features, made, place = Halves(model), [], [], 0
    for asked, answer in texts:
        ids = torch.tensor([[*asked, *answer]])
        features.append(halves.features(ids, torch.ones_like(ids)).squeeze(0))
        numbers = torch.arange(place, place := place + ids.shape[1])
        labels = torch.tensor([IGNORED] * len(asked) + answer)
        made.append({"input_ids": numbers, "labels": labels, "attention_mask": torch.ones_like(numbers)})
    ordered = sorted(made[TRAIN:], key=lambda row: len(row["labels"]))
    return Texts(halves, torch.cat(features), made[:TRAIN], ordered)


def collate(some: Sequence[Row]) -> Batch:
    """A batch, padded on the right."""
    fill = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0}
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    return {name: pad([row[name] for row in some], padding_value=value) for name, value in fill.items()}


def loader(some: Sequence[Row], seed: int | None = None) -> DataLoader[Any]:
    """Batches, in a new order each epoch if there is a seed."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(list(some), BATCH, shuffle=seed is not None, collate_fn=collate, generator=generator)  # type: ignore[arg-type]


def language_model(seed: int, texts: Texts) -> Any:
    """The layers with a new adapter as a language model whose embeddings are features."""
    upper = texts.halves.upper_model()
    upper.model.embed_tokens = nn.Embedding.from_pretrained(texts.features)
    torch.manual_seed(seed)
    lora = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS["qv"])
    return get_peft_model(upper, lora).eval()


def losses(log_probs_of: Callable[[Batch], tuple[Tensor, Tensor]], some: Sequence[Row]) -> Losses:
    """Losses of texts, from a function that gives log-probabilities (B, T) and which tokens count."""
    parts = [log_probs_of(batch) for batch in loader(some)]
    return Losses(
        torch.cat([-log_probs.double().sum(1) for log_probs, _ in parts]),
        torch.cat([counted.sum(1) for _, counted in parts]),
    )


def answer_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits (B, K, V) of the K columns that some text learns, and the tokens that follow them, (B, K)."""
    following = batch["labels"][:, 1:]
    columns = (following != IGNORED).any(0).nonzero().squeeze(-1)
    mask = batch["attention_mask"]
    logits = model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False, logits_to_keep=columns).logits
    return logits, following[:, columns]


@torch.no_grad()
def by_model(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the learned tokens by a model, zero elsewhere."""
    logits, following = answer_logits(model, batch)
    picked = logits.log_softmax(-1).gather(-1, following.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return picked * (following >= 0), following >= 0


def by_posterior(posterior: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The same by the posterior predictive of eight drawn adapters."""
    scored = posterior.score(batch)
    return scored.log_prob, scored.counted


class Learned(NamedTuple):
    """What a row has learned.

    Attributes:
        log_probs: name -> a function as :func:`losses` takes it; "own" is the row's.
        facts: further numbers.
    """

    log_probs: Mapping[str, Callable[[Batch], tuple[Tensor, Tensor]]]
    facts: dict[str, Any]


def zero_shot(texts: Texts, seed: int) -> Learned:
    """The model as it is."""
    return Learned({"own": partial(by_model, language_model(seed, texts))}, {})


def adamw(texts: Texts, seed: int) -> Learned:
    """The run with the least held-out loss."""
    runs = [_adamw_run(texts, seed, rate) for rate in RATES]
    best = min(runs, key=lambda run: run.loss)
    return Learned({"own": partial(by_model, best.model)}, {"rate": best.rate, "best_epoch": best.epoch})


class Run(NamedTuple):
    """A run of AdamW with the weights of its best epoch, and the held-out loss there."""

    loss: float
    rate: float
    epoch: int
    model: Any


def _adamw_run(texts: Texts, seed: int, rate: float) -> Run:
    cut = len(texts.train) - len(texts.train) // 8
    fitted, heldout = texts.train[:cut], texts.train[cut:]
    model = language_model(seed, texts)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-2)
    batches = loader(fitted, seed)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (EPOCHS * len(batches)))
    best, best_loss, best_epoch = [p.detach().clone() for p in parameters], math.inf, 0
    for epoch in range(1, EPOCHS + 1):
        for batch in batches:
            optimizer.zero_grad(set_to_none=True)
            logits, following = answer_logits(model, batch)
            F.cross_entropy(logits.flatten(0, 1), following.flatten(), ignore_index=IGNORED).backward()
            optimizer.step()
            schedule.step()
        loss = losses(partial(by_model, model), heldout).a_token
        if loss < best_loss:
            best, best_loss, best_epoch = [p.detach().clone() for p in parameters], loss, epoch
    with torch.no_grad():
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)
    return Run(best_loss, rate, best_epoch, model)


def default(texts: Texts, seed: int) -> Learned:
    """This package without settings: eight drawn adapters, and the mean alone."""
    model = language_model(seed, texts)
    posterior: Any = bkf.fit(model, loader(texts.train, seed), progress=False)
    posterior.apply_to(model)
    log_probs = {"own": partial(by_posterior, posterior), "mean": partial(by_model, model)}
    return Learned(log_probs, {"size": posterior.history["size"].tolist()})


ROWS: Mapping[str, tuple[str, Callable[[Texts, int], Learned]]] = {
    "zero-shot": ("zero-shot", zero_shot),
    "adamw": ("AdamW, early stopping", adamw),
    "default": ("**ours, default**", default),
}
LEGEND = (
    f"SmolLM2-135M-Instruct with LoRA of rank {RANK} on queries and values of its last five layers; {TRAIN} right"
    f" answers to questions to learn, {TEST} to test. Log loss in nats a token of the answers and their end; ours"
    " averages eight drawn adapters, and in parentheses is that of the mean alone. Less AdamW's: a text's summed log"
    " loss less that of AdamW, mean ± standard error over texts. Seconds of the processor, of AdamW with its search"
    " over three rates."
)


def measure(name: str, row: str, seed: int) -> dict[str, Any]:
    """One cell."""
    warnings.simplefilter("ignore")
    texts = load(name, seed)
    begun = time.process_time()
    learned = ROWS[row][1](texts, seed)
    seconds = time.process_time() - begun
    found = {end: losses(log_probs, texts.test) for end, log_probs in learned.log_probs.items()}
    a_token = {f"log_loss{'' if end == 'own' else f'_{end}'}": part.a_token for end, part in found.items()}
    sums = [round(value, 3) for value in found["own"].sums.tolist()]
    return {**a_token, "seconds": seconds, "losses": sums, **learned.facts}


def render(cells: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Body of the Markdown file."""
    lines = [LEGEND]
    for name in sorted({key.split("/")[0] for key in cells}):
        table = []
        for row, (title, _) in ROWS.items():
            for key, cell in cells.items():
                if not key.startswith(f"{name}/{row}/"):
                    continue
                base, gap = cells.get(f"{name}/adamw/{key.split('/')[2]}"), "–"
                if base is not None and row != "adamw":
                    gap = str(mean_gap([a - b for a, b in zip(cell["losses"], base["losses"], strict=True)]))
                mean = f" ({cell['log_loss_mean']:.3f})" if "log_loss_mean" in cell else ""
                table.append([title, key.split("/")[2], f"{cell['log_loss']:.3f}{mean}", gap, f"{cell['seconds']:.0f}"])
        header = ["", "seed", "log loss a token", "less AdamW's, a text", "seconds"]
        lines += ["", f"## {name}", "", *markdown_table(header, table)]
    return lines


def main() -> None:
    """The command line."""
    command = Command(__doc__).names("--data", SETS, text="sets").names("--rows", ROWS, text="rows").seeds(1)
    args = command.redo().table().parse()
    file = ResultFile("language_text")
    if not args.table:
        work = {
            f"{name}/{row}/{seed}": partial(_in_process, name, row, seed)
            for seed in args.seeds
            for name in args.data
            for row in args.rows
        }
        run_cells(file, work, args.redo, lambda cell: f"log loss {cell['log_loss']:.3f}  {cell['seconds']:.0f} s")
    print(file.write_markdown("Answers as text to learn", render(file.cells)))


def _in_process(name: str, row: str, seed: int) -> dict[str, Any]:
    cell = run_in_process(measure, name, row, seed)
    if not isinstance(cell, dict):
        raise RuntimeError(f"the process of {name}/{row}/{seed} ended with {cell}")
    return cell


if __name__ == "__main__":
    main()
