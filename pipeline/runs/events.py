"""Events of a run, stored in `run.json` for its page: attempts, failures, changes of size, stops."""

from __future__ import annotations

import contextlib
import socket
import textwrap
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pipeline.errors import RunCancelled, RunStopped
from pipeline.io.retry import STORAGE_ERRORS
from pipeline.secrets import redact

if TYPE_CHECKING:
    from cluster.placement import WorkerPlan
    from pipeline.runs.folder import RunFolder

__all__ = ["RunEvents"]

LONGEST = 1000
"""In characters, of a stored reason."""


class RunEvents:
    """Events of a run, oldest first, each with its `time` in seconds since the epoch:

    began     a driver started workers: its `host`, the requested `workers`, `sharding`
    training  an attempt trains: `step` of the checkpoint, `repeated` steps (None: not known), ranks on each of its `nodes`,
              `setup` and `notes` of the workers
    failure   workers failed after `step`: `rank`, `node`, `what` and `why` of each; `restart`, the number of the restart that
              follows, or None, or 0 where the failure doesn't count
    ended     the driver ended after `step`: `how`, and `why` in case of an error

    An event that can't be written is written with the next one: it doesn't fail the run. On exit, the context manager records
    `ended`.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._state = folder.known()
        self._events: list[dict[str, Any]] = self._state.pop("events", [])
        self.step = 0
        """The last reported step."""
        self.saved: str | None = self._state.get("saved")
        """Name of the last checkpoint that was shown and tracked, by this driver or a former one."""

    def started(self, workers: WorkerPlan, sharding: str | None) -> None:
        """Record that a driver starts workers, which shard the model by `sharding`."""
        requested = {"number": workers.num_workers, "least": workers.min_workers, "resources": workers.resources}
        self.add("began", host=socket.gethostname(), workers=requested, sharding=sharding)

    def add(self, event: str, **what: Any) -> None:
        """Record an event."""
        # Errors may quote a URI with a key, and others may read `run.json`.
        self._events.append({"event": event, "time": time.time(), **redact(what)})
        self._write()

    def note_saved(self, name: str) -> None:
        """Record that a checkpoint was shown and tracked, which the driver of a resumed run doesn't do again."""
        self.saved = name
        self._write()

    def _write(self) -> None:
        with contextlib.suppress(*STORAGE_ERRORS):
            self._folder.write_state({**self._state, "events": self._events, "saved": self.saved})

    def __enter__(self) -> RunEvents:
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
