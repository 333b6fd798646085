"""Figures as they stand in a page: SVG elements in the page's own colours, whose points say what they are.

Text stays text, so it can be searched and read aloud. Black becomes the colour of text and white that of the ground, so
that figures fit a dark page too. A figure that would be large is an image of pixels.
"""

from __future__ import annotations

import io
import json
import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from bayes_kf.evaluation.report.contents import PART, TIPS
from bayes_kf.evaluation.report.html_page import data_uri

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

LARGEST_SVG = 400_000  # bytes; larger figures are smaller and faster to display as pixels
PIXELS_PER_INCH = 200
SVG = "http://www.w3.org/2000/svg"
LINK = "{http://www.w3.org/1999/xlink}href"
COLOURS = {"#000000": "currentColor", "#ffffff": "var(--ground)", "#595959": "var(--muted)"}  # the plots' grey


def figure_markup(figure: Figure, alt: str, key: str) -> Markup:
    """The figure as an SVG element, or as an image if the SVG has more than `LARGEST_SVG` bytes.

    Args:
        figure: To be drawn.
        alt: Its content in words.
        key: Unlike that of every other figure of the page.
    """
    from markupsafe import Markup
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": f"bayes_kf {key}", "svg.fonttype": "none"}):  # equal reports give equal bytes
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    content = buffer.getvalue()
    if len(content) > LARGEST_SVG:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=PIXELS_PER_INCH, facecolor="white")
        return Markup('<img src="{}" alt="{}">').format(data_uri(buffer.getvalue(), "image/png"), alt)
    return Markup(_inline(content.decode("utf-8"), alt))  # noqa: S704 (ElementTree has escaped every text)


def _inline(content: str, alt: str) -> str:
    """The SVG element of a file of matplotlib's."""
    ElementTree.register_namespace("", SVG)
    root = ElementTree.fromstring(content)  # noqa: S314 (our own figure)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", alt)
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    used = set(re.findall(r"url\(#([^)]+)\)", content))
    used |= {link.removeprefix("#") for element in root.iter() if (link := element.get(LINK))}
    for element in root.iter():
        identifier = element.get("id", "")
        if identifier.startswith(PART):
            number, _, rest = identifier.removeprefix(PART).partition(";")
            element.set("data-part", number)
            if number != "0":
                element.set("display", "none")
        else:
            rest = identifier
        if rest.startswith(TIPS):
            _add_tips(element, json.loads(rest.removeprefix(TIPS)))
        if identifier and identifier not in used:
            del element.attrib["id"]
        if link := element.attrib.pop(LINK, None):
            element.set("href", link)
        for name in ("style", "fill", "stroke"):
            if name in element.attrib:
                element.set(name, _coloured(element.attrib[name]))
    return ElementTree.tostring(root, encoding="unicode")


def _add_tips(group: ElementTree.Element, tips: list[str]) -> None:
    """A tip for each mark of a group, which browsers show under the pointer."""
    marks = [element for element in group.iter() if element.tag in (f"{{{SVG}}}use", f"{{{SVG}}}path")]
    marks = [mark for mark in marks if mark.tag.endswith("use")] or marks
    for mark, tip in zip(marks, tips, strict=False):
        ElementTree.SubElement(mark, f"{{{SVG}}}title").text = tip


def _coloured(style: str) -> str:
    """A style in the page's colours."""
    return re.sub(r"#[0-9a-f]{6}\b", lambda found: COLOURS.get(found[0], found[0]), style)
