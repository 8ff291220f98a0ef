"""Checkpoints of a synchronised reference: it changes during the run, so a resumed run must restore it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model
from transformers import Trainer

__all__ = ["SyncedReferenceMixin"]

REFERENCE = "reference.safetensors"


class SyncedReferenceMixin(Trainer):
    """Saves and loads the reference under `sync_ref_model` (TR-DPO, arXiv 2404.09656); other references never change."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        # Before `CheckpointMixin` writes the manifest, which so has this file's checksum.
        if self.args.sync_ref_model and self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            # Not `save_file`, which refuses the shared memory of tied weights.
            save_model(self.accelerator.unwrap_model(self.ref_model), str(folder / REFERENCE))

    def _init_training_state(
        self, max_steps: int, updates: int, epochs: int, resume_from_checkpoint: str | None, trial: Any
    ) -> Any:
        # Not `_load_from_checkpoint`, which transformers calls neither under DeepSpeed nor under FSDP.
        if self.args.sync_ref_model and resume_from_checkpoint is not None:
            file = Path(resume_from_checkpoint) / REFERENCE
            if file.is_file():
                reference = self.accelerator.unwrap_model(self.ref_model)
                load_model(reference, str(file), device=str(next(reference.parameters()).device))
        return super()._init_training_state(max_steps, updates, epochs, resume_from_checkpoint, trial)
