"""Runs tasks, on Ray Data or in this process, and brings errors home as messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from pipeline.errors import RunFailed, UserError
from pipeline.memory import out_of_memory

__all__ = ["Executor", "run_here", "run_on_ray", "write_error"]

TASK_RETRIES = 3
"""Deaths of a task's process that are made up for. By Ray Data's own setting one that needs too much memory would never end."""
MEMORY_ADVICE = "lower dataset_num_proc, the tasks at once, or take nodes with more memory for each CPU"

Work = Callable[[Any, int], Iterator[dict[str, Any]]]


class Executor(Protocol):
    """Runs `work(job, index)` for every index below `number`, at most `num_proc` at once; yields their results as they come.

    Raises:
        UserError, OSError: the first that a task raised.
    """

    def __call__(self, work: Work, job: Any, number: int, num_proc: int | None = None) -> Iterator[dict[str, Any]]: ...


def run_here(work: Work, job: Any, number: int, num_proc: int | None = None) -> Iterator[dict[str, Any]]:
    """An `Executor` that runs one task after the other in this process, without Ray."""
    for index in range(number):
        yield from work(job, index)


def run_on_ray(work: Work, job: Any, number: int, num_proc: int | None = None) -> Iterator[dict[str, Any]]:
    """An `Executor` with one Ray Data task per index. Ray must be running; an OSError of a task comes home as a UserError.

    Raises:
        RunFailed: when a task's process died again and again.
    """
    import ray
    import ray.data
    from ray.exceptions import RayError

    if not number:
        return
    reference = ray.put(job)

    def task(row: dict[str, Any]) -> Iterator[dict[str, str]]:
        # an error travels as a result: raised in a task it would come home as a traceback of Ray's, after retries
        try:
            for result in work(_fetched(reference), row["index"]):
                yield {"result": json.dumps(result)}
        except UserError as error:
            yield {"result": json.dumps({"error": str(error)})}
        except OSError as error:
            yield {"result": json.dumps({"error": write_error(error)})}

    dataset = ray.data.from_items([{"index": index} for index in range(number)], override_num_blocks=number)
    dataset.context.enable_progress_bars = False
    compute = ray.data.TaskPoolStrategy(size=num_proc) if num_proc else None
    try:
        for row in dataset.flat_map(task, compute=compute, max_retries=TASK_RETRIES).iter_rows():
            result = json.loads(row["result"])
            if "error" in result:
                raise UserError(result["error"])
            yield result
    except RayError as error:
        memory = out_of_memory(str(error))
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        why = f"{memory}; {MEMORY_ADVICE}" if memory else f"a process died {TASK_RETRIES + 1} times: {said}"
        raise RunFailed(f"preparing the data failed: {why} (what was complete stays: run again to continue)") from error


_JOBS: dict[Any, Any] = {}


def _fetched(reference: Any) -> Any:
    """The job, unpacked once per worker process (a tokenizer may take a second); only the last one is kept."""
    import ray

    if reference not in _JOBS:
        _JOBS.clear()
        _JOBS[reference] = ray.get(reference)
    return _JOBS[reference]


def write_error(error: OSError, where: str | None = None) -> str:
    """The message for a file that could not be written."""
    import errno

    place = where or error.filename or "the prepared folder"
    if error.errno == errno.ENOSPC:
        return (
            f"dataset_prepared_path: no space left on the disk of {place}; what was complete stays, so free some and run again"
        )
    return f"dataset_prepared_path: cannot write {place}: {error.strerror or error}"
