"""What the workers of a host agree on, so that all of them give the same turns."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from strategies.compat import collectives_begun

__all__ = ["WorkersDisagree", "WorkersOfHost"]

FOREVER = timedelta(days=365)
"""Timeout of waiting for commands: rank 0 may have none for as long as it likes."""


class WorkersDisagree(RuntimeError):
    """A turn ended otherwise on this worker than on others, so that collectives of other trials would mix.

    All trials go on from their last checkpoints, in new processes.
    """


class WorkersOfHost:
    """The processes of torch's default group, connected by a second one, over gloo.

    Collectives of trials never wait in it, and its own never mix with theirs.
    """

    def __init__(self) -> None:
        """Raise ValueError in one of several processes that aren't connected yet."""
        self.size, self.rank = 1, 0
        if dist.is_initialized():
            self.size, self.rank = dist.get_world_size(), dist.get_rank()
        elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("slots: connect the workers first (torch.distributed.init_process_group)")
        self._group = dist.new_group(backend="gloo", timeout=FOREVER) if self.size > 1 else None

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value, which must be picklable; what others pass is ignored."""
        if self._group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def check_equal(self, outcome: int, patience_s: float) -> None:
        """Check that a turn had the same outcome on all workers, and that they began as many collectives in it.

        Args:
            outcome: a number that stands for it.
            patience_s: how long to wait for others, which may wait in a collective that this worker will never begin.

        Raises:
            WorkersDisagree: if it had not, or they don't answer in time.
        """
        if self._group is None:
            return
        mine = torch.tensor([outcome, collectives_begun(dist.group.WORLD)])
        others = [torch.empty_like(mine) for _ in range(self.size)]
        work = dist.all_gather(others, mine, group=self._group, async_op=True)
        try:
            work.wait(timedelta(seconds=patience_s))
        except RuntimeError as error:
            raise WorkersDisagree(f"worker {self.rank}: others didn't end the turn within {patience_s:.0f} s") from error
        if any(not torch.equal(mine, other) for other in others):
            raise WorkersDisagree(
                f"worker {self.rank}: outcome and collectives of the turn were {[o.tolist() for o in others]}"
            )
