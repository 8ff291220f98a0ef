"""Commands for clusters: check one, submit jobs to it, follow and stop them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline.cli.execution import Debug, Overrides, Quiet, execute, load, print_result

if TYPE_CHECKING:
    from pipeline.jobs.job import Job

__all__ = ["doctor", "jobs", "submit"]

Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help="The cluster's dashboard, http://HEAD:8265; when not set RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or this machine's.",
    ),
]
WorkingDir = Annotated[Path, typer.Option("--working-dir", metavar="DIR", help="The folder that is uploaded: recipe and data.")]
Env = Annotated[
    list[str] | None,
    typer.Option("--env", metavar="NAME[=VALUE]", help="An environment variable for the job, from here or with its value."),
]
Shared = Annotated[
    list[Path] | None, typer.Option("--shared", metavar="DIR", help="A folder that the cluster's nodes have at the same path.")
]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="Id of a job, as `prefray jobs list` shows it.")]

jobs = typer.Typer(help="Jobs on a cluster: list, logs, status, stop.", no_args_is_help=True)


def submit(
    what: Annotated[Literal["train", "tune", "prepare", "score"], typer.Argument(metavar="COMMAND", help="What to run.")],
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE", help="A recipe: YAML, or the name of a packaged one.")],
    address: Address = None,
    overrides: Overrides = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show the log, and exit with the job's status.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run or sweep in output_dir.")] = False,
    working_dir: WorkingDir = Path(),
    env: Env = None,
    shared: Shared = None,
    name: Annotated[
        str | None, typer.Option("--id", metavar="JOB", help="Id of the job; derived from the recipe's name when not set.")
    ] = None,
    num_cpus: Annotated[float | None, typer.Option("--entrypoint-num-cpus", min=0, help="CPUs of the driver.")] = None,
    num_gpus: Annotated[float | None, typer.Option("--entrypoint-num-gpus", min=0, help="GPUs of the driver.")] = None,
    memory: Annotated[int | None, typer.Option("--entrypoint-memory", min=0, help="Memory of the driver, in bytes.")] = None,
    resources: Annotated[
        str | None, typer.Option("--entrypoint-resources", metavar="JSON", help="Other resources that the driver reserves.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Run COMMAND on a cluster as a job: `ray job submit --working-dir . -- python -m pipeline COMMAND RECIPE`, checked first.

    The driver runs on the head unless it reserves resources. Environment variables aren't sent unless named by --env.
    """
    flags = (*(["--resume"] if resume else []), *(["--debug"] if debug else []))

    def command(display: Any) -> None:
        from pipeline.errors import UserError
        from pipeline.jobs.submission import Submission

        if len(recipes) > 1:
            several = f"ray job submit --working-dir {working_dir} -- python -m pipeline {what} {' '.join(recipes)}"
            advice = f"; a job that trains several is `{several}`" if what == "train" else ""
            raise UserError(f"RECIPE: {len(recipes)} were given, and a job is submitted for one{advice}")
        # A driver with reserved resources may be placed on any node; without any, Ray starts it on the head.
        reserved = {"CPU": num_cpus, "GPU": num_gpus, "memory": memory, **_resources(resources)}
        submission = Submission(
            what,
            recipes[0],
            tuple(overrides or ()),
            flags,
            working_dir,
            tuple(env or ()),
            tuple(shared or ()),
            name,
            # Zero is no reservation.
            {resource: amount for resource, amount in reserved.items() if amount},
        )
        _submit(submission, address, display, follow)

    execute(command, quiet=True, debug=debug)


def doctor(
    recipe: Annotated[str | None, typer.Argument(help="A recipe; without one only the cluster is checked.")] = None,
    overrides: Overrides = None,
    address: Address = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Also train two steps of the largest forwards, and show their peak memory.")
    ] = False,
    working_dir: WorkingDir = Path(),
    env: Env = None,
    shared: Shared = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check recipe, machine and cluster: versions, resources, storage, network, and the memory that a worker will take.

    Checks this machine, every node of the cluster of `ray.address` or RAY_ADDRESS, or with --address, as a job, those of that
    cluster. Loads no weights. Exits with status 1 when a check fails.
    """

    def command(display: Any) -> None:
        from pipeline.doctor.examination import examine
        from pipeline.errors import RunFailed

        # A job server can't be joined as a node: the examination runs there, as a job.
        if (server_address := address or _job_server_of_environment()) is not None:
            from pipeline.jobs.submission import Submission

            flags = tuple(["--measure"] if measure else [])
            submission = Submission(
                "doctor", recipe, tuple(overrides or ()), flags, working_dir, tuple(env or ()), tuple(shared or ())
            )
            return _submit(submission, server_address, display, follow=True)
        cfg = load(recipe, overrides) if recipe is not None else None
        display.stage("measuring memory" if measure else "looking")
        examination = examine(cfg, with_measurement=measure)
        # Before anything is printed on stdout: the live line would be drawn into it.
        display.close()
        print_result(examination, least=200)
        verdict = examination.verdict(cfg)
        if examination.failed:
            raise RunFailed(verdict)
        print(verdict)
        return None

    execute(command, quiet, debug)


@jobs.command("list")
def list_jobs(address: Address = None, debug: Debug = False) -> None:
    """List the jobs of a cluster, newest first."""

    def command(display: Any) -> None:
        from cluster.jobs import JobServer
        from pipeline.jobs.tables import jobs_table

        server = JobServer(_server_address(address, display))
        print_result(jobs_table(server.list(), server.address), least=160)

    execute(command, quiet=True, debug=debug)


@jobs.command()
def status(job: JobName, address: Address = None, debug: Debug = False) -> None:
    """Show the status of a job."""

    def command(found: Job) -> None:
        print_result(found)

    _with_job(command, job, address, debug)


@jobs.command()
def logs(
    job: JobName,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", help="Follow until the job ends, and exit with its status.")] = False,
    debug: Debug = False,
) -> None:
    """Show the output of a job."""
    _with_job(lambda found: found.follow() if follow else print(found.logs(), end=""), job, address, debug)


@jobs.command()
def stop(job: JobName, address: Address = None, debug: Debug = False) -> None:
    """Stop a job: a run saves a checkpoint first, `prefray submit ... --resume` continues it."""
    _with_job(lambda found: print(found.stop()), job, address, debug)


def _job_server_of_environment() -> str | None:
    """Return the job server of the environment; None within a job, which is on its cluster already."""
    from cluster.addresses import is_http

    # Ray sets it for a job's driver; submitting once more would never end.
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return None
    named = (os.environ.get(name) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"))
    return next((address for address in named if is_http(address)), None)


def _with_job(command: Callable[[Job], None], name: str, address: str | None, debug: bool) -> None:
    def with_job(display: Any) -> None:
        from pipeline.jobs.job import Job

        command(Job(name, _server_address(address, display)))

    execute(with_job, quiet=True, debug=debug)


def _submit(submission: Any, address: str | None, display: Any, follow: bool) -> None:
    from cluster.jobs import JobServer
    from pipeline.jobs.job import Job
    from pipeline.jobs.submission import plan_job, send

    url = _server_address(address, display)
    planned, server = plan_job(submission), JobServer(url)
    for note in planned.notes:
        display.note(note)
    if (package := planned.package).files:
        display.note(f"package: {len(package.files)} files, {package.size / 2**20:.1f} MiB, from {package.root}")
    job = Job(send(planned, server, display.note), url)
    display.note(f"submitted {job.name} to {url}: {planned.job['entrypoint']}")
    if follow:
        job.follow()
    else:
        print(job.name)
        display.note(job.ways_to)


def _server_address(address: str | None, display: Any) -> str:
    from cluster.addresses import exposure_warning, job_server

    url = job_server(address)
    if (exposure := exposure_warning(url)) is not None:
        display.note(f"warning: {exposure}")
    return url


def _resources(text: str | None) -> dict[str, float]:
    from pipeline.errors import UserError

    if text is None:
        return {}
    try:
        amounts = json.loads(text)
    except ValueError:
        amounts = None
    # `type`, not isinstance: a bool is an int.
    if not isinstance(amounts, dict) or not all(type(amount) in (int, float) and amount >= 0 for amount in amounts.values()):
        raise UserError(f'--entrypoint-resources: expected JSON such as {{"accelerator": 1}}, got {text!r}')
    return amounts
