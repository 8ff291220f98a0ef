"""Runs tasks on a pool of actors that hold the reference."""

from __future__ import annotations

import json
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pipeline.data.engine import write_error
from pipeline.errors import RunFailed, UserError
from pipeline.reference.actor import Job, ReferenceActor
from pipeline.reference.parts import Task

if TYPE_CHECKING:
    from cluster.preflight import ActorPlan

__all__ = ["run_pool"]

RESTARTS = 3
"""Deaths of an actor that are made up for. By Ray's default, any number, a model too large for memory would never end."""
REMAINS = "what was complete stays: run again to continue"


class _Actor(ReferenceActor):
    """A `ReferenceActor` as Ray Data calls it: errors travel as results, as in `pipeline.data.engine`."""

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        try:
            result = self.run(_task(json.loads(row["task"])))
        except UserError as error:
            result = {"error": str(error)}
        except OSError as error:
            result = {"error": write_error(error)}
        except Exception as error:  # noqa: BLE001 - through Ray it would come home as pages of tracebacks
            traceback.print_exc()  # which --debug shows
            result = {"failed": f"{type(error).__name__}: {error}"}
        return {"result": json.dumps(result)}


def run_pool(job: Job, tasks: Sequence[Task], actors: ActorPlan) -> Iterator[dict[str, Any]]:
    """Yield the results of `ReferenceActor.run` for every task, as they come; the actors end with the iterator.

    Ray must be running.

    Raises:
        UserError: the first that an actor raised.
        RunFailed: when actors died more often than is made up for, or failed with nothing that the user could mend.
    """
    from ray.exceptions import RayError

    left = {(task.part, task.start): task for task in tasks}
    for deaths in range(RESTARTS + 1):
        try:
            for result in _run_once(job, list(left.values()), actors):
                del left[result["part"], result["start"]]
                yield result
            return
        except RayError as error:
            if deaths == RESTARTS:
                said = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise RunFailed(
                    f"scoring the reference failed: an actor died {deaths + 1} times, as a process does that runs out of "
                    f"memory; lower {job.budget_key}, or ray.score.num_actors ({REMAINS}). Ray says: {said}"
                ) from error


def _task(fields: dict[str, Any]) -> Task:
    return Task(**{**fields, "rows": tuple(fields["rows"])})


def _run_once(job: Job, tasks: Sequence[Task], actors: ActorPlan) -> Iterator[dict[str, Any]]:
    import ray.data

    resources = {name: amount for name, amount in actors.resources.items() if name not in ("CPU", "GPU", "memory")}
    dataset = ray.data.from_items([{"task": json.dumps(asdict(task))} for task in tasks], override_num_blocks=len(tasks))
    dataset.context.enable_progress_bars = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray gives these two arguments no other name yet
        results = dataset.map(
            _Actor,
            fn_constructor_kwargs={"job": job},
            compute=ray.data.ActorPoolStrategy(size=actors.num_actors),
            num_cpus=actors.resources["CPU"],
            num_gpus=actors.resources.get("GPU") or None,
            memory=actors.resources.get("memory"),
            resources=resources or None,
            max_restarts=0,
            max_task_retries=0,
        )
    # Without prefetching: a result that waits for the next one would be a finished task that nobody knows of.
    batches = results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    with closing(iter(batches)) as iterator:
        for batch in iterator:
            for text in batch["result"].to_pylist():
                result = json.loads(text)
                if "error" in result:
                    raise UserError(result["error"])
                if "failed" in result:
                    raise RunFailed(f"scoring the reference failed: {result['failed']} ({REMAINS})")
                yield result
