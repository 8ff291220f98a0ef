"""A command of ours as a job: what it brings, what it runs, and what is refused before anything is sent."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.jobs import JobRequest, JobServer
from cluster.packaging import Package, list_package, literal
from cluster.preflight import plan_actors
from pipeline.config import load_config
from pipeline.config.loading import missing
from pipeline.config.packaged import is_packaged
from pipeline.config.secrets import find_secret_override
from pipeline.errors import UserError
from pipeline.jobs.metadata import job_facts, new_name
from pipeline.jobs.recipe_paths import check_path, find_path_problems
from pipeline.paths import absolute_paths, lasting_outputs
from pipeline.security import refuse_remote_code
from pipeline.session import our_packages
from pipeline.storage import S3_VARIABLES, is_uri

if TYPE_CHECKING:
    from pipeline.config import RunConfig

__all__ = ["Command", "Planned", "Submission", "plan_job", "submit"]

Command = Literal["train", "tune", "prepare", "score", "doctor"]
STOP_WAIT_S = 600
"""Seconds that a job which is stopped has to save a checkpoint; Ray gives 3 by itself."""


@dataclass(frozen=True)
class Submission:
    """What a person asks for."""

    command: Command
    recipe: str | None
    overrides: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    """Further words of the command, such as --resume."""
    working_dir: Path = Path()
    env: tuple[str, ...] = ()
    """Variables that the job gets: NAME from here, or NAME=VALUE."""
    shared: tuple[Path, ...] = ()
    """Folders that the cluster's nodes have at the same paths."""
    name: str | None = None
    num_cpus: float | None = None
    num_gpus: float | None = None
    memory: int | None = None
    resources: dict[str, float] | None = None


@dataclass(frozen=True)
class Planned:
    """A job that can be submitted, and what a person should know about it."""

    request: JobRequest
    package: Package
    cfg: RunConfig | None
    notes: list[str] = field(default_factory=list)


def plan_job(given: Submission) -> Planned:
    """Decide what a job brings and runs; nothing is sent.

    Raises:
        UserError: for a recipe that is wrong, or that names what the job won't find on the cluster.
    """
    root = Path(os.path.expanduser(given.working_dir)).resolve()
    if not root.is_dir():
        raise UserError(f"--working-dir: no such folder: {str(given.working_dir)!r}")
    if (key := find_secret_override(given.overrides)) is not None:
        raise UserError(f"--set {key}: would show a secret to everyone who may list the cluster's jobs; give it by --env")
    recipe = None if given.recipe is None else _recipe_in(root, given.recipe)
    with contextlib.chdir(root):  # where the job will find its plugins
        cfg = None if recipe is None else load_config(recipe, given.overrides)
    if given.command == "tune" and cfg is not None and cfg.tune is None:
        raise UserError(f"{recipe}: has no `tune:` section to search; give it one with a `space`, or submit train")
    package = Package(root, {}) if cfg is None else list_package(root, _own_outputs(cfg))
    if recipe is not None and cfg is not None:
        refuse_remote_code(recipe, cfg, given.overrides)
        _refuse_what_stays_behind(recipe, cfg, package, given.shared)
    package.check()
    request = JobRequest(
        name=given.name or new_name(given.command, recipe or "cluster"),
        entrypoint=shlex.join(_words(given, recipe, cfg)),
        package=None if cfg is None else package,
        py_modules=tuple(_modules_to_bring(package)),
        env_vars={"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **_variables(given.env)},
        metadata=job_facts(given.command, root, recipe, cfg),
        num_cpus=given.num_cpus,
        num_gpus=given.num_gpus,
        memory=given.memory,
        resources=given.resources,
    )
    return Planned(request, package, cfg, [] if cfg is None else list(_notes(cfg, request)))


def submit(planned: Planned, server: JobServer) -> str:
    """Check that the cluster can hold the run, and submit it; returns the job's id.

    Raises:
        UserError: when it can't.
    """
    if not server.has_autoscaler():
        _check_room(planned, server.nodes())
    return server.submit(planned.request)


def _check_room(planned: Planned, nodes: list[dict[str, float]]) -> None:
    """Refuse what would fail, or wait for ever, on these nodes."""
    from pipeline.training.driver import plan_run
    from strategies.registry import get_strategy

    reserved, cfg = planned.request.reserved, planned.cfg
    if reserved and not any(all(node.get(name, 0.0) >= amount for name, amount in reserved.items()) for node in nodes):
        wanted = ", ".join(f"{amount:g} {name}" for name, amount in reserved.items())
        raise UserError(f"--entrypoint-*: no node of the cluster has {wanted}, and the job would wait for ever; reserve less")
    command = planned.request.metadata["command"]
    if cfg is None or command not in ("train", "tune", "score"):
        return
    if command != "score":
        plan_run(cfg, nodes)
    if get_strategy(cfg.rl).reference_mode(cfg) == "cached":
        plan_actors(
            cfg.ray.score.num_actors, cfg.ray.use_gpu, cfg.ray.score.actor_resources(), nodes, cfg.ray.score.num_actors or 1
        )


def _refuse_what_stays_behind(recipe: str, cfg: RunConfig, package: Package, shared: tuple[Path, ...]) -> None:
    """Refuse a recipe, data or models that the job wouldn't find on the cluster, and a place that it can't write to."""
    absolute_paths(cfg)
    if not is_packaged(recipe, package.root) and (problem := check_path(recipe, package, ())) is not None:
        raise UserError(f"recipe: {problem}")
    folders = [Path(os.path.abspath(os.path.expanduser(folder))) for folder in shared]
    if problems := [f"{key}: {message}" for key, message in find_path_problems(cfg, package, folders)]:
        raise UserError("\n".join(problems))


def _recipe_in(root: Path, given: str) -> str:
    """The recipe's path within the working directory, or the name of a packaged one, which comes with prefray's modules."""
    path = Path(os.path.expanduser(given))
    absolute = Path(os.path.abspath(path))
    if not absolute.is_file():
        absolute = root / path
    if not absolute.is_file():
        if is_packaged(given, root):
            return given
        raise UserError(missing(given))
    resolved = absolute.resolve()
    if not resolved.is_relative_to(root):
        raise UserError(
            f"recipe: {given!r} is outside the working directory {root}, which is all that a job brings; "
            "copy it there, or name the folder that holds recipe and data: --working-dir DIR"
        )
    return resolved.relative_to(root).as_posix()


def _own_outputs(cfg: RunConfig) -> Iterator[str]:
    """Patterns of what runs write into the working directory, which jobs don't need."""
    inputs = [value for value in (cfg.base_model, cfg.reference_model, cfg.lora_model_dir) if value is not None]
    for where in (cfg.output_dir, cfg.dataset_prepared_path):
        relative = os.path.normpath(where)
        is_input = any(Path(value).is_relative_to(relative) for value in inputs)
        if not is_uri(where) and not os.path.isabs(where) and not relative.startswith((".", "~")) and not is_input:
            yield literal(relative)


def _words(given: Submission, recipe: str | None, cfg: RunConfig | None) -> list[str]:
    if given.command == "tune" and "--resume" in given.flags and cfg is not None:
        if given.overrides:
            raise UserError("--set: a sweep goes on with the recipe in its folder; leave --set out")
        rest = [flag for flag in given.flags if flag != "--resume"]
        return ["python", "-m", "pipeline", "tune", "--resume", lasting_outputs(cfg)["output_dir"], *rest]
    sets = [word for override in given.overrides for word in ("--set", override)]
    return ["python", "-m", "pipeline", given.command, *([recipe] if recipe else []), *sets, *given.flags]


def _modules_to_bring(package: Package) -> Iterator[Path]:
    """Our packages, where the working directory isn't their repository."""
    for ours in our_packages():
        name = ours.name
        if ours == package.root / name and package.files:
            continue
        if any(file.partition("/")[0] in (name, f"{name}.py") for file in package.files):
            raise UserError(
                f"--working-dir: {package.root} has a {name!r} of its own, which would hide prefray's package of that name on "
                "the cluster; rename it, or name it in .rayignore"
            )
        yield ours


def _variables(env: tuple[str, ...]) -> dict[str, str]:
    """The variables that a job gets, by name from here or with their values."""
    found: dict[str, str] = {}
    for entry in env:
        name, equals, value = entry.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError(f"--env {name}: is no name of a variable; write --env NAME, or --env NAME=VALUE")
        if not equals and name not in os.environ:
            raise UserError(f"--env {name}: isn't set here; set it, or write --env {name}=VALUE")
        found[name] = value if equals else os.environ[name]
    return found


def _notes(cfg: RunConfig, request: JobRequest) -> Iterator[str]:
    for key, where in lasting_outputs(cfg).items():
        if where != getattr(cfg, key):
            yield f"{key}: {getattr(cfg, key)} will be {where} on the cluster"
    unnamed = [name for name in S3_VARIABLES if name in os.environ and name not in request.env_vars]
    if unnamed and any(where.startswith("s3://") for where in _places(cfg)):
        yield f"not sent: {', '.join(unnamed)}; if the nodes have no way of their own to S3, add --env {unnamed[0]} and so on"
    if "HF_TOKEN" in os.environ and "HF_TOKEN" not in request.env_vars:
        yield "not sent: HF_TOKEN; gated models of the hub need it: --env HF_TOKEN"


def _places(cfg: RunConfig) -> list[str]:
    data: list[Any] = [*cfg.datasets, *(cfg.test_datasets or [])]
    return [cfg.output_dir, *(dataset.path for dataset in data)]
