"""The arguments of every command, each with an example that works as it stands."""

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

MODEL_HELP = "a Hugging Face model folder (image or text classification, safetensors), or digits-vit, the bundled one"
PREDICTIONS_HELP = "a .csv or .npz of predictions with their targets"
# The words that the library takes, written out so that --help need not import PyTorch; a test compares them.
STARTS = ("prior", "trained")
METHODS = ("linearized", "probit", "sampled", "mean")
RECALIBRATIONS = ("temperature", "vector", "isotonic")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
DATA_HELP = "image folder (PATH/CLASS/IMAGE), .npz with x and y, or .csv, .tsv, .jsonl with text and label"

EXAMPLES = {
    "demo": ("bayes-kf demo --quick --output demo-output",),
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
    "doctor": ("bayes-kf doctor",),
    "compare": (
        "bayes-kf compare one_pass=demo-output/posterior again=posterior --model digits-vit"
        " --data demo-output/heldout.npz --output compare.html",
        "bayes-kf compare ours=ours.npz theirs=theirs.csv --output compare.html",
    ),
}
"""The commands that ``--help`` shows; those on ``demo-output`` and ``posterior`` need what the ones above wrote."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as the commands do."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        nearest = self._nearest(message)
        print(
            f"bayes-kf: error: {message}{nearest}{' See' if nearest else '; see'} {self.prog} --help", file=sys.stderr
        )
        raise SystemExit(2)

    def _nearest(self, message: str) -> str:
        """What a misspelt option or choice may stand for; empty if nothing is near."""
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
    commands = parser.add_subparsers(dest="command", required=True, metavar="{demo,fit,evaluate,compare,doctor}")
    _demo(_command(commands, "demo", "learn handwritten digits online in four ways; print a table, write a report"))
    _fit(_command(commands, "fit", "give an adapter a posterior in one pass over labelled data"))
    _evaluate(_command(commands, "evaluate", "report on a saved posterior, or on anybody's predictions in a file"))
    _compare(_command(commands, "compare", "report on several posteriors or files of predictions side by side"))
    _command(commands, "doctor", "say what is installed here, and try whether it works")
    return parser


def _command(commands: argparse._SubParsersAction[Parser], name: str, text: str) -> Parser:
    """The parser of one command, with what all share."""
    lines = "\n".join(f"  {example}" for example in EXAMPLES[name])
    command = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"example{'s' if len(EXAMPLES[name]) > 1 else ''}:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "--seed", type=int, metavar="N", help="of every random choice (default: 0, or the configuration's)"
    )
    command.add_argument("--quiet", action="store_true", help="print errors only")
    return command


def _demo(parser: Parser) -> None:
    parser.add_argument("--output", type=Path, default=Path("demo-output"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="on a few of the images: seconds, not minutes")


def _fit(parser: Parser) -> None:
    _add_data(parser, batch_size=1)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the posterior goes")
    parser.add_argument("--in-order", action="store_true", help="keep the data's order; without it they are shuffled")
    parser.add_argument(
        "--start",
        choices=STARTS,
        default=STARTS[0],
        help="prior: learn from the present weights on; trained: keep them as the mean (default: %(default)s)",
    )
    adapter = parser.add_argument_group("adapter")
    which = adapter.add_mutually_exclusive_group()
    which.add_argument("--lora", type=Path, metavar="PATH", help="PEFT config, a JSON file or the folder of one")
    which.add_argument("--adapter", type=Path, metavar="PEFT_DIR", help="an adapter trained already, in safetensors")
    which.add_argument("--rank", type=int, default=4, metavar="N", help="of a new LoRA adapter (default: %(default)s)")
    adapter.add_argument(
        "--target-modules", nargs="+", metavar="NAME", help="what a new LoRA adapter adapts (default: queries, values)"
    )
    online = parser.add_argument_group("online")
    online.add_argument(
        "--online", action="store_true", help="learn JSON lines one by one as they come; --data may be - for a pipe"
    )
    online.add_argument("--classes", nargs="+", metavar="NAME", help="all that there will be, in order")
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
    online.add_argument("--skip-bad", action="store_true", help="go on after a line that is no labelled text")
    add_setting_flags(parser)


def _evaluate(parser: Parser) -> None:
    text = f"folder that fit or save_pretrained wrote, or {PREDICTIONS_HELP}"
    parser.add_argument("posterior", type=Path, metavar="POSTERIOR", help=text)
    _add_predicting(parser)
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="the page (default: %(default)s)")
    parser.add_argument(
        "--ood", action="append", default=[], type=_named_path, metavar="NAME=PATH", help="inputs to doubt; repeatable"
    )
    parser.add_argument("--ordered", action="store_true", help="the classes have an order: adds the RPS")
    parser.add_argument(
        "--show-examples",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="show the most uncertain and the most wrong examples (default: yes, where there are any)",
    )
    group = parser.add_argument_group("recalibration")
    group.add_argument(
        "--calibration", type=Path, metavar="PATH", help="labelled examples to fit on, not those of --data"
    )
    group.add_argument("--recalibrate", choices=RECALIBRATIONS, help="report what this would change")
    group.add_argument("--conformal", type=float, metavar="LEVEL", help="report on sets that cover this share")


def _compare(parser: Parser) -> None:
    text = f"a name, and a posterior's folder or {PREDICTIONS_HELP}; at least two"
    parser.add_argument("models", nargs="+", type=_named_path, metavar="NAME=PATH", help=text)
    _add_predicting(parser)
    parser.add_argument("--output", type=Path, default=Path("compare.html"), help="the page (default: %(default)s)")


def _add_predicting(parser: Parser) -> None:
    """What is asked of posteriors."""
    _add_data(parser, batch_size=64, required=False)
    parser.add_argument("--method", choices=METHODS, default=METHODS[0], help="of prediction (default: %(default)s)")
    parser.add_argument("--num-samples", type=int, default=64, metavar="N", help="draws (default: %(default)s)")
    parser.add_argument("--title", help="of the page")


def _add_data(parser: Parser, batch_size: int, required: bool = True) -> None:
    needed = "" if required else "; needed for posteriors"
    parser.add_argument("--model", required=required, help=f"{MODEL_HELP}{needed}")
    parser.add_argument("--data", type=Path, required=required, metavar="PATH", help=f"{DATA_HELP}{needed}")
    parser.add_argument("--batch-size", type=int, default=batch_size, metavar="N", help="default: %(default)s")
    parser.add_argument("--text-column", default="text", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--label-column", default="label", metavar="NAME", help="default: %(default)s")
    parser.add_argument(
        "--max-length", type=int, default=512, metavar="N", help="tokens of a text (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="a torch device (default: %(default)s)")
    text = "of the base model's weights, auto: as they were saved; beliefs are float32 at least (default: %(default)s)"
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help=text)


def _named_path(text: str) -> tuple[str, Path]:
    """Name and path of NAME=PATH."""
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"must be NAME=PATH, got {text!r}")
    return name, Path(path)
