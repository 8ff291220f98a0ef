"""Jobs from Python: submitted, followed, stopped by an object that stands for one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.addresses import find_exposure, job_server
from cluster.jobs import JobServer
from pipeline.jobs.following import follow_job, stop_job
from pipeline.jobs.submission import Command, Submission, plan_job
from pipeline.jobs.submission import submit as submit_planned
from pipeline.notebook import default_display, html_of

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

__all__ = ["Job", "submit"]


class Job:
    """A job on a cluster.

    Args:
        name: its id.
        address: of the cluster's dashboard, http://HEAD:8265; as `prefray jobs` finds it when None.

    Raises:
        ValueError: when no job server answers there, or it has no such job.
    """

    def __init__(self, name: str, address: str | None = None) -> None:
        self.name = name
        self._server = JobServer(job_server(address))
        self.details()

    def details(self) -> JobDetails:
        """How it stands, as Ray describes it."""
        return self._server.info(self.name)

    @property
    def status(self) -> str:
        """`pending`, `running`, `succeeded`, `failed` or `stopped`."""
        return self.details().status.value.lower()

    @property
    def output_dir(self) -> str:
        """Where its run goes, as the nodes name it; empty for a job without a recipe."""
        return (self.details().metadata or {}).get("output_dir", "")

    def logs(self) -> str:
        """What its driver has printed so far."""
        return self._server.logs(self.name)

    def follow(self) -> None:
        """Print its log until it has ended.

        Raises:
            JobEnded: when it didn't end well.
        """
        follow_job(self._server, self.name)

    def stop(self) -> str:
        """End it; a run saves a checkpoint first. Returns how it ended, in words."""
        return stop_job(self._server, self.name)

    def _repr_html_(self) -> str:
        from pipeline.jobs.tables import print_job

        return html_of(lambda console: print_job(self.details(), console))


def submit(
    command: Command,
    recipe: str | None,
    address: str | None = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
    working_dir: str | Path = ".",
    env: Sequence[str] = (),
    shared: Sequence[str | Path] = (),
    name: str | None = None,
) -> Job:
    """Run a command on a cluster as a job, as `prefray submit` does; a notebook shows what a person should know of it.

    Args:
        command: train, tune, prepare, score, or doctor, whose recipe may be None.
        recipe: its path in `working_dir`.
        address: of the cluster's dashboard.
        overrides: `key=value`, of the recipe.
        resume: continue the run or sweep that output_dir holds.
        working_dir: what the job brings.
        env: variables for the job, NAME from here or NAME=VALUE.
        shared: folders that the nodes have at the same paths.
        name: id of the job; made from the recipe's name when None.

    Raises:
        UserError: for a recipe that is wrong, or names what the job won't find; ValueError for an address without a cluster.
    """
    given = Submission(
        command,
        recipe,
        tuple(overrides),
        ("--resume",) if resume else (),
        Path(working_dir),
        tuple(env),
        tuple(Path(folder) for folder in shared),
        name,
    )
    where = job_server(address)
    planned, server, display = plan_job(given), JobServer(where), default_display()
    if (exposure := find_exposure(where)) is not None:
        display.note(f"warning: {exposure}")
    for note in planned.notes:
        display.note(note)
    return Job(submit_planned(planned, server), server.address)
