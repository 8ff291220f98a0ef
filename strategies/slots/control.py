"""What the workers of a host agree on, so that all of them give the same turns."""

from __future__ import annotations

import itertools
import os
import pickle
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from strategies.compat import collectives_begun, store_of_processes

__all__ = ["WorkersDisagree", "WorkersOfHost"]

HOSTS = itertools.count()
"""Numbers of the hosts of this process: one after another must not read what that one left in the store."""
ASK_AGAIN = timedelta(minutes=10)
"""How long one request for commands lasts; rank 0 may have none for as long as it likes."""


class WorkersDisagree(RuntimeError):
    """A turn ended otherwise on this worker than on others, so that collectives of other trials would mix.

    All trials resume from their last checkpoints, in new processes.
    """


class WorkersOfHost:
    """The processes of torch's default group, which leave what they agree on in its store.

    Not by collectives: trials use those, and one that is never answered can't be given up: its process can't even exit.
    """

    def __init__(self) -> None:
        """Raise ValueError in one of several processes that aren't connected yet."""
        self.size, self.rank = 1, 0
        self._store: Any = None
        self._broadcasts = self._turns = 0
        if dist.is_initialized():
            self.size, self.rank = dist.get_world_size(), dist.get_rank()
        elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("slots: connect the workers first (torch.distributed.init_process_group)")
        if self.size > 1:
            self._store = dist.PrefixStore(f"slots-{next(HOSTS)}", store_of_processes())

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value, which must be picklable; what others pass is ignored.

        Between two calls there must be one of `check_equal`: rank 0 deletes the value before.
        """
        if self._store is None:
            return value
        self._broadcasts += 1
        key = f"value {self._broadcasts}"
        if self.rank == 0:
            self._store.delete_key(f"value {self._broadcasts - 1}")
            self._store.set(key, pickle.dumps(value))
            return value
        while not self._is_there(key, ASK_AGAIN):
            pass
        return pickle.loads(self._store.get(key))  # noqa: S301 - rank 0 of this run has written it

    def check_equal(self, outcome: int, patience_s: float) -> None:
        """Check that a turn had the same outcome on all workers, and that they began as many collectives in it.

        Args:
            outcome: a number that stands for it.
            patience_s: how long to wait for others, which may wait in a collective that this worker will never begin.

        Raises:
            WorkersDisagree: if it had not, or they don't answer in time.
        """
        if self._store is None:
            return
        self._turns += 1
        self._store.delete_key(f"turn {self._turns - 2} of {self.rank}")  # all have read it before their last turn
        self._store.set(f"turn {self._turns} of {self.rank}", f"{outcome} {collectives_begun(dist.group.WORLD)}")
        found = []
        for rank in range(self.size):
            key = f"turn {self._turns} of {rank}"
            if not self._is_there(key, timedelta(seconds=patience_s)):
                raise WorkersDisagree(f"worker {self.rank}: worker {rank} didn't end the turn within {patience_s:.0f} s")
            found.append(self._store.get(key).decode())
        if len(set(found)) > 1:
            raise WorkersDisagree(f"worker {self.rank}: outcome and collectives of the turn were {found} on the workers")

    def _is_there(self, key: str, patience: timedelta) -> bool:
        try:
            self._store.wait([key], patience)
        except dist.DistStoreError as error:
            if "imeout" not in str(error):
                raise
            return False
        return True
