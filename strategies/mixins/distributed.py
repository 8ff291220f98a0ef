"""FSDP2 on any device, and saving of sharded models and of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer

from strategies.compat import fsdp_on_any_device, unsplit_layers
from strategies.models.gather_weights import gather, write_whole

__all__ = ["DistributedParallelMixin"]


class DistributedParallelMixin(Trainer):
    """Trains under FSDP2 also on CPUs, saves sharded models as one, and adapters without their reference.

    * A sharded model is gathered parameter by parameter and written by rank 0. transformers would gather all of it in the
      memory of a worker that already holds its part (under ZeRO-1 and 2 a second time on every worker), and writes nothing
      under FSDP with sharded checkpoints. Checkpoints are written by `CheckpointMixin`.
    * PEFT saves every adapter, including the frozen reference copy, and asks the hub whether the vocabulary has grown.
      Here only the trained adapter is saved, with the embeddings exactly if `load_model` has grown them.
    """

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator; `fsdp_config` applies on CPUs too."""
        with fsdp_on_any_device():
            super().create_accelerator_and_postprocess()

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and not plugin.transformer_cls_names_to_wrap:
            layers = unsplit_layers(self.model)
            present = layers & {type(module).__name__ for module in self.model.modules()}
            # A tower names layers of the whole family, such as CLIP's of texts, and accelerate refuses a name without a layer.
            plugin.transformer_cls_names_to_wrap = sorted(present) if present != layers else None
        return super()._prepare_for_training(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model to `output_dir`; every rank must call it, since gathering is collective."""
        # Within a checkpoint a sharded model doesn't come here: `CheckpointMixin` writes its weights as shards.
        if _internal_call or not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return super().save_model(output_dir, _internal_call)
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        engine: Any = getattr(self.model_wrapped, "optimizer", None)
        if hasattr(engine, "checkpoint_event_prologue"):
            engine.checkpoint_event_prologue()  # releases the weights that ZeRO-3 has prefetched
        if isinstance(model, PeftModel):
            wanted = _adapter_parameters(model)
            # Every rank iterates, as gathering is collective. Copied, since a tensor is valid only until the next one.
            state = {name: tensor.cpu().clone() for name, tensor in gather(model, wanted) if self.args.should_save}
            self._save(str(folder), state_dict=state)
        else:
            write_whole(model, folder, self.args.should_save)
        if hasattr(engine, "checkpoint_event_epilogue"):
            # Gathers the small weights again that ZeRO-3 keeps whole on every rank.
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
        # As transformers; checkpoints and the final model remove it again.
        torch.save(self.args, folder / "training_args.bin")
        return None


def _embeddings_grew(model: PeftModel) -> bool:
    return getattr(model.get_base_model(), "embeddings_grew", False)


def _adapter_parameters(model: PeftModel) -> set[str]:
    """Return the names of the parameters in an adapter's folder: those of PEFT's layers, and embeddings that have grown."""
    base = model.get_base_model()
    # By identity: embeddings are found as modules, and a tied one has two names, of which `gather` yields one.
    parts = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if _embeddings_grew(model):
        layers = (base.get_input_embeddings(), base.get_output_embeddings())
        parts |= {id(parameter) for layer in layers if layer is not None for parameter in layer.parameters()}
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in parts}
