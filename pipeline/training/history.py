"""What happens to a run, kept in `run.json` for its page: attempts, failures, changes of size, stops."""

from __future__ import annotations

import contextlib
import socket
import textwrap
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pipeline.config.secrets import redact
from pipeline.errors import RunCancelled, RunStopped
from pipeline.patience import STORAGE_ERRORS

if TYPE_CHECKING:
    from cluster.preflight import WorkerPlan
    from pipeline.training.folder import RunFolder

__all__ = ["History"]

LONGEST = 1000
"""Characters of a reason that are kept."""


class History:
    """Events of a run, oldest first, each with its `time` in seconds since the epoch:

    began     a driver started workers: `host` it runs on, `workers` that were asked for, `sharding`
    training  an attempt trains: `step` it goes on from, `repeated` steps (None: not known), ranks of each of its `nodes`,
              `setup` and `notes` of the workers
    failure   workers failed after `step`: `rank`, `node`, `what` and `why` of each; `restart`, the number of the one that
              follows, or None
    ended     the driver's part is over after `step`: `how`, and `why` where something went wrong

    An event that can't be written waits for the next one: a run doesn't fail for them. While the context is open, its end is
    recorded by how it is left.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._known = folder.known()
        self._events: list[dict[str, Any]] = self._known.pop("events", [])
        self.step = 0
        """The last one that was heard of."""

    def begin(self, workers: WorkerPlan, sharding: str | None) -> None:
        """A driver starts workers, which divide the model by `sharding`."""
        asked = {"number": workers.num_workers, "least": workers.min_workers, "resources": workers.resources}
        self.add("began", host=socket.gethostname(), workers=asked, sharding=sharding)

    def add(self, event: str, **what: Any) -> None:
        """Record an event."""
        self._events.append({"event": event, "time": time.time(), **redact(what)})
        with contextlib.suppress(*STORAGE_ERRORS):
            self._folder.write_state({**self._known, "events": self._events})

    def __enter__(self) -> History:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        why = {} if error is None else {"why": textwrap.shorten(str(error), LONGEST, placeholder=" ...")}
        self.add("ended", step=self.step, how=_how(error), **why)


def _how(error: BaseException | None) -> str:
    if error is None:
        return "finished"
    if isinstance(error, RunStopped | RunCancelled):
        return "stopped"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
