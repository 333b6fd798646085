"""Every optimizer on streams: one pass, one example at a time, each predicted before the update.

LoKO's Tables 1 to 3 on networks and data sets that run here. Rows are the files of ``bench/optimizers``, data sets
those of ``bench/problems``. All rows share starts, streams and the number of settings that they may try. A stopped run
continues. Data and weights: ../shared/data and ../shared/weights, or $BAYES_KF_DATA and $BAYES_KF_WEIGHTS.

    python -m benchmarks.bench.run_online                                    # everything
    python -m benchmarks.bench.run_online --problems usps --rows default adamw loko_lora
    python -m benchmarks.bench.run_online --problems uci --limit 100         # needs no data; a file of its own
    python -m benchmarks.bench.run_online --problems cifar10 --backbone vit_b_16    # downloads DINO's weights
    python -m benchmarks.bench.run_online --table                            # table, figure and CSV of existing results
"""

from __future__ import annotations

from benchmarks.bench import online
from benchmarks.bench.command import main
from benchmarks.bench.tables.figures import draw_online
from benchmarks.bench.tables.online_table import render

if __name__ == "__main__":
    main(online, "One bench: online", __doc__, render, draw_online)
