"""A plugin of the elastic scenario: a run waits after certain steps until a file says that what was to happen has happened.

It says that it waits by a file too: what a run writes of a step comes later.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from strategies import register_callback
from tests.waiting import wait_for

FOLDER = "ELASTIC_GATES"
"""Variable that names the folder of the files; without it no run waits."""
LOST, RESIZED = "lost", "resized"
GATES = {25: LOST, 45: RESIZED}
"""Step -> the file that the run waits for when the step has ended."""


class Gates(TrainerCallback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if gate := GATES.get(state.global_step):
            (self.folder / f"{gate}.awaited.{args.process_index}").touch()
            wait_for((self.folder / gate).exists)


@register_callback
def gates(cfg: Any) -> Gates | None:
    folder = os.environ.get(FOLDER)
    return Gates(Path(folder)) if folder else None
