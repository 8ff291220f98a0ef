"""Tables of a cluster's jobs."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from pipeline.secrets import redact_text
from pipeline.ui.console import lines_of, table_of

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

__all__ = ["job_lines", "jobs_table"]


def jobs_table(jobs: list[JobDetails], address: str) -> RenderableType:
    """Return a table with a row for each job."""
    if not jobs:
        return Text(f"no jobs at {address}")
    columns = ("job", "status", "command", "recipe", "revision", "started", "took")
    return table_of(columns, map(_row, jobs), title=f"jobs at {address}", left=columns, whole=("job", "status"))


def _row(job: JobDetails) -> tuple[str, ...]:
    facts = job.metadata or {}
    started = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.start_time / 1000)) if job.start_time else ""
    words = (facts.get("command") or redact_text(job.entrypoint), facts.get("recipe", ""), facts.get("git_revision", ""))
    return (job.submission_id or "", job.status.value.lower(), *words, started, _took(job))


def job_lines(job: JobDetails) -> Text:
    """Return the details of a job; of its environment variables only the names."""
    return lines_of(
        {
            "job": job.submission_id,
            "status": job.status.value.lower(),
            "message": redact_text(next(reversed((job.message or "").strip().splitlines()), "")),
            "exit status": job.driver_exit_code,
            "entrypoint": redact_text(job.entrypoint),
            "took": _took(job),
            **{f"{name.replace('_', ' ')} ": redact_text(value) for name, value in (job.metadata or {}).items()},
            "variables": ", ".join(sorted((job.runtime_env or {}).get("env_vars") or {})),
        }
    )


def _took(job: JobDetails) -> str:
    if not job.start_time:
        return ""
    end = job.end_time / 1000 if job.end_time else time.time()
    return str(timedelta(seconds=round(end - job.start_time / 1000)))
