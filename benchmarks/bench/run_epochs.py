"""Every optimizer over several epochs: training and test loss, and the gradient's norm along the path.

GRNG's comparison on networks and data sets that run here. Rows, data sets and rules are those of ``run_online.py``.

    python -m benchmarks.bench.run_epochs                                # everything
    python -m benchmarks.bench.run_epochs --problems mnist_lenet --rows adamw kfac ring
    python -m benchmarks.bench.run_epochs --problems uci --limit 100     # needs no data; a file of its own
    python -m benchmarks.bench.run_epochs --table                        # table, figure and CSV of existing results
"""

from __future__ import annotations

from benchmarks.bench import epochs
from benchmarks.bench.command import main
from benchmarks.bench.tables.epochs_table import render
from benchmarks.bench.tables.figures import draw_epochs

if __name__ == "__main__":
    main(epochs, "One bench: several epochs", __doc__, render, draw_epochs)
