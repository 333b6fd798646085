"""The reference site. From the root: ``sphinx-build -W -c docs . site``; sources are the repository's own pages."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from bayes_kf import __version__

project, author = "bayes_kf", "The bayes_kf developers"
copyright = f"2026, {author}. MIT licence"
version = release = __version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "command_help",
    "results",
]
root_doc = "docs/index"
include_patterns = ["docs/**", "tutorials/*", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md"]
exclude_patterns = ["docs/conf.py", "docs/_ext", ".venv", ".git"]
html_static_path, html_css_files = ["_static"], ["site.css"]
html_theme, html_title = "furo", f"bayes_kf {version}"
nb_execution_mode = "off"  # the notebooks are stored executed; the tests run them
nb_render_image_options = {"alt": "The figure that the code above draws"}
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_use_ivar = True
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
suppress_warnings = ["autodoc.mocked_object"]


def _bars(app, what, name, obj, options, lines):
    """Bars are absolute values in our docstrings, and substitutions in reStructuredText."""
    for place, line in enumerate(lines):
        parts = line.split("``")
        lines[place] = "``".join(part if number % 2 else part.replace("|", r"\|") for number, part in enumerate(parts))


def _fields(app, what, name, obj, skip, options):
    """Fields of named tuples stand in their signature, and under Attributes where there is something to say of them."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app):
    app.connect("autodoc-skip-member", _fields)
    app.connect("autodoc-process-docstring", _bars)
