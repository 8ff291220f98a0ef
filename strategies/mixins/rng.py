"""Random states of a checkpoint, one file per rank."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer
from transformers.trainer_pt_utils import safe_globals

__all__ = ["RngLoaderMixin", "find_rng_file"]

logger = logging.getLogger(__name__)


class RngLoaderMixin(Trainer):
    """Loads the random state of this rank, by torch's safe unpickling.

    transformers names the file by the *current* number of workers, so one worker finds none in a checkpoint of two. Here the
    first rank loads the first rank's state, whatever its file name; a rank without a saved state keeps that of its seed,
    with a warning. The order of rows doesn't depend on this state; dropout does.
    """

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        file = find_rng_file(Path(checkpoint), self.args.process_index, self.args.world_size)
        if file is None:
            logger.warning(
                "%s has no random state for rank %d: it was written by another number of workers. "
                "Going on with the state of the seed; dropout will differ, the order of the rows will not.",
                checkpoint,
                self.args.process_index,
            )
            return
        # The state of `np.random` is an array, which safe unpickling alone refuses.
        with safe_globals():
            state = torch.load(file, weights_only=True)
        _restore(state)


def find_rng_file(checkpoint: Path, rank: int, world_size: int) -> Path | None:
    """Return the file with the random state of `rank`, or None if no such rank wrote one."""
    numbered, single = checkpoint / f"rng_state_{rank}.pth", checkpoint / "rng_state.pth"
    candidates = [single, numbered] if world_size <= 1 else [numbered, *([single] if rank == 0 else [])]
    return next((file for file in candidates if file.is_file()), None)


def _restore(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        # One tensor from a single process, a list with one per visible device from several.
        if isinstance(state["cuda"], torch.Tensor):
            torch.cuda.random.set_rng_state(state["cuda"])
        elif len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.random.set_rng_state_all(state["cuda"])
