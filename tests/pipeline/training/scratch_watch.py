"""A plugin that looks at a worker's folder whenever a checkpoint was written, and fails where it isn't as it should be."""

from __future__ import annotations

import os
import re
import stat
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from pipeline.training import worker_checkpoints as reporting
from strategies import register_callback


@register_callback
class ScratchWatch(TrainerCallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Storage is slower than training."""
        kept = reporting.store

        def slowly(*given: Any) -> None:
            time.sleep(0.5)
            kept(*given)

        reporting.store = slowly

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir)
        found = folder.stat()
        assert stat.S_IMODE(found.st_mode) == 0o700 and found.st_uid == os.getuid(), oct(found.st_mode)
        files = [os.path.join(place, name) for place, _, names in os.walk(folder) for name in names]  # others move theirs
        held = {int(match[1]) for file in files if (match := re.search(r"checkpoint-0*(\d+)", file))}
        assert held <= {state.global_step}, (held, state.global_step)
