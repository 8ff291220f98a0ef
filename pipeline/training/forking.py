"""A run that goes on from another run's checkpoint, with its own settings."""

from __future__ import annotations

import json
from functools import partial
from typing import Any
from uuid import uuid4

from pyarrow import fs

from pipeline.config import RunConfig, dump_config
from pipeline.errors import RunFailed
from pipeline.patience import patiently
from pipeline.training.checkpoints import CHECKPOINT, complete, step_of
from pipeline.training.folder import CONFIG, RUN, RunFolder

__all__ = ["fork", "origin_of"]

ORIGIN = "origin.json"


def fork(origin: RunFolder, step: int, target: RunFolder, cfg: RunConfig) -> int:
    """Make `target` a run that `train(cfg, resume=True)` continues from the checkpoint that `origin` wrote at `step`.

    Args:
        origin: may go on meanwhile; when it has removed that checkpoint, its newest one is taken.
        cfg: what the run trains on with: the optimizer's state comes along, its settings are those of `cfg`.

    Returns:
        The step of the checkpoint.

    Raises:
        RunFailed: when `origin` has no complete checkpoint.
    """
    storage = target.storage
    storage.create()
    copied = patiently(partial(_copy, origin, step, target), f"copying a checkpoint of {origin.path}")
    state = origin.state() or {}
    known = {key: state[key] for key in ("prepared", "scores", "base", "total_steps") if key in state}
    storage.write(CONFIG, dump_config(cfg))
    storage.write(ORIGIN, json.dumps({"path": str(origin.path), "step": copied, "asked": step}) + "\n")
    storage.write(RUN, json.dumps({"status": "started", "id": uuid4().hex, **known}, indent=2) + "\n")
    return copied


def _copy(origin: RunFolder, step: int, target: RunFolder) -> int:
    """Copy the checkpoint of a step, or the newest one; `origin` may remove it meanwhile, then there is another."""
    where, there = origin.storage, target.storage
    names = complete(where.filesystem, where.path)
    name = next((name for name in names if step_of(name) == step), next(iter(names), None))
    if name is None:
        raise RunFailed(f"{origin.path} has no complete checkpoint to go on from")
    copied = f"{CHECKPOINT}{step_of(name):06d}"
    there.delete(copied)
    there.filesystem.create_dir(f"{there.path}/{copied}", recursive=True)
    fs.copy_files(
        f"{where.path}/{name}",
        f"{there.path}/{copied}",
        source_filesystem=where.filesystem,
        destination_filesystem=there.filesystem,
        use_threads=False,
    )
    return step_of(name)


def origin_of(folder: RunFolder) -> dict[str, Any] | None:
    """`path` and `step` of the checkpoint that a run went on from, and the step that was `asked` for; None for other runs."""
    text = folder.storage.read(ORIGIN)
    return None if text is None else json.loads(text)
