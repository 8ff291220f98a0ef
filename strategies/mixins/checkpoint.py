"""Saving and loading the state of a run, whatever it is sharded by."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import get_last_checkpoint

from strategies.checkpoints.manifest import differences, find_damage, read_manifests, write_manifest
from strategies.checkpoints.pieces import Piece, PieceReader, write_pieces
from strategies.checkpoints.settings import apply_settings, settings_of
from strategies.checkpoints.torch_state import load_optimizer, load_weights, optimizer_groups, optimizer_pieces, weight_pieces
from strategies.checkpoints.zero_state import load_zero, load_zero_weights, zero_numbers, zero_pieces

__all__ = ["CheckpointMixin"]


class CheckpointMixin(Trainer):
    """Writes checkpoints of the format of `strategies.checkpoints`, and resumes from them at any number of workers.

    Beside the pieces of each rank stands what transformers writes: the trainer's state, the schedule, random states, and,
    where a rank has the whole model, the model as `from_pretrained` loads it.

    Attributes:
        identity: whose checkpoints these are, in words; the run's own names may be added before training. A checkpoint
            that differs in one of them is refused.
        fetch_checkpoint: brings what this node lacks of a checkpoint into its folder, where ranks have folders of their own;
            all ranks call it at once.
    """

    identity: dict[str, Any]
    fetch_checkpoint: Callable[[Path], None] | None = None
    _sound: Path | None = None
    """The folder that was found sound last."""

    @property
    def is_sharded(self) -> bool:
        """Whether no rank has the whole model in its own memory."""
        return self.is_fsdp_enabled or (self.is_deepspeed_enabled and self._zero_stage == 3)

    @property
    def _zero_stage(self) -> int:
        return int(self.accelerator.state.deepspeed_plugin.zero_stage)

    # Saving

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if folder.exists() and self.is_local_process_zero():
            shutil.rmtree(folder)  # of a step that is taken again
        self.accelerator.wait_for_everyone()
        folder.mkdir(parents=True, exist_ok=True)
        super()._save_checkpoint(model, trial)
        rank, world_size = self.args.process_index, self.args.world_size
        if rank == 0:
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle that nothing reads
        pieces = write_pieces(folder, rank, world_size, self._pieces())
        content = {"pieces": pieces, **self._described()} if rank == 0 else {"pieces": pieces}
        write_manifest(folder, rank, world_size, content)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers; in a checkpoint, weights that no rank has whole are in the pieces."""
        if not (_internal_call and self.is_sharded):
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """The optimizer is in the pieces; rank 0 writes the schedule."""
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _pieces(self) -> Iterator[Piece]:
        rank, world_size = self.args.process_index, self.args.world_size
        if self.is_deepspeed_enabled:
            yield from (piece for piece in zero_pieces(self.model_wrapped) if self._wants(piece))
            return
        names = self._trained()
        if self.is_sharded:
            yield from weight_pieces(names, rank, world_size)
        if not self.args.save_only_model:
            yield from optimizer_pieces(self.optimizer, names, rank, world_size)

    def _wants(self, piece: Piece) -> bool:
        return not self.args.save_only_model or piece.name.startswith("weights/")

    def _described(self) -> dict[str, Any]:
        """What rank 0's manifest says beside its files."""
        described: dict[str, Any] = {"identity": self._whole_identity(), "step": self.state.global_step}
        if self.args.save_only_model:
            return described
        if self.is_deepspeed_enabled:
            return {**described, "zero": zero_numbers(self.model_wrapped)}
        return {**described, "optimizer": optimizer_groups(self.optimizer, self._trained())}

    def _trained(self) -> dict[Tensor, str]:
        """Names of the trained parameters; under FSDP2 those of each rank's shards, which the optimizer steps."""
        model = self.accelerator.unwrap_model(self.model)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a forward pass without a backward one, as an evaluation's, leaves some weights gathered
        return {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}

    def _whole_identity(self) -> dict[str, Any]:
        shapes = sorted((name, list(_shape(one))) for one, name in self._trained().items())
        digest = hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]
        return {**self.identity, "trained parameters": f"{len(shapes)} of shapes {digest}", "sharding": self._sharding()}

    def _sharding(self) -> str:
        """How state is laid out, as far as a checkpoint of one layout can't be read into another."""
        return "deepspeed" if self.is_deepspeed_enabled else "fsdp2" if self.is_fsdp_enabled else "whole"

    # Loading

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As transformers; a folder that is another run's, incomplete or damaged is refused before anything is loaded.

        Raises:
            ValueError: saying what differs, is missing or is damaged.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"resume_from_checkpoint: {self.args.output_dir} has no checkpoint to go on from")
        if isinstance(resume_from_checkpoint, str | Path):
            folder = Path(resume_from_checkpoint)
            self._check_identity(folder)
            if self._sound != folder and (damage := self.find_damage(folder)) is not None:
                raise ValueError(f"{folder.parent}: {damage}")
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _check_identity(self, folder: Path) -> None:
        manifest = read_manifests(folder)[0]
        if found := differences(manifest, self._whole_identity()):
            raise ValueError(f"{folder}: the checkpoint is another run's\n" + "\n".join(f"  {line}" for line in found))
        if not manifest.keys() & {"optimizer", "zero"}:
            raise ValueError(f"{folder}: saved with save_only_model, so there is no optimizer to go on with")

    def find_damage(self, folder: Path) -> str | None:
        """What makes a checkpoint unfit, in a phrase; None for a sound one, whose every byte has been read once.

        The ranks share the reading, so every rank must call it, and all get the same answer.
        """
        rank, world_size = self.args.process_index, self.args.world_size
        try:
            manifests = read_manifests(folder)
        except ValueError as error:
            return str(error)
        found = gather_object([find_damage(folder, manifests[rank::world_size])])
        damage = next((one for one in found if one is not None), None)
        self._sound = folder if damage is None else None
        return damage

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            self._load_state(Path(resume_from_checkpoint))
            if self.fetch_checkpoint is not None and self.state.best_global_step:  # transformers forgets one that isn't here
                best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
                self.state.best_model_checkpoint = str(best)
        return prepared

    def _load_state(self, folder: Path) -> None:
        """Weights, where no rank has them whole, optimizer, schedule and scaler; the config's settings stay."""
        manifests = read_manifests(folder)
        assert self.lr_scheduler is not None
        settings = settings_of(self.lr_scheduler)
        with PieceReader(folder, manifests) as reader:
            if self.is_deepspeed_enabled:
                load_zero(self.model_wrapped, manifests[0]["zero"], reader)
            else:
                names = self._trained()
                if self.is_sharded:
                    load_weights(names, reader)
                load_optimizer(self.optimizer, names, manifests[0]["optimizer"], reader)
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))
        apply_settings(self.lr_scheduler, settings)
        self._load_scaler(str(folder))

    def _load_best_model(self) -> None:
        """As transformers, from the pieces where those have the weights.

        Raises:
            ValueError: where the best checkpoint is damaged.
        """
        folder = Path(self.state.best_model_checkpoint)
        if self.fetch_checkpoint is not None:
            self.fetch_checkpoint(folder)
        if (damage := self.find_damage(folder)) is not None:
            raise ValueError(f"the best model can't be had: {damage}")
        if not (self.is_sharded or self.is_deepspeed_enabled):
            return super()._load_best_model()
        with PieceReader(folder, read_manifests(folder)) as reader:
            if self.is_deepspeed_enabled:
                load_zero_weights(self.model_wrapped, reader)
            else:
                load_weights(self._trained(), reader)
        return None


def _shape(parameter: Any) -> tuple[int, ...]:
    """Of the whole parameter, also where DeepSpeed has cut it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
