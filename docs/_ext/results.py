"""Tables and numbers of `benchmarks/results/` in pages of the site, so that no number is typed by hand.

The directive `results` takes the name of a results page and three options: `section`, the heading that the table
stands under; `rows`, which rows, separated by semicolons; `columns`, which columns, with a new heading after " = ".

The role `result` takes the name of a JSON file and one number of its cells: "kills 200.killed_while_writing" is that of
the cell "200"; "fuzz sum *.cases" a sum over cells; "mutation 100 * all.rate as .1f" is scaled and has a format.
"""

import json
import re
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective, SphinxRole

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _plain(text: str) -> str:
    """Text of a cell or heading without its Markdown."""
    return re.sub(r"[*`]", "", text).strip()


def _found(wanted: str, among: list[str], what: str) -> int:
    """The place of the entry that is, or else begins with, or else holds the wanted text."""
    plain = [_plain(text).casefold() for text in among]
    wanted_text = _plain(wanted).casefold()
    for fits in (str.__eq__, str.startswith, str.__contains__):
        places = [place for place, text in enumerate(plain) if fits(text, wanted_text)]
        if places:
            return places[0]
    raise ValueError(f"`{what}` must be one of {among}, got {wanted!r}.")


def _is_numeric(column: tuple[str, ...]) -> bool:
    """Whether most cells of a column are numbers, which are set to the right."""
    return 2 * sum(bool(re.match(r"[*+\-−–]*\d", cell)) for cell in column) > sum(
        cell not in ("", "–") for cell in column
    )


def sections(text: str) -> dict[str, list[list[str]]]:
    """The tables of a results page by heading, each the first below it: lines of cells, without the rule."""
    tables: dict[str, list[list[str]]] = {}
    heading, open_table = "", False
    for line in text.splitlines():
        if line.startswith("#"):
            heading, open_table = line.lstrip("# "), False
        elif line.startswith("|"):
            if heading not in tables:
                tables[heading], open_table = [], True
            if open_table and not re.fullmatch(r"[|\s:-]+", line):
                tables[heading].append(_cells(line))
        elif open_table:
            open_table = False
    return tables


def table(name: str, section: str = "", rows: str = "", columns: str = "") -> str:
    """A table of a results page as Markdown, cut to rows and columns."""
    tables = sections((RESULTS / f"{name}.md").read_text(encoding="utf-8"))
    head, *body = tables[list(tables)[_found(section, list(tables), "section")] if section else next(iter(tables))]
    if rows:
        names = [line[0] for line in body]
        body = [body[_found(row.strip(), names, "rows")] for row in rows.split(";")]
    places, titles = list(range(len(head))), list(head)
    if columns:
        asked = [part.split(" = ") for part in columns.split(";")]
        places = [0] + [_found(part[0].strip(), head[1:], "columns") + 1 for part in asked]
        titles = [head[0], *(part[-1].strip() for part in asked)]
    lines = [[line[place] for place in places] for line in body]
    rule = ["---", *("--:" if _is_numeric(column) else "---" for column in list(zip(*lines, strict=True))[1:])]
    lines = [titles, rule, *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def provenance(name: str) -> str:
    """Where a table is from, and when it was measured."""
    text = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    dates = sorted(re.findall(r"^(\d{4}-\d\d-\d\d);", text, re.MULTILINE))
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return f"`benchmarks/results/{name}.md`, measured {when}."


def number(expression: str) -> str:
    """One number of a results file; the module's docstring has the grammar."""
    expression, _, form = expression.partition(" as ")
    name, rest = expression.split(maxsplit=1)
    cells = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["cells"]
    factor = re.match(r"([\d.]+) \* ", rest)
    rest = rest[factor.end() :] if factor else rest
    add = rest.startswith("sum ")
    key, field = rest.removeprefix("sum ").strip().rsplit(".", 1)
    chosen = list(cells.values()) if key == "*" else [cells[key]]
    values = [cell[field] for cell in chosen]
    value = sum(values) if add else values[0]
    value = value * float(factor[1]) if factor else value
    return format(value, form.strip() or (",d" if isinstance(value, int) else ".3g"))


class Results(SphinxDirective):
    """A table of a results page, with a line that says where it is from."""

    required_arguments = 1
    option_spec = dict.fromkeys(("section", "rows", "columns"), directives.unchanged)

    def run(self) -> list[nodes.Node]:
        """The table, parsed as Markdown."""
        name = self.arguments[0]
        self.env.note_dependency(str(RESULTS / f"{name}.md"))
        lines = [*table(name, **self.options).splitlines(), "", provenance(name)]
        box = nodes.container(classes=["results"])
        self.state.nested_parse(StringList(lines, source=f"{name}.md"), self.content_offset, box)
        return [box]


class Result(SphinxRole):
    """A number of a results file."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """The number as text."""
        self.env.note_dependency(str(RESULTS / f"{self.text.split()[0]}.json"))
        return [nodes.Text(number(self.text))], []


def setup(app: Sphinx) -> dict[str, object]:
    """The directive and the role."""
    app.add_directive("results", Results)
    app.add_role("result", Result())
    return {"parallel_read_safe": True, "version": "1"}
