"""The directive `command-help`: what `bayes-kf COMMAND --help` prints, so that the site names every option."""

import os
from unittest import mock

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from bayes_kf.cli.parser import build_parser

COLUMNS = "88"  # argparse wraps its help at the width of the terminal


class CommandHelp(SphinxDirective):
    """The help of one command as a literal block."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The block."""
        (commands,) = (action for action in build_parser()._actions if action.dest == "command")
        assert commands.choices is not None
        with mock.patch.dict(os.environ, COLUMNS=COLUMNS):
            text = dict(commands.choices)[self.arguments[0]].format_help()
        block = nodes.literal_block(text, text)
        block["language"] = "text"
        return [block]


def setup(app: Sphinx) -> dict[str, object]:
    """The directive."""
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True, "version": "1"}
