"""Writes the table of costs in README.md from `benchmarks/results/speed.json`: `python docs/_ext/readme.py`."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
COLUMNS = {  # heading: cell of the results file
    "2-layer BERT, batch 1, 10 outputs": "bert-tiny/B1/m10/time",
    "batch 16, 10 outputs": "bert-tiny/B16/m10/time",
    "batch 16, 100 outputs": "bert-tiny/B16/m100/time",
    "RoBERTa-base, batch 1, 10 outputs": "roberta-base/B1/m10/time",
}
ROWS = {  # heading: method of the results file
    "AdamW": "adamw",
    "bayes_kf, `exact`": "exact",
    "bayes_kf, `truncated`": "truncated",
    "bayes_kf, `sampled`": "sampled",
    "IVON": "ivon",
    "posteriors, diagonal EKF": "posteriors",
    "laplace-torch, diagonal (fit only)": "laplace-diag",
    "laplace-torch, Kronecker (fit only)": "laplace-kron",
}
BLOCK = re.compile(r"(<!-- costs: .*? -->\n)(.*?)(<!-- end of costs -->)", re.DOTALL)


def _number(ratio: float | None) -> str:
    if ratio is None:
        return "–"
    return f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"


def costs() -> str:
    """The table, in steps of AdamW; a dash where a method was not run."""
    cells = json.loads((ROOT / "benchmarks" / "results" / "speed.json").read_text(encoding="utf-8"))["cells"]
    ratios = [cells[name]["ratio"] for name in COLUMNS.values()]
    lines = ["| " + " | ".join(["", *COLUMNS]) + " |", "| --- " + "| --: " * len(COLUMNS) + "|"]
    for heading, method in ROWS.items():
        numbers = [_number(ratio.get(method)) for ratio in ratios]
        lines.append("| " + " | ".join([heading, *numbers]) + " |")
    return "\n".join(lines) + "\n"


def written(text: str) -> str:
    """README.md with the present table in it."""
    text, count = BLOCK.subn(lambda match: f"{match[1]}\n{costs()}\n{match[3]}", text)
    if count != 1:
        raise ValueError(f"README.md needs one block of costs, got {count}")
    return text


if __name__ == "__main__":
    page = ROOT / "README.md"
    page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")
