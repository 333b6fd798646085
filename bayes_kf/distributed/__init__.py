"""The filter on several processes of torch.distributed.

``fit`` is a pass over a loader; ``ShardedFilter`` is exact and divides the belief, ``DataParallelFilter`` sums two
vectors; ``merge_scores`` evaluates together.
"""

from bayes_kf.distributed.data_parallel import DataParallelFilter
from bayes_kf.distributed.fitting import fit, merge_scores
from bayes_kf.distributed.process_group import Group, OtherProcessError
from bayes_kf.distributed.sharded import ShardedFilter

__all__ = ["DataParallelFilter", "Group", "OtherProcessError", "ShardedFilter", "fit", "merge_scores"]
