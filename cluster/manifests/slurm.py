"""A batch script for Slurm: Ray on every node of an allocation, the run on the first, and an end to all of it.

`ray symmetric-run` does the like, but not enough: it hands no SIGTERM on to what it runs, so nothing could be saved; it
ends with 0 when Ray couldn't be started; and its `ray stop` ends whatever else of the user's runs Ray on those machines.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib.resources import files

from cluster.manifests.request import ManifestRequest
from cluster.manifests.writing import header

__all__ = ["render"]

NAMES = re.compile(r"[\w.@-]+(,[\w.@-]+)*")
NAME = re.compile(r"[A-Za-z0-9._-]+")
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")
NOTICE_S = 600
"""Seconds before the time limit at which the run is told to save."""
RECIPE = '"$work/recipe.yaml"'


def render(request: ManifestRequest) -> str:
    """The script, for `sbatch`.

    Raises:
        ValueError: for a name or a time that Slurm doesn't take, or too short a time.
    """
    if not NAME.fullmatch(request.name):
        raise ValueError(f"--name: of a job of Slurm's: letters, digits, dots, dashes and underscores; got {request.name!r}")
    if _seconds(request.slurm.time) < 2 * NOTICE_S:
        raise ValueError(
            f"--time: {request.slurm.time} is too short: {NOTICE_S // 60} minutes before its end the run is told to save; "
            f"give at least {2 * NOTICE_S // 60} minutes"
        )
    for option in ("partition", "account"):
        value = getattr(request.slurm, option)
        if value is not None and not NAMES.fullmatch(value):
            raise ValueError(
                f"--{option}: names of Slurm's have letters, digits and -._@, with commas between them; got {value!r}"
            )
    if any("\n" in line for line in request.slurm.setup):
        raise ValueError("--setup: is one line; give the option once for each")
    comments = header(
        "Start:  sbatch FILE    in the folder that the recipe's relative paths start from",
        f"Follow: tail -F {request.name}-JOB.out",
        "End:    scancel --batch --signal=TERM JOB    saves a checkpoint first; scancel JOB doesn't",
        "A run that isn't done at the time limit saves, and goes on when the job starts again by itself.",
    )
    directives = "".join(f"#SBATCH {line}\n" for line in _directives(request))
    body = files("cluster.manifests").joinpath("slurm.sh").read_text(encoding="utf-8")
    return "".join(("#!/usr/bin/env bash\n", comments, directives, "\n", _preamble(request), "\n", body))


def _seconds(time: str) -> int:
    """Of a time limit: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes and so on."""
    match = TIME.fullmatch(time)
    if match is None:
        raise ValueError(f"--time: not as Slurm writes a time, such as 24:00:00 or 2-12:00:00: {time!r}")
    parts = [int(part) for part in match["parts"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return ((int(match["days"]) * 24 + hours) * 60 + minutes) * 60 + seconds
    hours, minutes, seconds = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    return (hours * 60 + minutes) * 60 + seconds


def _directives(request: ManifestRequest) -> Iterator[str]:
    slurm = request.slurm
    yield f"--job-name={request.name}"
    yield f"--nodes={f'{request.min_nodes}-{request.max_nodes}' if request.autoscales else request.min_nodes}"
    yield "--ntasks-per-node=1"
    yield f"--cpus-per-task={request.node['CPU']:g}"
    if request.gpus:
        yield f"--gpus-per-node={request.gpus}"
    if "memory" in request.node:
        yield f"--mem={request.node['memory']:g}G"
    yield f"--time={slurm.time}"
    if slurm.partition is not None:
        yield f"--partition={slurm.partition}"
    if slurm.account is not None:
        yield f"--account={slurm.account}"
    if request.autoscales:
        yield "--no-kill"
    yield "--requeue"
    yield f"--signal=B:USR1@{NOTICE_S}"
    yield "--output=%x-%j.out"
    yield "--open-mode=append"


def _preamble(request: ManifestRequest) -> str:
    """What differs from script to script."""
    end = "RECIPE"
    while end in request.recipe_text.splitlines():
        end += "_"
    recipe = request.recipe_text if request.recipe_text.endswith("\n") else f"{request.recipe_text}\n"
    lines = ["set -euo pipefail"]
    if request.slurm.setup:
        # what others' lines set up may refer to variables that aren't set
        lines += ["set +u", *request.slurm.setup, "set -u"]
    lines += ["", "work=$(mktemp -d)", f"cat > {RECIPE} <<'{end}'", f"{recipe}{end}"]
    lines += [f"start=({_words(request, request.resume)})", f"resume=({_words(request, True)})"]
    lines += [f"sweep_file={shlex.quote(request.sweep_file or '')}", f"gpus={request.gpus}"]
    return "".join(f"{line}\n" for line in lines)


def _words(request: ManifestRequest, resume: bool) -> str:
    """The command, for a shell that knows `work`."""
    return " ".join(RECIPE if word == RECIPE else shlex.quote(word) for word in request.words(RECIPE, resume))
