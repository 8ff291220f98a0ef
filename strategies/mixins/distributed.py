"""What a model that isn't one plain module needs: FSDP2 on any device, and saving from shards or of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer

from strategies.gathering import gather, write_whole
from strategies.sharding import fsdp_on_any_device

__all__ = ["DistributedParallelMixin"]


class DistributedParallelMixin(Trainer):
    """Trains under FSDP2 on CPUs too, saves whole models from shards, and adapters without their reference.

    * A model that is asked for is gathered parameter by parameter and written by rank 0. transformers puts the whole of it
      into the memory of a worker that holds its part already (under ZeRO-1 and 2 of every worker, a second time), and
      writes nothing under FSDP with sharded checkpoints. Checkpoints are the engines' own.
    * PEFT saves every adapter, the frozen reference copy among them, and asks the hub whether the vocabulary has grown.
      Here the trained adapter is saved, and with it the embeddings exactly when `load_model` has grown them.
    """

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator; `fsdp_config` counts on CPUs too."""
        with fsdp_on_any_device():
            super().create_accelerator_and_postprocess()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model to `output_dir`; every rank must call it, since gathering is collective."""
        if _internal_call or not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return super().save_model(output_dir, _internal_call)
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        engine: Any = getattr(self.model_wrapped, "optimizer", None)
        if hasattr(engine, "checkpoint_event_prologue"):
            engine.checkpoint_event_prologue()  # ZeRO-3 fetches weights ahead; it lets go of them here
        if isinstance(model, PeftModel):
            wanted = _of_adapter(model)
            state = {name: tensor.cpu().clone() for name, tensor in gather(model, wanted) if self.args.should_save}
            self._save(str(folder), state_dict=state)
        else:
            write_whole(model, folder, self.args.should_save)
        if hasattr(engine, "checkpoint_event_epilogue"):
            engine.checkpoint_event_epilogue()
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        return None

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
            save_embedding_layers=_embeddings_grew(model),
        )
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")
        return None


def _embeddings_grew(model: PeftModel) -> bool:
    return getattr(model.get_base_model(), "embeddings_grew", False)


def _of_adapter(model: PeftModel) -> set[str]:
    """Names of the parameters that an adapter's folder holds: those of PEFT's layers, and embeddings that have grown."""
    base = model.get_base_model()
    parts = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if _embeddings_grew(model):
        layers = (base.get_input_embeddings(), base.get_output_embeddings())
        parts |= {id(parameter) for layer in layers if layer is not None for parameter in layer.parameters()}
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in parts}
