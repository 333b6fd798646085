"""The arguments of every command."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import NoReturn

import shtab

from bayes_kf._version import __version__
from bayes_kf.cli.config_flags import add_setting_flags
from bayes_kf.validation import did_you_mean

MODEL_HELP = "Hugging Face model folder (image or text classification, safetensors), or digits-vit, the bundled model"
PREDICTIONS_HELP = "a .csv or .npz of predictions with their targets"
# The words that the library accepts, written out so that --help does not import PyTorch; a test compares them.
STARTS = ("prior", "trained")
METHODS = ("linearized", "probit", "sampled", "mean")
RECALIBRATIONS = ("temperature", "vector", "isotonic")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
DATA_HELP = "image folder (PATH/CLASS/IMAGE), .npz with x and y, or .csv, .tsv, .jsonl with text and label"

EXAMPLES = {
    "fit": (
        "bayes-kf fit --model digits-vit --data demo-output/stream.npz --rank 4 --output posterior",
        "bayes-kf fit --model bert-folder --data reviews.csv --lora lora.json --covariance low_rank --output reviews",
        "bayes-kf fit --model bert-folder --data reviews.csv --adapter peft-folder --start trained --output reviews",
        "bayes-kf fit --online --model bert-folder --data stream.jsonl --classes bad good --output stream",
    ),
    "evaluate": (
        "bayes-kf evaluate demo-output/posterior --model digits-vit --data demo-output/heldout.npz"
        " --ood corrupted=demo-output/corrupted.npz --output report.html",
        "bayes-kf evaluate predictions.csv --output report.html",
    ),
    "compare": (
        "bayes-kf compare one_pass=demo-output/posterior again=posterior --model digits-vit"
        " --data demo-output/heldout.npz --output compare.html",
        "bayes-kf compare ours=ours.npz theirs=theirs.csv --output compare.html",
    ),
}
"""The commands that ``--help`` shows. ``scripts/demo`` writes ``demo-output``; ``posterior`` is from the first."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like those of the commands."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        nearest = self._nearest(message)
        print(
            f"bayes-kf: error: {message}{nearest}{' See' if nearest else '; see'} {self.prog} --help", file=sys.stderr
        )
        raise SystemExit(2)

    def _nearest(self, message: str) -> str:
        """The known option or choice nearest to a misspelt one; empty if none is near."""
        unknown = re.match(r"unrecognized arguments: (?:.*? )?(--[^ =]+)", message)
        if unknown:  # reported by the parser of all commands
            nested = (action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction))
            parsers = [self, *(parser for choices in nested for parser in choices.values())]
            return did_you_mean(unknown[1], [option for parser in parsers for option in parser._option_string_actions])
        choice = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        return did_you_mean(choice[1], re.split(r"[', ]+", choice[2].strip("'"))) if choice else ""


def build_parser() -> Parser:
    """The parser of ``bayes-kf``."""
    parser = Parser(prog="bayes-kf", description="Fine-tuned adapters with honest uncertainty.")
    parser.add_argument("--version", action="version", version=f"bayes-kf {__version__}")
    shtab.add_argument_to(parser, "--print-completion", help="print a completion script for this shell and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{fit,evaluate,compare}")
    _fit(_command(commands, "fit", "fit a posterior over an adapter to labelled data"))
    _evaluate(_command(commands, "evaluate", "write a report on a saved posterior, or on a file of predictions"))
    _compare(_command(commands, "compare", "write a report that compares several posteriors or files of predictions"))
    return parser


def _command(commands: argparse._SubParsersAction[Parser], name: str, text: str) -> Parser:
    """The parser of one command, with the arguments that all commands share."""
    lines = "\n".join(f"  {example}" for example in EXAMPLES[name])
    command = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"example{'s' if len(EXAMPLES[name]) > 1 else ''}:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "--seed", type=int, metavar="N", help="seed of every random choice (default: that of the configuration, or 0)"
    )
    command.add_argument("--quiet", action="store_true", help="print errors only")
    return command


def _fit(parser: Parser) -> None:
    _add_data(parser, batch_size=1)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the posterior")
    parser.add_argument(
        "--in-order",
        action="store_true",
        help="keep the order of the data (default: shuffle; a mixture, the fit without settings, always shuffles)",
    )
    parser.add_argument(
        "--start",
        choices=STARTS,
        default=STARTS[0],
        help="prior: start from the current weights; trained: keep them as the mean (default: %(default)s)",
    )
    parser.add_argument(
        "--members",
        type=int,
        metavar="N",
        help="posteriors in the mixture of a fit without settings (default: 2; one for numbers)",
    )
    adapter = parser.add_argument_group("adapter")
    which = adapter.add_mutually_exclusive_group()
    which.add_argument("--lora", type=Path, metavar="PATH", help="PEFT config of a new adapter: JSON or its folder")
    which.add_argument("--adapter", type=Path, metavar="PEFT_DIR", help="folder of a trained adapter, in safetensors")
    which.add_argument("--rank", type=int, default=4, metavar="N", help="rank of a new LoRA (default: %(default)s)")
    adapter.add_argument(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        help="modules of a new LoRA adapter (default: queries and values)",
    )
    online = parser.add_argument_group("online")
    online.add_argument(
        "--online", action="store_true", help="learn JSON lines one at a time; --data - reads standard input"
    )
    online.add_argument("--classes", nargs="+", metavar="NAME", help="all classes of the stream, in order")
    online.add_argument(
        "--checkpoint-every",
        type=int,
        default=1000,
        metavar="N",
        help="lines between checkpoints (default: %(default)s)",
    )
    online.add_argument(
        "--alarm",
        type=float,
        default=10_000.0,
        metavar="N",
        help="least mean number of examples between false drift alarms (default: %(default)s)",
    )
    online.add_argument("--skip-bad", action="store_true", help="skip lines that hold no labelled text")
    add_setting_flags(parser)


def _evaluate(parser: Parser) -> None:
    text = f"folder that fit or save_pretrained wrote, or {PREDICTIONS_HELP}"
    parser.add_argument("posterior", type=Path, metavar="POSTERIOR", help=text)
    _add_predicting(parser)
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="the page (default: %(default)s)")
    parser.add_argument(
        "--ood",
        action="append",
        default=[],
        type=_named_path,
        metavar="NAME=PATH",
        help="out-of-distribution data",
    )
    parser.add_argument(
        "--ordered", action="store_true", help="the classes have an order: report scores of such classes"
    )
    parser.add_argument(
        "--show-examples",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="show the most uncertain examples and the worst errors (default: yes)",
    )
    group = parser.add_argument_group("recalibration")
    group.add_argument("--calibration", type=Path, metavar="PATH", help="held-out labelled examples, other than --data")
    group.add_argument("--recalibrate", choices=RECALIBRATIONS, help="report on predictions after this recalibration")
    group.add_argument("--conformal", type=float, metavar="LEVEL", help="report on conformal sets with this coverage")


def _compare(parser: Parser) -> None:
    text = f"a name, and a posterior's folder or {PREDICTIONS_HELP}; at least two"
    parser.add_argument("models", nargs="+", type=_named_path, metavar="NAME=PATH", help=text)
    _add_predicting(parser)
    parser.add_argument("--output", type=Path, default=Path("compare.html"), help="the page (default: %(default)s)")


def _add_predicting(parser: Parser) -> None:
    """Arguments of commands that predict."""
    _add_data(parser, batch_size=64, required=False)
    parser.add_argument(
        "--method", choices=METHODS, default=METHODS[0], help="predictive distribution (default: %(default)s)"
    )
    parser.add_argument(
        "--num-samples", type=int, default=64, metavar="N", help="posterior draws (default: %(default)s)"
    )
    parser.add_argument("--title", help="title of the page")


def _add_data(parser: Parser, batch_size: int, required: bool = True) -> None:
    needed = "" if required else "; needed for posteriors"
    parser.add_argument("--model", required=required, help=f"{MODEL_HELP}{needed}")
    parser.add_argument("--data", type=Path, required=required, metavar="PATH", help=f"{DATA_HELP}{needed}")
    parser.add_argument(
        "--batch-size", type=int, default=batch_size, metavar="N", help="examples per batch (default: %(default)s)"
    )
    parser.add_argument("--text-column", default="text", metavar="NAME", help="column of texts (default: %(default)s)")
    parser.add_argument(
        "--label-column", default="label", metavar="NAME", help="column of labels (default: %(default)s)"
    )
    parser.add_argument(
        "--max-length", type=int, default=512, metavar="N", help="most tokens of a text (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="a torch device (default: %(default)s)")
    text = "dtype of the base model; auto: as saved. The posterior is at least float32 (default: %(default)s)"
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help=text)


def _named_path(text: str) -> tuple[str, Path]:
    """Name and path of NAME=PATH."""
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"must be NAME=PATH, got {text!r}")
    return name, Path(path)
