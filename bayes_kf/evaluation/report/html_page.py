"""The HTML page of a report: every text is escaped and every figure is in the page."""

from __future__ import annotations

import base64
import hashlib
from typing import Any


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


def data_uri(content: bytes, media_type: str) -> str:
    """A data URI that holds a file of this media type.

    Example:
        >>> data_uri(b"abc", "text/plain")
        'data:text/plain;base64,YWJj'
    """
    return f"data:{media_type};base64," + base64.b64encode(content).decode("ascii")
