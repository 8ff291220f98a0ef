"""Commands about where runs happen: check it, submit to it, follow what runs there."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pipeline.cli.running import Debug, Overrides, Quiet, Recipe, execute, load

__all__ = ["doctor", "jobs", "submit"]

Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help="The cluster's dashboard, http://HEAD:8265; when not set RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or this machine's.",
    ),
]
WorkingDir = Annotated[
    Path, typer.Option("--working-dir", metavar="DIR", help="What the job brings: the folder of recipe and data.")
]
Env = Annotated[
    list[str] | None, typer.Option("--env", metavar="NAME[=VALUE]", help="A variable for the job, from here or with its value.")
]
Shared = Annotated[
    list[Path] | None, typer.Option("--shared", metavar="DIR", help="A folder that the cluster's nodes have at the same path.")
]
Job = Annotated[str, typer.Argument(metavar="JOB", help="Id of a job, as `prefray jobs list` shows it.")]

jobs = typer.Typer(help="Jobs on a cluster: list, logs, status, stop.", no_args_is_help=True)


def submit(
    what: Annotated[Literal["train", "tune", "prepare", "score"], typer.Argument(metavar="COMMAND", help="What to run.")],
    recipe: Recipe,
    address: Address = None,
    overrides: Overrides = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show the log, and end as the job ends.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run or sweep that output_dir holds.")] = False,
    working_dir: WorkingDir = Path(),
    env: Env = None,
    shared: Shared = None,
    name: Annotated[str | None, typer.Option("--id", metavar="JOB", help="Id of the job; made from the recipe's name.")] = None,
    num_cpus: Annotated[float | None, typer.Option("--entrypoint-num-cpus", min=0, help="The driver's.")] = None,
    num_gpus: Annotated[float | None, typer.Option("--entrypoint-num-gpus", min=0, help="The driver's.")] = None,
    memory: Annotated[int | None, typer.Option("--entrypoint-memory", min=0, help="The driver's, in bytes.")] = None,
    resources: Annotated[
        str | None, typer.Option("--entrypoint-resources", metavar="JSON", help="Other resources that the driver reserves.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Run COMMAND on a cluster as a job: `ray job submit --working-dir . -- python -m pipeline COMMAND RECIPE`, checked first.

    The driver runs on the head unless it reserves something. Variables of the environment aren't sent unless named.
    """
    flags = (*(["--resume"] if resume else []), *(["--debug"] if debug else []))
    reserved = {"num_cpus": num_cpus, "num_gpus": num_gpus, "memory": memory}

    def command(display: Any) -> None:
        from pipeline.jobs.submission import Submission

        given = Submission(
            what,
            recipe,
            tuple(overrides or ()),
            flags,
            working_dir,
            tuple(env or ()),
            tuple(shared or ()),
            name,
            resources=_resources(resources),
            **reserved,  # type: ignore[arg-type]
        )
        _submit(given, address, display, follow)

    execute(command, quiet=True, debug=debug)


def doctor(
    recipe: Annotated[str | None, typer.Argument(help="A recipe; without one only the cluster is looked at.")] = None,
    overrides: Overrides = None,
    address: Address = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Also train two steps of the largest forwards, and show what they took.")
    ] = False,
    working_dir: WorkingDir = Path(),
    env: Env = None,
    shared: Shared = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check recipe, machine and cluster: versions, resources, storage, network, and the memory that a worker will take.

    Looks at this machine, at the cluster of `ray.address` or RAY_ADDRESS, or with --address, as a job, at that cluster: at
    every node. Loads no weights. Ends with status 1 when something fails.
    """

    def command(display: Any) -> None:
        from pipeline.doctor.examination import examine
        from pipeline.errors import RunFailed
        from pipeline.tables import print_examination

        if (where := address or _job_server_of_environment()) is not None:
            from pipeline.jobs.submission import Submission

            flags = tuple(["--measure"] if measure else [])
            given = Submission(
                "doctor", recipe, tuple(overrides or ()), flags, working_dir, tuple(env or ()), tuple(shared or ())
            )
            return _submit(given, where, display, follow=True)
        cfg = load(recipe, overrides) if recipe is not None else None
        display.stage("measuring memory" if measure else "looking")
        found = examine(cfg, with_measurement=measure)
        display.close()
        print_examination(found)
        words = found.verdict(cfg)
        if found.failed:
            raise RunFailed(words)
        print(words)
        return None

    execute(command, quiet, debug)


@jobs.command("list")
def list_jobs(address: Address = None, debug: Debug = False) -> None:
    """Show the jobs of a cluster, the newest first."""

    def command(server: Any) -> None:
        from pipeline.jobs.tables import print_jobs

        print_jobs(server.list(), server.address)

    _ask(command, address, debug)


@jobs.command()
def status(job: Job, address: Address = None, debug: Debug = False) -> None:
    """Show how a job stands."""

    def command(server: Any) -> None:
        from pipeline.jobs.tables import print_job

        print_job(server.info(job))

    _ask(command, address, debug)


@jobs.command()
def logs(
    job: Job,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the job ends, and end as it does.")] = False,
    debug: Debug = False,
) -> None:
    """Show what a job has printed."""

    def command(server: Any) -> None:
        from pipeline.jobs.following import follow_job

        if follow:
            follow_job(server, job)
        else:
            sys.stdout.write(server.logs(job))

    _ask(command, address, debug)


@jobs.command()
def stop(job: Job, address: Address = None, debug: Debug = False) -> None:
    """Stop a job: a run saves a checkpoint first, `prefray submit ... --resume` continues it."""

    def command(server: Any) -> None:
        from pipeline.jobs.following import stop_job

        print(stop_job(server, job))

    _ask(command, address, debug)


def _job_server_of_environment() -> str | None:
    """The job server that the environment names; none within a job, whose cluster it is."""
    from cluster.addresses import is_http

    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return None
    named = (os.environ.get(name) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"))
    return next((address for address in named if is_http(address)), None)


def _ask(command: Callable[[Any], None], address: str | None, debug: bool) -> None:
    def with_server(display: Any) -> None:
        from cluster.jobs import JobServer

        command(JobServer(_server_address(address, display)))

    execute(with_server, quiet=True, debug=debug)


def _submit(given: Any, address: str | None, display: Any, follow: bool) -> None:
    from cluster.jobs import JobServer
    from pipeline.jobs.following import follow_job, ways_to
    from pipeline.jobs.submission import plan_job, submit

    where = _server_address(address, display)
    planned = plan_job(given)
    server = JobServer(where)
    for note in planned.notes:
        display.note(note)
    if (package := planned.package).files:
        display.note(f"package: {len(package.files)} files, {package.size / 2**20:.1f} MiB, from {package.root}")
    name = submit(planned, server)
    display.note(f"submitted {name} to {where}: {planned.request.entrypoint}")
    if follow:
        follow_job(server, name)
    else:
        print(name)
        display.note(ways_to(name, server))


def _server_address(address: str | None, display: Any) -> str:
    from cluster.addresses import find_exposure, job_server

    where = job_server(address)
    if (exposure := find_exposure(where)) is not None:
        display.note(f"warning: {exposure}")
    return where


def _resources(text: str | None) -> dict[str, float] | None:
    from pipeline.errors import UserError

    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(type(amount) in (int, float) and amount >= 0 for amount in found.values()):
        raise UserError(f'--entrypoint-resources: expected JSON such as {{"accelerator": 1}}, got {text!r}')
    return found
