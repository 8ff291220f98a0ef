"""Appends strategy, rank and step of each step to the file that STEP_LOG names; no such variable, no callback."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from strategies import register_callback


class StepLog(TrainerCallback):
    def __init__(self, path: Path, rl: str) -> None:
        self.path, self.rl = path, rl

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        with self.path.open("a") as file:
            file.write(f"{self.rl} {args.process_index} {state.global_step}\n")


@register_callback
def step_log(cfg: Any) -> StepLog | None:
    path = os.environ.get("STEP_LOG")
    return None if path is None else StepLog(Path(path), cfg.rl)
