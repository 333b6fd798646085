"""What people see of reports, word by word and line by line, as it was when somebody last looked at it.

Numbers in texts are masked: other tests are for them. After a change that is meant, look at the pages, then run

    BAYES_KF_APPROVE=1 pytest tests/evaluation/report/test_approved.py

which writes `approved/`.
"""

import difflib
import os
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_cases import history, random_case
from matplotlib.collections import Collection
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from bayes_kf import evaluation as ev

APPROVED = Path(__file__).parent / "approved"


def classifier():
    probs, targets = random_case(240, 4, seed=1)
    generator = torch.Generator().manual_seed(1)
    samples = (probs.log() + 0.8 * torch.randn(8, 240, 4, generator=generator)).softmax(-1)
    fitted = random_case(200, 4, seed=2)
    return ev.evaluate_predictions(
        probs,
        targets,
        samples=samples,
        ood={"noise": torch.full((50, 4), 0.25), "other": random_case(60, 4, seed=3)[0]},
        history=history(200),
        parameter_variance={"a.weight": torch.rand(30, generator=generator), "b": torch.rand(2, generator=generator)},
        output_variance={"a.weight": 0.5, "b": 0.01},
        examples=[f"text number {i}" for i in range(240)],
        human=random_case(240, 4, seed=4)[0],
        recalibration=ev.TemperatureScaling.fit(*fitted),
        conformal=ev.ConformalSets.fit(*fitted),
        ordered=True,
        top_k=(2,),
        config={"rank": 20},
        class_names=["bad", "middling", "good", "superb"],
        num_simulations=60,
    )


def confident():
    """Two classes, over-confident, little else."""
    probs, targets = random_case(150, 2, seed=5)
    return ev.evaluate_predictions((4 * probs.log()).softmax(1), targets, num_simulations=60)


def numbers(scale=1.0):
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(300, generator=generator, dtype=torch.float64)
    targets = mean + scale * torch.randn(300, generator=generator, dtype=torch.float64)
    return ev.evaluate_regression(
        mean,
        targets,
        variance=torch.rand(300, generator=generator, dtype=torch.float64) + 0.5,
        samples=mean + torch.randn(40, 300, generator=generator, dtype=torch.float64),
        history={name: series for name, series in history(200).items() if name != "correct"},
        parameter_variance={"a": torch.rand(30, generator=generator)},
        num_simulations=60,
    )


def wild():
    return numbers(3.0)


def models():
    probs, targets = random_case(240, 3, seed=6)
    runs = {"ours": history(200), "theirs": {k: v.flip(0) for k, v in history(200).items()}}
    sharper = (3 * probs.log()).softmax(1)
    return ev.report_comparison({"ours": probs, "theirs": sharper}, targets, histories=runs, num_simulations=60)


def masked(text):
    return re.sub(r"[−-]?\d[\d,.]*(?:e[+-]?\d+)?", "#", text)


def words(report):
    """The page's text, a line a cell or paragraph, up to its fingerprints."""
    html = report.to_html().partition("Fingerprints (SHA-256)")[0].partition("<body")[2]
    figures = re.findall(r'<svg[^>]*? aria-label="([^"]*)"', html)
    html = re.sub(r"<(script|style|svg)\b.*?</\1>", "", html, flags=re.DOTALL)
    alt = "".join(f"\nalt: {text}" for text in [*figures, *re.findall(r'alt="([^"]*)"', html)])
    text = unescape(re.sub(r"<[^>]+>", "\n", html) + alt)
    lines = (" ".join(masked(line).split()) for line in text.splitlines())
    return [line for line in lines if line]


def style(artist):
    """How something on an axes is drawn, not where."""
    said = [type(artist).__name__, f"zorder {artist.get_zorder():g}", f"alpha {artist.get_alpha()}"]
    if isinstance(artist, Line2D):
        said += [to_hex(artist.get_color()), artist.get_linestyle(), f"{artist.get_linewidth():g}"]
        said += [str(artist.get_marker()), f"{artist.get_markersize():g}", to_hex(artist.get_markeredgecolor())]
        said += [str(artist.get_drawstyle()), f"{len(artist.get_xdata())} points"]
    elif isinstance(artist, Patch):
        said += [to_hex(artist.get_facecolor(), keep_alpha=True), to_hex(artist.get_edgecolor(), keep_alpha=True)]
        said += [str(artist.get_hatch()), f"{artist.get_linewidth():g}", str(artist.get_linestyle())]
    elif isinstance(artist, Collection):
        for colours in (artist.get_facecolor(), artist.get_edgecolor()):
            said += sorted({to_hex(colour, keep_alpha=True) for colour in np.atleast_2d(colours) if len(colour)})
        said += [f"{width:g}" for width in np.atleast_1d(artist.get_linewidth())] + [str(artist.get_hatch())]
    return " ".join([*said, "label", masked(str(artist.get_label()))])


def drawn(figure: Figure):
    """What a figure shows, without its data."""
    figure.canvas.draw()
    lines = []
    for number, ax in enumerate(figure.axes):
        lines.append(f"axes {number}: {masked(ax.get_title())} | {ax.get_xlabel()} | {ax.get_ylabel()}")
        limits = [f"{end:.1g}" for end in (*ax.get_xlim(), *ax.get_ylim())]
        lines.append(f"scales {ax.get_xscale()} {ax.get_yscale()} limits {' '.join(limits)}")
        sides = [side for side, spine in ax.spines.items() if spine.get_visible()]
        lines.append(f"spines {' '.join(sorted(sides))}; colours {to_hex(ax.yaxis.label.get_color())}")
        for axis in (ax.xaxis, ax.yaxis):
            shown = [line for line in axis.get_gridlines() if line.get_visible()]
            labels = [masked(label.get_text()) for label in axis.get_ticklabels() if label.get_text()]
            words_there = [label for label in labels if label.strip("# %")]  # numbers are the layout's own business
            lines.append(f"grid {[style(shown[0])] if shown else []} ticks {words_there}")
        held = {id(patch) for container in ax.containers if isinstance(container, BarContainer) for patch in container}
        for container in ax.containers:
            if isinstance(container, BarContainer) and len(container):
                lines.append(f"{len(container)} bars {container.get_label()}: {style(container[0])}")
        for artist in [*ax.lines, *ax.collections, *ax.patches]:
            if id(artist) not in held:
                lines.append(style(artist))
        lines += [f"text {masked(t.get_text())} {to_hex(t.get_color())} {t.get_fontsize():g}" for t in ax.texts]
        legend = ax.get_legend()
        lines += [f"legend {masked(t.get_text())} {t.get_fontsize():g}" for t in legend.get_texts()] if legend else []
    return lines


def seen(report):
    text = words(report)
    for name, figure in report.figures.items():
        text += ["", f"== {name}", *drawn(figure)]
    return "\n".join(text) + "\n"


@pytest.mark.parametrize("make", [classifier, confident, numbers, wild, models])
def test_what_people_see_is_what_was_approved(make):
    file, actual = APPROVED / f"{make.__name__}.txt", seen(make())
    if os.environ.get("BAYES_KF_APPROVE"):
        APPROVED.mkdir(exist_ok=True)
        file.write_text(actual, encoding="utf-8")
    expected = file.read_text(encoding="utf-8")
    changes = difflib.unified_diff(expected.splitlines(), actual.splitlines(), "approved", "now", lineterm="", n=1)
    assert actual == expected, "\n".join(changes)
