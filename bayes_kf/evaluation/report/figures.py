"""Figures of a report, drawn without pyplot so that no window or global list holds them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from bayes_kf.evaluation.report.contents import PART, FigureSpec

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 5.4  # inches, of every figure


def draw_figure(spec: FigureSpec) -> Figure:
    """One figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, spec.height), layout="constrained")
    spec.draw(figure.subplots())
    for _ in range(2):  # a legend below the axes moves with them
        figure.draw_without_rendering()
    figure.set_layout_engine("none")  # drawn again it would move a little, and the page would be another
    return figure


def draw_with_parts(spec: FigureSpec) -> Figure:
    """One figure in which each part of the data is drawn too; identifiers say what belongs to which, 0 to all."""
    figure = draw_figure(spec)
    (ax,) = figure.axes
    drawn = [*_marks(ax), *ax.child_axes]
    _mark_as_part(drawn, 0)
    for number, part in enumerate(spec.parts, 1):
        part.draw(ax)
        added = [mark for mark in _marks(ax) if mark not in drawn]
        _mark_as_part(added, number)
        drawn += added
    return figure


def _marks(ax: Axes) -> list[Artist]:
    """What stands for data: points and bars, without lines and texts."""
    return [*ax.collections, *ax.patches]


def _mark_as_part(marks: Iterable[Artist], number: int) -> None:
    for mark in marks:
        mark.set_gid(f"{PART}{number};{mark.get_gid() or ''}")


def draw_sheet(title: str, drawings: Mapping[str, FigureSpec]) -> Figure:
    """All figures on one sheet, two in a row; each has its own layout, so long labels of one do not narrow another."""
    from matplotlib.figure import Figure

    columns, specs = min(2, len(drawings)), list(drawings.values())
    heights = [max(s.height for s in specs[first : first + columns]) for first in range(0, len(specs), columns)]
    figure = Figure(figsize=(WIDTH * columns, sum(heights) + 0.4), layout="constrained")
    figure.suptitle(title, parse_math=False)
    parts = figure.subfigures(len(heights), columns, squeeze=False, height_ratios=heights).flatten()
    for part, spec in zip(parts, specs, strict=False):
        spec.draw(part.subplots())
        part.suptitle(spec.title, fontsize=11, parse_math=False)  # above, since a legend may stand below the axes
    return figure
