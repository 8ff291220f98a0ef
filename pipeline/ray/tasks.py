"""Tasks on Ray Data or in this process; their errors reach the caller with their messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from cluster.ray_compat import without_deprecation
from pipeline.errors import RunFailed, UserError
from pipeline.io.storage import reason
from pipeline.ray.memory import out_of_memory

__all__ = ["Executor", "run_here", "run_on_ray", "write_error"]

TASK_RETRIES = 3
"""Retries after a task's process died. By Ray Data's default, a task that needs too much memory would be retried for ever."""
MEMORY_ADVICE = "lower dataset_num_proc, the tasks at once, or take nodes with more memory for each CPU"

Work = Callable[[Any, int], Iterator[dict[str, Any]]]


class Executor(Protocol):
    """Runs `work(job, index)` for every index below `number`, at most `num_proc` at once; yields results as they complete.

    Raises:
        UserError, OSError: the first that a task raised.
    """

    def __call__(self, work: Work, job: Any, number: int, num_proc: int | None = None) -> Iterator[dict[str, Any]]: ...


def run_here(work: Work, job: Any, number: int, num_proc: int | None = None) -> Iterator[dict[str, Any]]:
    """Run tasks one after the other in this process, without Ray; an `Executor`."""
    for index in range(number):
        yield from work(job, index)


def run_on_ray(work: Work, job: Any, number: int, num_proc: int | None = None) -> Iterator[dict[str, Any]]:
    """Run one Ray Data task per index; an `Executor`. Ray must be running; a task's OSError is raised as a UserError.

    Raises:
        RunFailed: when a task's process died in every retry.
    """
    import ray
    import ray.data
    from ray.exceptions import RayError

    if not number:
        return
    reference = ray.put(job)

    def task(row: dict[str, Any]) -> Iterator[dict[str, str]]:
        # an error is returned as a result: raised in a task, it would reach the driver as Ray's traceback, after retries
        try:
            for result in work(_fetched(reference), row["index"]):
                yield {"result": json.dumps(result)}
        except UserError as error:
            yield {"result": json.dumps({"error": str(error)})}
        except OSError as error:
            yield {"result": json.dumps({"error": write_error(error)})}

    # One block per index: Ray Data runs a task per block.
    dataset = ray.data.from_items([{"index": index} for index in range(number)], override_num_blocks=number)
    dataset.context.enable_progress_bars = False
    compute = ray.data.TaskPoolStrategy(size=num_proc) if num_proc else None
    try:
        with without_deprecation():
            mapped = dataset.flat_map(task, compute=compute, max_retries=TASK_RETRIES)
        for row in mapped.iter_rows():
            result = json.loads(row["result"])
            if "error" in result:
                raise UserError(result["error"])
            yield result
    except RayError as error:
        memory = out_of_memory(str(error))
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        why = f"{memory}; {MEMORY_ADVICE}" if memory else f"a process died {TASK_RETRIES + 1} times: {reason}"
        raise RunFailed(f"preparing the data failed: {why} (what was complete stays: run again to continue)") from error


_JOBS: dict[Any, Any] = {}


def _fetched(reference: Any) -> Any:
    """Return the job, unpickled once per worker process (a tokenizer may take a second); only the last one is cached."""
    import ray

    if reference not in _JOBS:
        _JOBS.clear()
        _JOBS[reference] = ray.get(reference)
    return _JOBS[reference]


def write_error(error: OSError, location: str | None = None) -> str:
    """Return the message for a file that could not be written."""
    import errno

    path = location or error.filename or "the prepared folder"
    if error.errno == errno.ENOSPC:
        return (
            f"dataset_prepared_path: no space left on the disk of {path}; what was complete stays, so free some and run again"
        )
    if "ACCESS_DENIED" in str(error):
        return f"dataset_prepared_path: {path} can't be written: {reason(error)}; only what is complete there can be used"
    if not error.errno:  # of an object store
        return f"dataset_prepared_path: {path} can't be reached: {reason(error)}; what was complete stays, so run again"
    return f"dataset_prepared_path: cannot write {path}: {reason(error)}"
