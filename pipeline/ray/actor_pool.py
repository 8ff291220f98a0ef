"""Tasks on a pool of Ray Data actors that hold a model; their errors reach the driver with their types."""

from __future__ import annotations

import json
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.errors import RunFailed, UserError
from pipeline.ray.memory import out_of_memory
from pipeline.ray.tasks import write_error

if TYPE_CHECKING:
    from cluster.placement import ActorPlan

__all__ = ["Runner", "StageInfo", "run_on_actors"]

RESTARTS = 3
"""Restarts after actors that died. By Ray's default there is no limit: a model too large for memory would never end."""


class Runner(Protocol):
    """The work of an actor. It loads its model with the first task: errors in a constructor can't be returned as results."""

    def run(self, task: Any) -> dict[str, Any]:
        """Run a task; both task and result must be JSON values."""


@dataclass(frozen=True)
class StageInfo:
    """Texts for a stage's errors."""

    name: str
    """Such as `"scoring the reference"`."""
    remedy: str
    """Advice against running out of memory."""
    remains: str = ""
    """What is left after a failure."""

    def failed(self, why: str) -> RunFailed:
        """Return the error of a failure that isn't the user's."""
        memory = out_of_memory(why)
        why = f"{memory}; {self.remedy}" if memory else why
        return RunFailed(f"{self.name} failed: {why}" + f" ({self.remains})" * bool(self.remains))


class _Actor:
    """A `Runner` as a callable class for Ray Data; it returns errors as results, as `pipeline.ray.tasks` does."""

    def __init__(self, make: Callable[[Any], Runner], job: Any) -> None:
        self._runner = make(job)

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        try:
            result: dict[str, Any] = {"done": self._runner.run(json.loads(row["task"]))}
        except UserError as error:
            result = {"error": str(error)}
        except OSError as error:
            result = {"error": write_error(error)}
        except Exception as error:  # noqa: BLE001 - Ray would raise it with pages of tracebacks
            traceback.print_exc()  # shown with --debug
            result = {"failed": f"{type(error).__name__}: {error}"}
        return {"key": row["key"], "result": json.dumps(result)}


def run_on_actors(
    make: Callable[[Any], Runner], job: Any, tasks: Mapping[str, Any], actors: ActorPlan, stage: StageInfo
) -> Iterator[dict[str, Any]]:
    """Yield the results of all tasks as they complete; the actors end with the iterator. Ray must be running.

    Args:
        make: makes an actor's runner from `job`.
        tasks: key -> task.

    Raises:
        UserError: the first that an actor raised.
        RunFailed: when actors died more than `RESTARTS` times, or failed with an error that isn't the user's.
    """
    from ray.exceptions import RayError

    remaining = dict(tasks)
    for deaths in range(RESTARTS + 1):
        try:
            for key, result in _run_once(make, job, remaining, actors, stage):
                # Before the result is yielded: after another actor's death it isn't computed again.
                del remaining[key]
                yield result
            return
        except RayError as error:
            if deaths == RESTARTS:
                if out_of_memory(str(error)):
                    raise stage.failed(str(error)) from error
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                died = f"an actor died {deaths + 1} times, as a process does that runs out of memory"
                raise stage.failed(f"{died}; {stage.remedy}. Ray says: {reason}") from error


def _run_once(
    make: Callable[[Any], Runner], job: Any, tasks: Mapping[str, Any], actors: ActorPlan, stage: StageInfo
) -> Iterator[tuple[str, dict[str, Any]]]:
    import ray.data

    # Ray takes these three as arguments of their own, and refuses CPU and GPU among `resources`.
    resources = {name: amount for name, amount in actors.resources.items() if name not in ("CPU", "GPU", "memory")}
    items = [{"key": key, "task": json.dumps(task)} for key, task in tasks.items()]
    # A block per task: Ray Data hands out blocks, and a result arrives once its block is complete.
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    dataset.context.enable_progress_bars = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray deprecates these two arguments without a replacement
        results = dataset.map(
            _Actor,
            fn_constructor_kwargs={"make": make, "job": job},
            compute=ray.data.ActorPoolStrategy(size=actors.num_actors),
            num_cpus=actors.resources["CPU"],
            num_gpus=actors.resources.get("GPU") or None,
            memory=actors.resources.get("memory"),
            resources=resources or None,
            # An actor's death ends this attempt; `run_on_actors` repeats it with the remaining tasks.
            max_restarts=0,
            max_task_retries=0,
        )
    # Without prefetching: a result that is held back would be lost, and its task repeated, after an actor's death.
    batches = results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    with closing(iter(batches)) as iterator:
        for batch in iterator:
            for key, text in zip(batch["key"].to_pylist(), batch["result"].to_pylist(), strict=True):
                result = json.loads(text)
                if "error" in result:
                    raise UserError(result["error"])
                if "failed" in result:
                    raise stage.failed(result["failed"])
                yield key, result["done"]
