"""The filter on several processes of torch.distributed."""

from bayes_kf.distributed.group import Group, OtherProcessError
from bayes_kf.distributed.sharded import ShardedFilter

__all__ = ["Group", "OtherProcessError", "ShardedFilter"]
