"""Colours, line styles and hatches of all figures, and the axes they are drawn on.

The colours are those of Okabe and Ito. If a colour has a meaning, a hatch, a line style or a position shows it too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bayes_kf.evaluation.report.contents import TIPS

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, GREY = "#CC79A7", "#56B4E9", "#595959"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
LINES = ("-", "--", "-.", ":")
HATCHES = ("", "///", "\\\\\\", "...", "xxx", "+++")


def axes_or_new(ax: Axes | None) -> Axes:
    """The axes given, or those of a new figure."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained")[1]


def add_tips(artist: Artist, tips: Sequence[str]) -> None:
    """Say what each mark of an artist is; pages of reports show it under the pointer."""
    artist.set_gid(TIPS + json.dumps(list(tips), ensure_ascii=False))
