"""Results of the few-shot bench as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from benchmarks.common.result_files import markdown_table, mean_sd
from benchmarks.few_shot.learn import STEPS_PER_SHOT, Row
from benchmarks.few_shot.tasks import SHOTS, TASKS

Cells = Mapping[str, Mapping[str, Any]]

SUFFIX = {"": "", "scaled": " + temperature", "mean": ", mean only", "post hoc": " + our posterior, post hoc"}


class Line(NamedTuple):
    """A row of the tables: a method and one of its predictions."""

    row: str
    variant: str
    title: str


def accuracy(scores: Mapping[str, Any]) -> float:
    return scores["id"]["accuracy"]


def shifted(score: str) -> Callable[[Mapping[str, Any]], float]:
    """The mean of a score over the shifted sets."""
    return lambda scores: sum(part[score] for part in scores["shifts"].values()) / len(scores["shifts"])


def harmonic(scores: Mapping[str, Any]) -> float:
    """The harmonic mean of ID and OOD accuracy."""
    inside, outside = accuracy(scores), shifted("accuracy")(scores)
    return 2 * inside * outside / (inside + outside) if inside + outside else 0.0


def auroc(scores: Mapping[str, Any]) -> float:
    """Mean AUROC over the out-of-distribution sets."""
    return sum(scores["foreign"].values()) / len(scores["foreign"])


SCORES: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "accuracy ID": accuracy,
    "OOD": shifted("accuracy"),
    "harmonic": harmonic,
    "ECE ID": lambda found: found["id"]["ece"],
    "ECE OOD": shifted("ece"),
    "NLL ID": lambda found: found["id"]["nll"],
    "NLL OOD": shifted("nll"),
    "AUROC OOD": auroc,
}


def lines(cells: Cells, rows: Mapping[str, Row]) -> list[Line]:
    """The measured lines, in the order of the rows."""
    measured = []
    for name, row in rows.items():
        variants = [cell["variants"] for key, cell in cells.items() if key.split("/")[1] == name]
        known = [v for v in SUFFIX if any(v in each for each in variants)]
        measured += [Line(name, variant, row.title + SUFFIX[variant]) for variant in known]
    return measured


def whole(cells: Cells, name: str) -> bool:
    """Whether a row has every cell that any row has, so that its means over tasks and shots are comparable."""
    places = {key: key.split("/") for key in cells}
    own = {(task, shots, seed) for task, row, shots, seed in places.values() if row == name}
    return own == {(task, shots, seed) for task, _, shots, seed in places.values()}


def values(
    cells: Cells, line: Line, score: Callable[[Mapping[str, Any]], float], task: str | None, shots: int | None
) -> dict[int, float]:
    """Seed -> mean of a score over tasks and shots, for the seeds with the most cells."""
    by_seed: dict[int, list[float]] = {}
    for key, cell in cells.items():
        of_task, row, of_shots, seed = key.split("/")
        if row == line.row and task in (None, of_task) and shots in (None, int(of_shots)):
            by_seed.setdefault(int(seed), []).append(score(cell["variants"][line.variant]))
    most = max((len(each) for each in by_seed.values()), default=0)
    return {seed: sum(each) / len(each) for seed, each in by_seed.items() if len(each) == most}


def render(cells: Cells, rows: Mapping[str, Row], wrong: float = 0.0) -> list[str]:
    """Body of the Markdown file."""
    shown, tasks = lines(cells, rows), sorted({key.split("/")[0] for key in cells}, key=list(TASKS).index)
    shots = sorted({int(key.split("/")[2]) for key in cells})
    seeds = sorted({int(key.split("/")[3]) for key in cells})
    body = [
        f"The backbone is the small CLIP of `few_shot_clip.md`. Means over the tasks {', '.join(tasks)}, over "
        f"{', '.join(map(str, shots))} shots and over seeds {', '.join(map(str, seeds))}; ± is the standard deviation "
        "of a seed's mean. A seed draws the shots, the adapter and the orders; the test images are the same. Every row "
        "chose among its grid by the accuracy, then the log loss, on validation shots (as many as training shots, at "
        "most four a class, drawn first). OOD is the mean over a task's shifted sets, *harmonic* the harmonic mean of "
        "ID and OOD accuracy, AUROC how well predictive entropy tells images of other things from test images. "
        f"Gradient rows take {STEPS_PER_SHOT} steps a shot in batches of 32 (CLIP-LoRA's paper: 500), without "
        'augmentation. "+ temperature": softmax scaled so that it suits the validation shots; our beliefs have their '
        'own temperature chosen on these too. "mean only": a belief\'s mean without its covariance.',
    ]
    if wrong:
        body[0] += f" {wrong:.0%} of the training labels were replaced by those of other classes."
    part = [row.title for name, row in rows.items() if not whole(cells, name) and _tried(cells, name)]
    if part:
        body[0] += f" Not in the table of all tasks and shots, as they are not measured everywhere: {'; '.join(part)}."
    body += ["", "## All tasks and shots", "", *_overview(cells, rows, [x for x in shown if whole(cells, x.row)])]
    for task in tasks:
        body += ["", f"## {task}", "", f"{_title(task)}. Accuracy ID by shots:", ""]
        body += _by_shots(cells, shown, SCORES["accuracy ID"], task, shots)
        body += ["", "Accuracy OOD by shots:", "", *_by_shots(cells, shown, SCORES["OOD"], task, shots)]
        body += ["", "ECE ID by shots:", "", *_by_shots(cells, shown, SCORES["ECE ID"], task, shots)]
    for name, row in rows.items():
        if row.tests_all and any("test" in tried for tried in _tried(cells, name)):
            body += ["", f"## {row.title}: every setting", "", *_by_setting(cells, name, row, tasks)]
    return [*body, "", "## Grids", "", *_grids(rows)]


def _overview(cells: Cells, rows: Mapping[str, Row], shown: Iterable[Line]) -> list[str]:
    table = []
    for line in shown:
        numbers = [mean_sd(list(values(cells, line, score, None, None).values())) for score in SCORES.values()]
        seconds = [
            sum(tried["seconds"] for tried in cell["tried"]) / len(cell["tried"])
            for key, cell in cells.items()
            if key.split("/")[1] == line.row and key.split("/")[2] == str(max(SHOTS))
        ]
        learning = f"{sum(seconds) / len(seconds):.1f}" if seconds and not line.variant else ""
        table.append([line.title, *numbers, learning])
    return markdown_table(["", *SCORES, f"seconds at {max(SHOTS)}"], table)


def _by_shots(
    cells: Cells, shown: Iterable[Line], score: Callable[[Mapping[str, Any]], float], task: str, shots: list[int]
) -> list[str]:
    table = []
    for line in shown:
        if line.variant and score is accuracy and line.variant == "scaled":
            continue  # the same answers
        numbers = [mean_sd(list(values(cells, line, score, task, number).values())) for number in shots]
        everything = list(values(cells, line, score, task, None).values()) if "–" not in numbers else []
        table.append([line.title, *numbers, mean_sd(everything)])
    return markdown_table(["", *map(str, shots), "mean"], table)


def _tried(cells: Cells, name: str, task: str | None = None, shots: int | None = None) -> list[Mapping[str, Any]]:
    """The settings that a row tried in its cells."""
    places = {key: key.split("/") for key in cells}
    keys = [key for key, (of, row, number, _) in places.items() if row == name and task in (None, of)]
    return [tried for key in keys if shots in (None, int(places[key][2])) for tried in cells[key]["tried"]]


def _by_setting(cells: Cells, name: str, row: Row, tasks: list[str]) -> list[str]:
    """Accuracy of every setting on test and shifted images, by task, at the most shots and over all shots."""
    most = max(int(key.split("/")[2]) for key in cells)
    table = []
    for choice in row.grid:
        numbers = []
        for task, shots in [*((task, most) for task in tasks), *((task, None) for task in tasks)]:
            settings_tried = _tried(cells, name, task, shots) if whole(cells, name) or shots else []
            tested = [tried["test"] for tried in settings_tried if choice.items() <= tried.items()]
            numbers.append(f"{_mean(map(accuracy, tested))} / {_mean(map(shifted('accuracy'), tested))}")
        table.append([", ".join(f"{field} {_text(value)}" for field, value in choice.items()), *numbers])
    header = [f"{task}, {shots}" for shots in (f"{most} shots", "all shots") for task in tasks]
    return ["Accuracy ID / OOD.", "", *markdown_table(["", *header], table)]


def _mean(numbers: Iterable[float]) -> str:
    values = list(numbers)
    return f"{sum(values) / len(values):.3f}" if values else "–"


def _grids(rows: Mapping[str, Row]) -> list[str]:
    """The grid of each row."""
    table = []
    for row in rows.values():
        settings = [", ".join(f"{name} {_text(value)}" for name, value in choice.items()) for choice in row.grid]
        table.append([row.title, "; ".join(filter(None, settings)) or "none"])
    return markdown_table(["", "settings"], table)


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _title(task: str) -> str:
    """The first sentence of a task's docstring."""
    return (TASKS[task].__doc__ or task).split(".\n")[0].split(". ")[0].strip().rstrip(".")
