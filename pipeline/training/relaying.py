"""From Ray Train's controller to the driver; light to import, for the controller's process waits for it."""

from __future__ import annotations

import textwrap
import time
from pathlib import Path
from typing import Any

import ray.exceptions
from ray.train import UserCallback

from pipeline.errors import UserError
from pipeline.training.ledger import merge
from strategies.errors import OutsideError

__all__ = ["Relay", "find_refusal"]


class Relay(UserCallback):
    """Runs in Ray's controller: passes records and failures on to the driver's queue, first of all the controller itself."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def __reduce__(self) -> Any:
        return _arrive, (self._queue,)

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Pass on rank 0's records, and what all ranks have trained on."""
        event = {"event": "report", "step": metrics[0]["step"], "records": metrics[0]["records"]}
        event["ledger"] = merge(rank["ledger"] for rank in metrics)
        if checkpoint is not None:
            event["checkpoint"] = Path(checkpoint.path).name
        if "resumed" in metrics[0]:
            event["resumed"] = metrics[0]["resumed"]
            event["repeated"] = metrics[0]["repeated"]
            event["notes"] = metrics[0]["notes"]
            event["skipped"] = metrics[0]["skipped"]
            event["setup"] = metrics[0]["setup"]
        self._queue.put(event)

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Pass on which workers failed and why.

        Raises:
            UserError: where a worker has refused its input, which a restart would bring to it again. Ray restarts workers
                after their own exceptions, not after one that is raised here.
        """
        if (refusal := find_refusal(worker_exceptions)) is not None:
            raise UserError(refusal)
        failures = {rank: _reason(error) for rank, error in worker_exceptions.items()}
        died = [rank for rank, error in worker_exceptions.items() if _is_death(error)]
        self._queue.put({"event": "failure", "failures": failures, "died": died, "time": time.time()})


def _arrive(queue: Any) -> Relay:
    """The relay in the process that it was sent to: Ray's controller, which nobody else knows, and later its workers."""
    actor = ray.get_runtime_context().current_actor
    if hasattr(actor, "abort"):
        queue.put({"event": "controller", "actor": actor})
    return Relay(queue)


def find_refusal(worker_exceptions: dict[int, Exception]) -> str | None:
    """What a worker said of input or of code from outside that it can't work with: a `ValueError`, or one of ours.

    Kinds of ValueError are something else: JSON or Arrow data that was cut off, which may be whole the next time.
    """
    kinds = (UserError, OutsideError)
    found = (error for error in worker_exceptions.values() if isinstance(error, kinds) or type(error) is ValueError)
    return next((str(error) for error in found), None)


def _is_death(error: Exception) -> bool:
    """Whether a worker's process is gone, as against an error that it raised."""
    return isinstance(getattr(error, "health_check_failure", None), ray.exceptions.RayActorError)


def _reason(error: Exception) -> str:
    """A worker's error in one line; of its death, what Ray has found last."""
    if _is_death(error):
        return str(error).strip().splitlines()[-1]
    return textwrap.shorten(f"{type(error).__name__}: {error}", 400, placeholder=" ...")
