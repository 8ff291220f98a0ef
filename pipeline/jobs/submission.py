"""Submission of a command as a job: its files, its entrypoint, and checks before anything is uploaded."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.addresses import exposure_warning, job_server
from cluster.jobs import JobServer
from cluster.packaging import Package, list_package
from cluster.placement import plan_actors
from pipeline.config import load_config
from pipeline.config.paths import lasting_outputs, uris_of
from pipeline.config.trust import refuse_remote_code
from pipeline.errors import UserError
from pipeline.io.storage import S3_VARIABLES
from pipeline.jobs.job import Job
from pipeline.jobs.metadata import job_facts, new_name
from pipeline.jobs.recipe_paths import check_files, own_outputs, recipe_in
from pipeline.planning import plan_run
from pipeline.ray.session import our_packages
from pipeline.secrets import find_secret_override, is_secret_key
from pipeline.ui.notebook import default_display
from strategies.methods.registry import get_strategy

if TYPE_CHECKING:
    from pipeline.config import RunConfig

__all__ = ["Planned", "Submission", "plan_job", "send", "submit"]

Command = Literal["train", "tune", "prepare", "score", "doctor"]
STOP_WAIT_S = 600
"""Seconds that a stopped job has to save a checkpoint; Ray's default is 3."""


@dataclass(frozen=True)
class Submission:
    """A user's request to run a command as a job."""

    command: Command
    recipe: str | None
    overrides: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    """Additional options of the command, such as --resume."""
    working_dir: Path = Path()
    env: tuple[str, ...] = ()
    """Environment variables of the job: NAME from here, or NAME=VALUE."""
    shared: tuple[Path, ...] = ()
    """Folders that the cluster's nodes have at the same paths."""
    name: str | None = None
    reserved: Mapping[str, float] = field(default_factory=dict)
    """What the driver reserves, by Ray's names of resources; one that reserves nothing runs on the head."""


@dataclass(frozen=True)
class Planned:
    """A checked job, ready to submit, with notes for the user."""

    submission: Submission
    job: dict[str, Any]
    """Arguments of Ray's `submit_job`, without the working directory."""
    package: Package
    """Files of the working directory, which a job with a recipe brings."""
    cfg: RunConfig | None
    notes: list[str]


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
    """Run a command on a cluster as a job, as `prefray submit` does; notes are shown in a notebook.

    Args:
        command: train, tune, prepare, score, or doctor, whose recipe may be None.
        recipe: its path in `working_dir`.
        address: of the cluster's dashboard.
        overrides: `key=value`, for the recipe.
        resume: continue the run or sweep in output_dir.
        working_dir: folder that is uploaded.
        env: environment variables for the job, NAME from here or NAME=VALUE.
        shared: folders that the nodes have at the same paths.
        name: id of the job; derived from the recipe's name when None.

    Raises:
        UserError: for an invalid recipe, or files that the job won't find; ValueError for an address without a cluster.
    """
    submission = Submission(
        command,
        recipe,
        tuple(overrides),
        ("--resume",) if resume else (),
        Path(working_dir),
        tuple(env),
        tuple(Path(folder) for folder in shared),
        name,
    )
    url = job_server(address)
    planned, server, display = plan_job(submission), JobServer(url), default_display()
    if (exposure := exposure_warning(url)) is not None:
        display.note(f"warning: {exposure}")
    for note in planned.notes:
        display.note(note)
    return Job(send(planned, server, display.note), url)


def plan_job(submission: Submission) -> Planned:
    """Check a submission and decide the job's files and entrypoint; nothing is sent.

    Raises:
        UserError: for an invalid recipe, or one with files that the job won't find on the cluster.
    """
    root = Path(os.path.expanduser(submission.working_dir)).resolve()
    if not root.is_dir():
        raise UserError(f"--working-dir: no such folder: {str(submission.working_dir)!r}")
    # Overrides are words of the entrypoint, which the job server lists.
    if (key := find_secret_override(submission.overrides)) is not None:
        raise UserError(f"--set {key}: would show a secret to everyone who may list the cluster's jobs; give it by --env")
    recipe = None if submission.recipe is None else recipe_in(root, submission.recipe)
    with contextlib.chdir(root):  # plugins are found here, as in the job
        cfg = None if recipe is None else load_config(recipe, submission.overrides)
    if submission.command == "tune" and cfg is not None and cfg.tune is None:
        raise UserError(f"{recipe}: has no `tune:` section to search; give it one with a `space`, or submit train")
    package = Package(root, {}) if cfg is None else list_package(root, own_outputs(cfg))
    if recipe is not None and cfg is not None:
        refuse_remote_code(recipe, cfg, submission.overrides)
        check_files(recipe, cfg, package, submission.shared)
    package.check()
    # In this order: --env may set another time.
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **_variables(submission.env)}
    job = {
        "submission_id": submission.name or new_name(submission.command, recipe or "cluster"),
        "entrypoint": shlex.join(_words(submission, recipe, cfg)),
        "metadata": job_facts(submission.command, root, recipe, cfg),
        "runtime_env": {
            "py_modules": [str(folder) for folder in _modules_to_bring(package)],
            # Of our modules; the working directory has been packed without excluded files (`Package.write`).
            "excludes": ["__pycache__"],
            "env_vars": variables,
        },
        **_reserve(submission.reserved),
    }
    return Planned(submission, job, package, cfg, [] if cfg is None else list(_notes(cfg, variables)))


def send(planned: Planned, server: JobServer, note: Callable[[str], None]) -> str:
    """Check that the run fits the cluster, and submit it; return the job's id.

    Raises:
        ValueError: when it doesn't fit, or the job server refuses it.
    """
    # With one, nodes that are missing now may still join.
    if not server.has_autoscaler():
        _check_room(planned, server.nodes())
    return server.submit(planned.job, None if planned.cfg is None else planned.package, note)


def _check_room(planned: Planned, nodes: list[dict[str, float]]) -> None:
    """Refuse a job that would fail, or wait for ever, on these nodes."""
    reserved, command, cfg = planned.submission.reserved, planned.submission.command, planned.cfg
    if reserved and not any(all(node.get(name, 0.0) >= amount for name, amount in reserved.items()) for node in nodes):
        needed = ", ".join(f"{amount:g} {name}" for name, amount in reserved.items())
        raise UserError(f"--entrypoint-*: no node of the cluster has {needed}, and the job would wait for ever; reserve less")
    if cfg is None or command not in ("train", "tune", "score"):
        return
    if command != "score":
        plan_run(cfg, nodes)
    if get_strategy(cfg.rl).reference_mode(cfg) == "cached":
        plan_actors(
            cfg.ray.score.num_actors, cfg.ray.use_gpu, cfg.ray.score.actor_resources(), nodes, cfg.ray.score.num_actors or 1
        )


def _words(submission: Submission, recipe: str | None, cfg: RunConfig | None) -> list[str]:
    if submission.command == "tune" and "--resume" in submission.flags and cfg is not None:
        if submission.overrides:
            raise UserError("--set: a sweep goes on with the recipe in its folder; leave --set out")
        rest = [flag for flag in submission.flags if flag != "--resume"]
        # By module, since nodes have prefray's packages from the upload, and no `prefray` command.
        return ["python", "-m", "pipeline", "tune", "--resume", lasting_outputs(cfg)["output_dir"], *rest]
    sets = [word for override in submission.overrides for word in ("--set", override)]
    return ["python", "-m", "pipeline", submission.command, *([recipe] if recipe else []), *sets, *submission.flags]


def _modules_to_bring(package: Package) -> Iterator[Path]:
    """Yield our packages to upload, unless the working directory is their repository."""
    for folder in our_packages():
        name = folder.name
        # The working directory brings it already.
        if folder == package.root / name and package.files:
            continue
        if any(file.partition("/")[0] in (name, f"{name}.py") for file in package.files):
            raise UserError(
                f"--working-dir: {package.root} has a {name!r} of its own, which would hide prefray's package of that name on "
                "the cluster; rename it, or name it in .rayignore"
            )
        yield folder


def _reserve(reserved: Mapping[str, float]) -> dict[str, Any]:
    """Return arguments of Ray's `submit_job`, which has one of its own for some resources."""
    named = {"CPU": "entrypoint_num_cpus", "GPU": "entrypoint_num_gpus", "memory": "entrypoint_memory"}
    others = {name: amount for name, amount in reserved.items() if name not in named}
    return {"entrypoint_resources": others or None, **{key: reserved.get(name) for name, key in named.items()}}


def _variables(env: tuple[str, ...]) -> dict[str, str]:
    """Return a job's environment variables, by name from this environment or with their values."""
    variables: dict[str, str] = {}
    for entry in env:
        name, equals, value = entry.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError(f"--env {name}: is no name of a variable; write --env NAME, or --env NAME=VALUE")
        if not equals and name not in os.environ:
            raise UserError(f"--env {name}: isn't set here; set it, or write --env {name}=VALUE")
        variables[name] = value if equals else os.environ[name]
    return variables


def _notes(cfg: RunConfig, variables: Mapping[str, str]) -> Iterator[str]:
    for key, where in lasting_outputs(cfg).items():
        if where != getattr(cfg, key):
            yield f"{key}: {getattr(cfg, key)} will be {where} on the cluster"
    unnamed = [name for name in S3_VARIABLES if name in os.environ and name not in variables]
    if unnamed and any(uri.startswith("s3://") for uri in uris_of(cfg)):
        yield f"not sent: {', '.join(unnamed)}; if the nodes have no way of their own to S3, add --env {unnamed[0]} and so on"
    if "HF_TOKEN" in os.environ and "HF_TOKEN" not in variables:
        yield "not sent: HF_TOKEN; gated models of the hub need it: --env HF_TOKEN"
    if secret := [name for name in variables if is_secret_key(name)]:
        yield (
            f"sent: {', '.join(secret)}; Ray shows a job's variables to whoever may list its jobs, and writes them to the logs "
            "of its nodes: where others can read those, set secrets on the nodes (on Kubernetes by a Secret)"
        )
