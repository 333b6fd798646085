"""The HTML page of a report: every text is escaped and every figure is embedded."""

from __future__ import annotations

import base64
import hashlib
import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGEST_SVG = 400_000  # bytes; larger figures are smaller and faster to display as pixels
PIXELS_PER_INCH = 200


def render_page(**content: Any) -> str:
    """The page as HTML. The template engine escapes every text; the browser runs only the page's own script."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("bayes_kf.evaluation.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = environment.get_template("report.js").render()
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return environment.get_template("report.html.j2").render(script_hash=script_hash, **content)


def figure_uri(figure: Figure) -> str:
    """Data URI of the figure: an SVG image, or a PNG image if the SVG has more than `LARGEST_SVG` bytes."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "bayes_kf"}):  # equal reports give equal bytes
        image = _saved(figure, format="svg", metadata={"Date": None})
    if len(image) <= LARGEST_SVG:
        return data_uri(image, "image/svg+xml")
    return data_uri(_saved(figure, format="png", dpi=PIXELS_PER_INCH), "image/png")


def data_uri(content: bytes, media_type: str) -> str:
    """A data URI that holds a file of this media type.

    Example:
        >>> data_uri(b"abc", "text/plain")
        'data:text/plain;base64,YWJj'
    """
    return f"data:{media_type};base64," + base64.b64encode(content).decode("ascii")


def _saved(figure: Figure, **settings: Any) -> bytes:
    """The figure as a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, **settings)
    return buffer.getvalue()
