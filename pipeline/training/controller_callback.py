"""Callback in Ray Train's controller that forwards events to the driver. Its imports are few: the controller waits for them."""

from __future__ import annotations

import textwrap
import time
from typing import Any

import ray.exceptions
from ray.train import UserCallback

from pipeline.errors import UserError
from pipeline.ray.channel import NodeChannel, Outbox
from pipeline.training.events import ControllerStarted, WorkersFailed, merged
from strategies.outside import OutsideError

__all__ = ["CHANNEL", "REPORT", "ForwardEvents", "find_user_error"]

CHANNEL = "channel"
"""Metric of Ray Train's reports that holds the channel of a run on a host."""
REPORT = "report"
"""Metric of Ray Train's reports that holds a worker's `StepReport`."""


class ForwardEvents(UserCallback):
    """Forwards reports and failures to the driver; runs in Ray Train's controller, which is on the driver's node.

    Args:
        channel: the driver's.
    """

    def __init__(self, channel: NodeChannel) -> None:
        self._channel = channel
        # It keeps what a full disk doesn't take: Ray would end the run for an error here.
        self._outbox = Outbox()

    def __reduce__(self) -> Any:
        # Ray calls no hook when its controller starts: unpickling is the first moment at which this code runs there.
        return _rebuild, (self._channel,)

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Forward rank 0's report with the rows of all ranks."""
        report = merged([rank[REPORT] for rank in metrics])
        self._outbox.send(metrics[0].get(CHANNEL) or self._channel, report)

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Forward which workers failed and why.

        Raises:
            UserError: where a worker has refused its input, since a restart wouldn't help. Ray restarts workers after their
                own exceptions, but not after one that is raised here.
        """
        if (refusal := find_user_error(worker_exceptions)) is not None:
            raise UserError(refusal)
        failures = {rank: _reason(error) for rank, error in worker_exceptions.items()}
        died = [rank for rank, error in worker_exceptions.items() if _is_death(error)]
        self._outbox.send(self._channel, WorkersFailed(failures, died, time.time()))


def _rebuild(channel: NodeChannel) -> ForwardEvents:
    """Rebuild the callback after unpickling; in Ray Train's controller, also send that actor to the driver."""
    # Ray Train's context, and this callback in it, is unpickled in every worker too: only its controller has `abort`.
    actor = ray.get_runtime_context().current_actor
    if hasattr(actor, "abort"):
        channel.put(ControllerStarted(actor))
    return ForwardEvents(channel)


def find_user_error(worker_exceptions: dict[int, Exception]) -> str | None:
    """Find the message of a worker that refuses its input, or code from outside: a `ValueError`, or one of ours.

    Subclasses of ValueError are other errors: truncated JSON or Arrow data, for example, which may be complete after a restart.
    """
    kinds = (UserError, OutsideError)
    errors = (error for error in worker_exceptions.values() if isinstance(error, kinds) or type(error) is ValueError)
    # Of a data loader's process torch passes on the traceback, in which the message is the end.
    return next((str(error).rpartition("\nValueError: ")[2] for error in errors), None)


def _is_death(error: Exception) -> bool:
    """Return whether a worker's process has died, rather than raised an error."""
    # Ray Train wraps what its poll of a worker raised; an error of the training function arrives unwrapped.
    return isinstance(getattr(error, "health_check_failure", None), ray.exceptions.RayActorError)


def _reason(error: Exception) -> str:
    """Format a worker's error in one line; of a death, the last line of Ray's report."""
    if _is_death(error):
        return str(error).strip().splitlines()[-1]
    return textwrap.shorten(f"{type(error).__name__}: {error}", 400, placeholder=" ...")
