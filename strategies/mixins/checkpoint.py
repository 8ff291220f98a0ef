"""Saving and loading the state of a run, sharded or not."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import get_last_checkpoint

from strategies.checkpoints.hyperparameters import apply_hyperparameters, read_hyperparameters
from strategies.checkpoints.manifest import identity_mismatch, is_complete, read_manifests, verify, write_manifest
from strategies.checkpoints.shards import Shard, ShardReader, write_shards
from strategies.checkpoints.torch_state import load_optimizer, load_weights, optimizer_groups, optimizer_shards, weight_shards
from strategies.checkpoints.zero_state import load_zero, load_zero_weights, zero_scalars, zero_shards
from strategies.models.saving import load_saved

__all__ = ["CheckpointMixin", "CheckpointStorage"]

CHECKPOINT = re.compile(r"checkpoint-\d+")
"""Folders that rotation may delete."""


class CheckpointStorage(Protocol):
    """Storage of checkpoints outside the folder that they are written to."""

    def wait(self) -> None:
        """Block until a checkpoint may be written; called on each rank before writing."""

    def fetch(self, folder: Path) -> Path:
        """Return the current path of the checkpoint written to `folder`. Every rank must call it."""


class CheckpointMixin(Trainer):
    """Writes checkpoints of the format of `strategies.checkpoints`, and resumes from them at any number of workers.

    A checkpoint contains the shards of each rank and transformers' own files: trainer state, schedule, random states, and,
    unless the model is sharded, the model as `from_pretrained` loads it.

    Attributes:
        identity: names that identify the run, such as its base model. A checkpoint that differs in one of them is refused.
        checkpoint_storage: where checkpoints are stored, if not in the output folder.
    """

    identity: dict[str, Any]
    checkpoint_storage: CheckpointStorage | None
    _unlogged: Callable[[], dict[str, Any]]
    """Defined by `MetricsMixin`."""
    _resumed_with: dict[str, Any] | None
    _verified: Path | None = None
    """The folder that was verified last."""

    @property
    def is_sharded(self) -> bool:
        """Whether no rank holds the whole model."""
        return self.is_fsdp_enabled or (self.is_deepspeed_enabled and self._zero_stage == 3)

    @property
    def _zero_stage(self) -> int:
        return int(self.accelerator.state.deepspeed_plugin.zero_stage)

    # Saving

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.checkpoint_storage is not None:
            self.checkpoint_storage.wait()
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        # Once per node, as nodes may have disks of their own; no rank writes before the old folder is gone.
        if folder.exists() and self.is_local_process_zero():
            shutil.rmtree(folder)  # left by a run that was resumed before this step
        self.accelerator.wait_for_everyone()
        folder.mkdir(parents=True, exist_ok=True)
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # `_rotate` deletes instead of transformers
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        rank, world_size = self.args.process_index, self.args.world_size
        if rank == 0:
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # an unused pickle
        # The manifest last: a checkpoint is complete when all ranks' manifests are there, and they list all other files.
        shards = write_shards(folder, rank, world_size, self._shards())
        fields = self._rank0_fields() if rank == 0 else {}
        write_manifest(folder, rank, world_size, {"pieces": shards, "unlogged": self._unlogged(), **fields})
        # Not before all ranks have written: one that fails would leave this checkpoint incomplete, and the last one deleted.
        if limit:
            self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._rotate(folder, limit)

    def _rotate(self, newest: Path, limit: int | None) -> None:
        """Delete checkpoints beyond `save_total_limit`: those that were never finished first, then the oldest.

        Transformers' own rotation goes by the step where times of change are close: beside an unfinished checkpoint of a later
        step it would delete the one that has just been written.
        """
        if limit is None or limit <= 0:
            return
        folders = [path for path in newest.parent.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name) and path.is_dir()]
        best = self.state.best_model_checkpoint
        kept = {path for path in folders if path == newest or (best is not None and path == Path(best))}
        # As transformers: the newest and the best stay, even if the limit is 1.
        others = sorted(set(folders) - kept, key=_age)
        for path in others[: max(0, len(folders) - max(limit, len(kept)))]:
            shutil.rmtree(path, ignore_errors=True)  # another process may read it, or have removed it

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model, except of a sharded one in a checkpoint, whose weights are in the shards."""
        if not (_internal_call and self.is_sharded):
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write the schedule on rank 0; the optimizer is in the shards."""
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _shards(self) -> Iterator[Shard]:
        rank, world_size = self.args.process_index, self.args.world_size
        if self.is_deepspeed_enabled:
            yield from (shard for shard in zero_shards(self.model_wrapped) if self._is_saved(shard))
            return
        names = self._trained()
        if self.is_sharded:
            yield from weight_shards(names, rank, world_size)
        if not self.args.save_only_model:
            yield from optimizer_shards(self.optimizer, names, rank, world_size)

    def _is_saved(self, shard: Shard) -> bool:
        return not self.args.save_only_model or shard.name.startswith("weights/")

    def _rank0_fields(self) -> dict[str, Any]:
        """Return the fields that only rank 0's manifest has."""
        fields: dict[str, Any] = {"identity": self._full_identity(), "step": self.state.global_step}
        if self.args.save_only_model:
            return fields
        if self.is_deepspeed_enabled:
            return {**fields, "zero": zero_scalars(self.model_wrapped)}
        return {**fields, "optimizer": optimizer_groups(self.optimizer, self._trained())}

    def _trained(self) -> dict[Tensor, str]:
        """Return the names of the trained parameters; under FSDP2 of each rank's shards, which the optimizer steps."""
        model = self.accelerator.unwrap_model(self.model)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a forward without a backward, as in an evaluation, leaves some weights gathered
        return {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}

    def _full_identity(self) -> dict[str, Any]:
        shapes = sorted((name, list(_shape(parameter))) for parameter, name in self._trained().items())
        digest = hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]
        return {**self.identity, "trained parameters": f"{len(shapes)} of shapes {digest}", "sharding": self._sharding()}

    def _sharding(self) -> str:
        """Return the state layout; a checkpoint of one layout can't be loaded into another."""
        return "deepspeed" if self.is_deepspeed_enabled else "fsdp2" if self.is_fsdp_enabled else "whole"

    # Loading

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train; with a checkpoint, first check that it is this run's, complete and undamaged.

        Raises:
            ValueError: naming what differs, is missing or is damaged.
        """
        if resume_from_checkpoint is True:
            # The one of the highest step, complete or not; an incomplete one is refused below.
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"resume_from_checkpoint: {self.args.output_dir} has no checkpoint to go on from")
        if isinstance(resume_from_checkpoint, str | Path):
            folder = Path(resume_from_checkpoint)
            # First, for it reads manifests alone, and verifying reads every byte.
            self._check_identity(folder)
            self.args.eval_on_start = False  # it would be evaluated twice, and early stopping counts evaluations
            if self._verified != folder and (damage := self.verify_checkpoint(folder)) is not None:
                raise ValueError(f"{folder.parent}: {damage}")
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _check_identity(self, folder: Path) -> None:
        manifest = read_manifests(folder)[0]
        if mismatches := identity_mismatch(manifest, self._full_identity()):
            raise ValueError(f"{folder}: the checkpoint is another run's\n" + "\n".join(f"  {line}" for line in mismatches))
        if not manifest.keys() & {"optimizer", "zero"}:
            raise ValueError(f"{folder}: saved with save_only_model, so there is no optimizer to go on with")

    def verify_checkpoint(self, folder: Path) -> str | None:
        """Read every byte of a checkpoint once; return a phrase on what is missing or damaged, None if nothing is.

        Every rank must call it and reads a part of the files; all return the same.
        """
        rank, world_size = self.args.process_index, self.args.world_size
        try:
            result = verify(folder, read_manifests(folder)[rank::world_size])
        except (OSError, ValueError) as error:
            result = str(error)  # gathered too: one rank alone may be unable to read it
        results = gather_object([result])
        damage = next((result for result in results if result is not None), None)
        self._verified = folder if damage is None else None
        return damage

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        # None, or transformers would look for optimizer files, DeepSpeed's or FSDP's checkpoint, which don't exist.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            self._load_state(Path(resume_from_checkpoint))
            saved = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME)).best_model_checkpoint
            if self.checkpoint_storage is not None and saved is not None:
                # transformers drops a best checkpoint that is not on this disk.
                self.state.best_model_checkpoint = str(Path(self.args.output_dir) / Path(saved).name)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the weights of a checkpoint. transformers passes over those that a file names otherwise than the model."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        model = self.model if model is None else model
        if isinstance(model, PreTrainedModel) and not self.is_sharded:
            load_saved(model, resume_from_checkpoint)

    def _load_state(self, folder: Path) -> None:
        """Load optimizer, schedule, scaler, and the weights of a sharded model; hyperparameters stay those of the config."""
        manifests = read_manifests(folder)
        # These sums are each rank's own; with another number of workers they are dropped.
        if len(manifests) == self.args.world_size:
            self._resumed_with = manifests[self.args.process_index].get("unlogged")  # absent in older checkpoints
        assert self.lr_scheduler is not None
        # Before the checkpoint's values replace them in the optimizer's groups.
        hyperparameters = read_hyperparameters(self.lr_scheduler)
        with ShardReader(folder, manifests) as reader:
            if self.is_deepspeed_enabled:
                load_zero(self.model_wrapped, manifests[0]["zero"], reader)
            else:
                names = self._trained()
                if self.is_sharded:
                    load_weights(names, reader)
                load_optimizer(self.optimizer, names, manifests[0]["optimizer"], reader)
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))
        apply_hyperparameters(self.lr_scheduler, hyperparameters)
        self._load_scaler(str(folder))

    def _load_best_model(self) -> None:
        """Load the best checkpoint's weights, of a sharded model from its shards.

        Raises:
            ValueError: if the best checkpoint is damaged.
        """
        folder = Path(self.state.best_model_checkpoint)
        if self.checkpoint_storage is not None:
            folder = self.checkpoint_storage.fetch(folder)
            self.state.best_model_checkpoint = str(folder)
        if (damage := self.verify_checkpoint(folder)) is not None:
            raise ValueError(f"the best model can't be had: {damage}")
        if not (self.is_sharded or self.is_deepspeed_enabled):
            # An adapter, which transformers loads by PEFT.
            if not isinstance(self.model, PreTrainedModel):
                return super()._load_best_model()
            load_saved(self.model, folder)
            return None
        with ShardReader(folder, read_manifests(folder)) as reader:
            if self.is_deepspeed_enabled:
                load_zero_weights(self.model_wrapped, reader)
            else:
                load_weights(self._trained(), reader)
        return None


def _age(checkpoint: Path) -> tuple[bool, int, int]:
    """Key by which rotation sorts checkpoints; what is being removed meanwhile comes first."""
    try:
        return is_complete(checkpoint), checkpoint.stat().st_mtime_ns, int(checkpoint.name.rpartition("-")[2])
    except FileNotFoundError:
        return False, 0, 0


def _shape(parameter: Any) -> tuple[int, ...]:
    """Return the shape of the whole parameter, also if DeepSpeed partitioned it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
