"""Every optimizer on streams: one example at a time, predicted first and learned from afterwards, once.

LoKO's Tables 1 to 3 on what can be run here. Rows are the files of ``bench/optimizers``, data sets those of
``bench/problems``; all share starts, streams and the number of settings that they may try. A stopped run goes on where
it was. Data and weights: ../shared/data and ../shared/weights, or $BAYES_KF_DATA and $BAYES_KF_WEIGHTS.

    python -m benchmarks.bench.run_online                                    # everything
    python -m benchmarks.bench.run_online --problems usps --rows default adamw loko_lora
    python -m benchmarks.bench.run_online --problems uci --limit 100         # needs no data; a file of its own name
    python -m benchmarks.bench.run_online --problems cifar10 --backbone vit_b_16    # downloads DINO's weights
    python -m benchmarks.bench.run_online --table                            # table, figure and CSV from what is there
"""

from __future__ import annotations

from benchmarks.bench import online
from benchmarks.bench.command import main
from benchmarks.bench.tables.figures import draw_online
from benchmarks.bench.tables.online_table import render

if __name__ == "__main__":
    main(online, "One bench: online", __doc__, render, draw_online)
