"""What saving must do when the model isn't one plain module: shards, and adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer

__all__ = ["DistributedParallelMixin"]


class DistributedParallelMixin(Trainer):
    """Saves whole models from shards, and adapters without their reference.

    * transformers writes nothing on `save_model` under FSDP with sharded checkpoints; a model that is asked for is
      gathered here. Checkpoints stay sharded.
    * PEFT saves every adapter, the frozen reference copy among them, and asks the hub whether the vocabulary has grown.
      Here the trained adapter is saved, and with it the embeddings exactly when `load_model` has grown them.
    """

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model to `output_dir`; every rank must call it, since gathering is collective."""
        if self.is_fsdp_enabled and not _internal_call:
            plugin = self.accelerator.state.fsdp_plugin
            if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
                return self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        return super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not isinstance(model, PeftModel):
            return super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return None
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        model.save_pretrained(
            str(folder),
            state_dict=state_dict,
            selected_adapters=[name for name in model.peft_config if name != "ref"],
            save_embedding_layers=getattr(model.get_base_model(), "embeddings_grew", False),
        )
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")
        return None
