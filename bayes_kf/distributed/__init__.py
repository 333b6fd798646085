"""The filter on several processes of torch.distributed.

``fit`` makes one pass over a loader. ``ShardedFilter`` is exact and divides the belief among the processes;
``DataParallelFilter`` keeps the whole belief on each and sums two vectors. ``merge_scores`` joins evaluations.
"""

from bayes_kf.distributed.data_parallel_filter import DataParallelFilter
from bayes_kf.distributed.distributed_fit import fit, merge_scores
from bayes_kf.distributed.process_group import Group, OtherProcessError
from bayes_kf.distributed.sharded_filter import ShardedFilter

__all__ = ["DataParallelFilter", "Group", "OtherProcessError", "ShardedFilter", "fit", "merge_scores"]
