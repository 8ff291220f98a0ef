"""Runs tasks on a pool of actors that hold the reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pipeline.actors import Work, run_on_actors
from pipeline.reference.actor import Job, ReferenceActor
from pipeline.reference.parts import Task

if TYPE_CHECKING:
    from cluster.preflight import ActorPlan

__all__ = ["run_pool"]

REMAINS = "what was complete stays: run again to continue"


class _Scoring(ReferenceActor):
    """A `ReferenceActor` whose tasks come as JSON."""

    def run(self, task: Any) -> dict[str, Any]:
        return super().run(Task(**{**task, "rows": tuple(task["rows"])}))


def run_pool(job: Job, tasks: Sequence[Task], actors: ActorPlan) -> Iterator[dict[str, Any]]:
    """Yield the results of `ReferenceActor.run` for every task, as they come; the actors end with the iterator.

    Ray must be running.

    Raises:
        UserError, RunFailed: as `run_on_actors`.
    """
    work = Work("scoring", f"lower {job.budget_key}, or ray.score.num_actors", REMAINS)
    keyed = {f"{task.part}:{task.start}": asdict(task) for task in tasks}
    yield from run_on_actors(_Scoring, job, keyed, actors, work)
