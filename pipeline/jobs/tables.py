"""Jobs of a cluster as a person reads them."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.config.secrets import redact_text

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

__all__ = ["print_job", "print_jobs"]


def print_jobs(jobs: list[JobDetails], address: str, console: Console | None = None) -> None:
    """Print a line for each job."""
    console = console or Console()
    if not jobs:
        console.print(f"no jobs at {address}")
        return
    if not console.is_terminal:
        console = Console(width=max(console.width, 160), file=console.file)
    table = Table(title=f"jobs at {address}")
    for name in ("job", "status", "command", "recipe", "revision", "started", "took"):
        table.add_column(name, no_wrap=name in ("job", "status"))
    for job in jobs:
        facts = job.metadata or {}
        command = facts.get("command") or redact_text(job.entrypoint)
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.start_time / 1000)) if job.start_time else ""
        words = (command, facts.get("recipe", ""), facts.get("git_revision", ""), started, _took(job))
        cells = (job.submission_id or "", job.status.value.lower(), *words)
        table.add_row(*(Text(str(cell)) for cell in cells))
    console.print(table)


def print_job(job: JobDetails, console: Console | None = None) -> None:
    """Print what is known of a job; of its environment only the names of variables."""
    console = console or Console()
    rows = {
        "job": job.submission_id,
        "status": job.status.value.lower(),
        "message": redact_text(next(reversed((job.message or "").strip().splitlines()), "")),
        "exit status": "" if job.driver_exit_code is None else str(job.driver_exit_code),
        "entrypoint": redact_text(job.entrypoint),
        "took": _took(job),
        **{f"{name.replace('_', ' ')} ": redact_text(value) for name, value in (job.metadata or {}).items()},
        "variables": ", ".join(sorted((job.runtime_env or {}).get("env_vars") or {})),
    }
    width = max(len(name) for name, value in rows.items() if value) + 2
    for name, value in rows.items():
        if value:
            console.print(f"{name:<{width}}{value}", soft_wrap=True, highlight=False, markup=False)


def _took(job: JobDetails) -> str:
    if not job.start_time:
        return ""
    end = job.end_time / 1000 if job.end_time else time.time()
    return str(timedelta(seconds=round(end - job.start_time / 1000)))
