"""The filter on several processes of torch.distributed, for beliefs that one process cannot hold.

``bayes_kf.fit`` and ``predict_loader`` share their work between the processes of a launcher by themselves; inside
:func:`alone` they do not. ``fit`` here makes one pass, with a loader of each process's own examples. ``ShardedFilter``
is exact and divides the belief among the processes; ``DataParallelFilter`` keeps the whole belief on each and sums two
vectors. ``merge_scores`` joins evaluations.
"""

from bayes_kf.distributed.data_parallel_filter import DataParallelFilter
from bayes_kf.distributed.distributed_fit import fit, merge_scores
from bayes_kf.distributed.sharded_filter import ShardedFilter
from bayes_kf.processes.launched import alone, together
from bayes_kf.processes.process_group import Group, OtherProcessError

__all__ = [
    "DataParallelFilter",
    "Group",
    "OtherProcessError",
    "ShardedFilter",
    "alone",
    "fit",
    "merge_scores",
    "together",
]
