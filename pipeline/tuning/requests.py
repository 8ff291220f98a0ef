"""Requests of other processes to the driver of a running sweep: files in its folder, each of which gets an answer."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any
from uuid import uuid4

from pipeline.errors import UserError
from pipeline.io.retry import STORAGE_ERRORS
from pipeline.io.storage import Folder, reason
from pipeline.runs.owner import owner_of
from pipeline.tuning.folder import REQUESTS, SweepFolder
from pipeline.tuning.space import Values

__all__ = ["CloneTrial", "Request", "StopTrial", "answer", "forget", "send", "taken"]

REQUEST, ANSWER = ".request.json", ".answer.json"
ANSWER_WITHIN_S = 60.0
"""Seconds in which a driver answers. It looks twice a second at a local folder, and less often at a remote one."""


@dataclass(frozen=True)
class StopTrial:
    """End a trial."""

    trial: int


@dataclass(frozen=True)
class CloneTrial:
    """Add a trial with another one's values, of which some are changed."""

    trial: int
    changes: Values = field(default_factory=dict)
    warm_start: bool = False
    """Resume from the trial's last checkpoint, instead of the beginning."""


Request = StopTrial | CloneTrial
KINDS: dict[str, type[Request]] = {"stop": StopTrial, "clone": CloneTrial}


def send(sweep: SweepFolder, request: Request) -> str:
    """Send a request to the driver of a sweep; return its answer.

    Raises:
        UserError: when no driver runs the sweep, or it refuses the request or doesn't answer.
    """
    path, folder = shlex.quote(str(sweep.path)), sweep.requests
    try:
        _refuse_without_driver(sweep, path)
        kind = next(kind for kind, one in KINDS.items() if isinstance(request, one))
        name = uuid4().hex
        folder.create()
        folder.write(name + REQUEST, json.dumps({"kind": kind, **asdict(request)}))
        try:
            found = _wait_for_answer(folder, name + ANSWER)
        finally:
            folder.delete(name + REQUEST)
            folder.delete(name + ANSWER)
    except STORAGE_ERRORS as error:
        raise UserError(f"{str(sweep.path)!r} can't be read or written: {reason(error)}") from error
    if found is None:
        raise UserError(
            f"the driver of the sweep in {path} has not answered for {ANSWER_WITHIN_S:.0f} s: between two stages of a sweep, "
            "and while it prepares or scores data, it takes no requests; try again"
        )
    if found["refused"]:
        raise UserError(found["text"])
    return found["text"]


def _refuse_without_driver(sweep: SweepFolder, path: str) -> None:
    state = sweep.state()
    if state is None:
        raise UserError(f"{path} holds no sweep; give the output_dir of one that `prefray tune` runs")
    if state["status"] == "finished":
        raise UserError(f"the sweep in {path} has finished; its trials can't be changed any more")
    if owner_of(sweep.storage) is None:
        raise UserError(f"no process runs the sweep in {path}; continue it with `prefray tune --resume {path}`")


def _wait_for_answer(folder: Folder, name: str) -> Any:
    """Return an answer, or None when there is none in time."""
    deadline = time.monotonic() + ANSWER_WITHIN_S
    while (found := folder.read_json(name)) is None and time.monotonic() < deadline:
        time.sleep(0.2 if folder.is_local else 1.0)
    return found


def forget(sweep: SweepFolder) -> None:
    """Delete all requests: what was asked of a driver that is gone isn't meant for the next one."""
    sweep.storage.delete(REQUESTS)


def taken(sweep: SweepFolder) -> Iterator[tuple[str, Request]]:
    """Yield (id, request) for the requests without an answer; malformed ones are refused."""
    folder = sweep.requests
    names = set(folder.names())
    for name in sorted(one.removesuffix(REQUEST) for one in names if one.endswith(REQUEST)):
        if name + ANSWER in names:
            continue
        try:
            values = folder.read_json(name + REQUEST)
            if values is not None:  # else who asked has given up
                yield name, KINDS[values.pop("kind")](**values)
        except (UserError, KeyError, TypeError, AttributeError) as error:
            answer(sweep, name, f"the request is broken: {error}", refused=True)


def answer(sweep: SweepFolder, name: str, text: str, refused: bool) -> None:
    """Answer a request, which isn't taken again then."""
    sweep.requests.write(name + ANSWER, json.dumps({"text": text, "refused": refused}))
