"""Tasks on a pool of Ray Data actors that hold a model; errors come home as what they are."""

from __future__ import annotations

import json
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.data.engine import write_error
from pipeline.errors import RunFailed, UserError
from pipeline.memory import out_of_memory

if TYPE_CHECKING:
    from cluster.preflight import ActorPlan

__all__ = ["Runner", "Work", "run_on_actors"]

RESTARTS = 3
"""Deaths of an actor that are made up for. By Ray's default, any number, a model too large for memory would never end."""


class Runner(Protocol):
    """What an actor holds. It loads its model with the first task: an error of a constructor couldn't come home as a result."""

    def run(self, task: Any) -> dict[str, Any]:
        """Do a task; both task and result are what JSON can hold."""


@dataclass(frozen=True)
class Work:
    """What is done, in a message's words: `"scoring the reference"`; what helps against want of memory; what remains."""

    name: str
    remedy: str
    remains: str = ""

    def failed(self, why: str) -> RunFailed:
        """The error of a failure that isn't the user's to mend."""
        memory = out_of_memory(why)
        why = f"{memory}; {self.remedy}" if memory else why
        return RunFailed(f"{self.name} failed: {why}" + f" ({self.remains})" * bool(self.remains))


class _Actor:
    """A `Runner` as Ray Data calls it: errors travel as results, as in `pipeline.data.engine`."""

    def __init__(self, make: Callable[[Any], Runner], job: Any) -> None:
        self._runner = make(job)

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        try:
            result: dict[str, Any] = {"done": self._runner.run(json.loads(row["task"]))}
        except UserError as error:
            result = {"error": str(error)}
        except OSError as error:
            result = {"error": write_error(error)}
        except Exception as error:  # noqa: BLE001 - through Ray it would come home as pages of tracebacks
            traceback.print_exc()  # which --debug shows
            result = {"failed": f"{type(error).__name__}: {error}"}
        return {"key": row["key"], "result": json.dumps(result)}


def run_on_actors(
    make: Callable[[Any], Runner], job: Any, tasks: Mapping[str, Any], actors: ActorPlan, work: Work
) -> Iterator[dict[str, Any]]:
    """Yield the results of all tasks, as they come; the actors end with the iterator. Ray must be running.

    Args:
        make: makes an actor's runner of `job`.
        tasks: key -> task.

    Raises:
        UserError: the first that an actor raised.
        RunFailed: when actors died more often than is made up for, or failed with nothing that the user could mend.
    """
    from ray.exceptions import RayError

    left = dict(tasks)
    for deaths in range(RESTARTS + 1):
        try:
            for key, result in _run_once(make, job, left, actors, work):
                del left[key]
                yield result
            return
        except RayError as error:
            if deaths == RESTARTS:
                if out_of_memory(str(error)):
                    raise work.failed(str(error)) from error
                said = (str(error).strip().splitlines() or [type(error).__name__])[0]
                died = f"an actor died {deaths + 1} times, as a process does that runs out of memory"
                raise work.failed(f"{died}; {work.remedy}. Ray says: {said}") from error


def _run_once(
    make: Callable[[Any], Runner], job: Any, tasks: Mapping[str, Any], actors: ActorPlan, work: Work
) -> Iterator[tuple[str, dict[str, Any]]]:
    import ray.data

    resources = {name: amount for name, amount in actors.resources.items() if name not in ("CPU", "GPU", "memory")}
    items = [{"key": key, "task": json.dumps(task)} for key, task in tasks.items()]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    dataset.context.enable_progress_bars = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray gives these two arguments no other name yet
        results = dataset.map(
            _Actor,
            fn_constructor_kwargs={"make": make, "job": job},
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
            for key, text in zip(batch["key"].to_pylist(), batch["result"].to_pylist(), strict=True):
                result = json.loads(text)
                if "error" in result:
                    raise UserError(result["error"])
                if "failed" in result:
                    raise work.failed(result["failed"])
                yield key, result["done"]
