"""Runs that start from another run's checkpoint, with other settings."""

from __future__ import annotations

import json
from functools import partial
from typing import Any
from uuid import uuid4

from pyarrow import fs

from pipeline.config import RunConfig, dump_config
from pipeline.errors import RunFailed
from pipeline.io.retry import with_retries
from pipeline.runs.checkpoints import CHECKPOINT, complete, is_complete, step_of
from pipeline.runs.folder import CONFIG, RUN, RunFolder

__all__ = ["fork_from_checkpoint", "origin_of"]

ORIGIN = "origin.json"


def fork_from_checkpoint(origin: RunFolder, step: int, target: RunFolder, cfg: RunConfig) -> int:
    """Copy a checkpoint of `origin` to `target`, as a run that `train(cfg, resume=True)` resumes.

    Args:
        origin: may be training; if it has deleted the checkpoint of `step`, its newest one is copied.
        cfg: settings of the new run, also of the optimizer, whose state is the checkpoint's.

    Returns:
        The step of the checkpoint.

    Raises:
        RunFailed: when `origin` has no complete checkpoint.
    """
    storage = target.storage
    storage.create()
    copied = with_retries(partial(_copy, origin, step, target), f"copying a checkpoint of {origin.path}")
    state = origin.state() or {}
    inputs = {key: state[key] for key in ("prepared", "scores", "base", "total_steps") if key in state}
    storage.write(CONFIG, dump_config(cfg))
    storage.write(RUN, json.dumps({"status": "started", "id": uuid4().hex, **inputs}, indent=2) + "\n")
    # Last: a folder with it isn't forked again.
    storage.write(ORIGIN, json.dumps({"path": str(origin.path), "step": copied, "asked": step}) + "\n")
    return copied


def _copy(origin: RunFolder, step: int, target: RunFolder) -> int:
    """Copy the checkpoint of a step, or else the newest one; if `origin` deletes it meanwhile, a retry copies another."""
    source, destination = origin.storage, target.storage
    names = complete(source.filesystem, source.path)
    name = next((name for name in names if step_of(name) == step), next(iter(names), None))
    if name is None:
        raise RunFailed(f"{origin.path} has no complete checkpoint to go on from")
    # Without the number of a second checkpoint of the step: here it is the only one.
    copied = f"{CHECKPOINT}{step_of(name):06d}"
    # A former attempt may have copied a part of it.
    destination.delete(copied)
    destination.filesystem.create_dir(f"{destination.path}/{copied}", recursive=True)
    fs.copy_files(
        f"{source.path}/{name}",
        f"{destination.path}/{copied}",
        source_filesystem=source.filesystem,
        destination_filesystem=destination.filesystem,
        use_threads=False,
    )
    if not is_complete(destination.filesystem, f"{destination.path}/{copied}"):
        raise FileNotFoundError(f"{name} of {origin.path} was deleted while it was copied")
    return step_of(name)


def origin_of(folder: RunFolder) -> dict[str, Any] | None:
    """Read `path` and `step` of the checkpoint that a run was forked from, and the requested step, `asked`; None for others."""
    text = folder.storage.read(ORIGIN)
    return None if text is None else json.loads(text)
