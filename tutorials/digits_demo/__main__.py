"""The demo: ``python -m tutorials.digits_demo --quick``, from the root of the repository."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from bayes_kf.models.zoo import quiet_transformers
from tutorials import digits_demo
from tutorials.digits_demo import FULL, QUICK, RANK, caption, markdown_table, run_demo


def main() -> None:
    """Run the demo, print its table and write its files."""
    parser = argparse.ArgumentParser(prog="digits_demo", description=digits_demo.__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="use few images; takes seconds instead of minutes")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of every random choice (default: %(default)s)"
    )
    args = parser.parse_args()
    size = QUICK if args.quick else FULL
    with warnings.catch_warnings(), quiet_transformers():
        warnings.simplefilter("ignore", FutureWarning)  # libraries address them to their callers, not to users
        try:
            rows = run_demo(args.output, size, seed=args.seed)
        except ValueError as error:
            parser.error(str(error))
    print(f"\n{markdown_table(rows)}\n\n{caption(rows, size, RANK, args.seed)}\n")
    print(f"Report on the last row: {args.output / 'report.html'}; pictures beside it: online.png, reliability.png")


if __name__ == "__main__":
    main()
