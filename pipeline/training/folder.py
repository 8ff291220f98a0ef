"""The folder of a run: `config.yaml`, `metrics.jsonl`, checkpoints, `model/`, and `run.json` with where it stands."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pyarrow import fs

from pipeline.config import RunConfig, dump_config, parse_config
from pipeline.errors import UserError
from pipeline.training.checkpoints import CHECKPOINT, RAY_STATE, complete, step_of

__all__ = ["RunFolder"]

RUN = "run.json"
# What may differ between a run and its continuation: how long, how often, where; not what is trained. How a global batch
# is cut into workers and forwards may differ too, as long as its size stays.
MAY_DIFFER = {
    "dataloader_num_workers",
    "dataset_num_proc",
    "dataset_prepared_path",
    "eval_steps",
    "evals_per_epoch",
    "gradient_accumulation_steps",
    "logging_steps",
    "max_rejected_fraction",
    "max_steps",
    "micro_batch_size",
    "nonfinite_loss",
    "num_epochs",
    "output_dir",
    "ray",
    "ray_num_workers",
    "reference",
    "resources_per_worker",
    "sample_packing",
    "save_steps",
    "save_total_limit",
    "saves_per_epoch",
    "tokens_per_forward",
}


@dataclass(frozen=True)
class RunFolder:
    """`output_dir` of a run."""

    path: Path

    @property
    def model(self) -> Path:
        """The finished model or adapter."""
        return self.path / "model"

    @property
    def metrics(self) -> Path:
        """One JSON record per logging or evaluation step."""
        return self.path / "metrics.jsonl"

    @property
    def ledger(self) -> Path:
        """One JSON record per optimizer step: the rows that it was taken on."""
        return self.path / "ledger.jsonl"

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    def checkpoints(self) -> list[int]:
        """Steps of the complete checkpoints, in order: those that every rank has stored its part of."""
        return sorted(step_of(name) for name in complete(fs.LocalFileSystem(), str(self.path)))

    def state(self) -> dict[str, Any] | None:
        """What `run.json` says; None where there is no run."""
        try:
            return json.loads((self.path / RUN).read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None

    def finished_steps(self) -> int | None:
        """Steps of the finished run, or None while there is none."""
        state = self.state()
        return state["step"] if state is not None and state["status"] == "finished" and self.model.is_dir() else None

    def open(self, cfg: RunConfig, resume: bool) -> None:
        """Make the folder ready for a run, or for the continuation of the one that it holds.

        Raises:
            UserError: when it holds a run and `resume` is not asked for, when that run was another one, when it holds
                something else, or when it can't be written.
        """
        self._refuse_what_is_not_ours()
        self._refuse_another_run(cfg, resume)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not self.checkpoints() and self.finished_steps() is None:
                self._clear()
                self._write({"status": "opened"})
            self.config.write_text(dump_config(cfg), encoding="utf-8")
        except OSError as error:
            raise UserError(f"output_dir: {str(self.path)!r} can't be written: {error.strerror}") from error

    def check(self, fingerprint: str, total_steps: int, scores: str | None = None) -> None:
        """Refuse what the run that the folder holds can't be continued with.

        Args:
            fingerprint: of the prepared data.
            scores: fingerprint of the reference's log-probabilities, where they are cached and known yet.

        Raises:
            UserError: for other data, another reference, or want of a checkpoint.
        """
        state, finished, path = self.state() or {}, self.finished_steps(), str(self.path)
        if finished is None and not self.checkpoints():
            return
        trained_on, beside = state.get("prepared"), state.get("scores")
        if trained_on != fingerprint:
            raise UserError(
                f"--resume: the data have changed: the run in {path!r} was trained on the prepared data "
                f"{trained_on}, and now they are {fingerprint}; give another output_dir"
            )
        if None not in (beside, scores) and beside != scores:
            raise UserError(
                f"--resume: the reference has changed: the run in {path!r} was trained beside the scores {beside}, and now "
                f"they are {scores}; give another output_dir"
            )
        if finished is not None and not self.checkpoints():
            raise UserError(
                f"--resume: the run in {path!r} has finished with step {finished} and left no checkpoint to "
                f"continue from up to step {total_steps}; give another output_dir"
            )

    def start(self, fingerprint: str, total_steps: int, scores: str | None = None) -> None:
        """Record what a run trains on, before its workers start; arguments and errors are those of `check`."""
        self.check(fingerprint, total_steps, scores)
        self._write({"status": "started", "prepared": fingerprint, "scores": scores, "total_steps": total_steps})

    def finish(self, step: int, best_metric: float | None) -> None:
        """Record that the run has ended."""
        state = self.state()
        assert state is not None
        self._write({**state, "status": "finished", "step": step, "best_metric": best_metric})

    def _write(self, state: dict[str, Any]) -> None:
        (self.path / RUN).write_text(json.dumps(state, indent=2) + "\n")

    def _refuse_what_is_not_ours(self) -> None:
        """A folder that holds anything but a run is nobody's to clear or to overwrite."""
        try:
            others = [path.name for path in self.path.iterdir() if not path.name.startswith(".")]
        except (FileNotFoundError, NotADirectoryError):
            return
        if others and self.state() is None:
            names = ", ".join(sorted(others)[:3])
            raise UserError(
                f"output_dir: {str(self.path)!r} is not empty ({names}) and holds no run; give another folder, or empty it"
            )

    def _refuse_another_run(self, cfg: RunConfig, resume: bool) -> None:
        steps, finished = self.checkpoints(), self.finished_steps()
        if not steps and finished is None:
            return
        if not resume:
            state = f"a finished run of {finished} steps" if finished is not None else f"a run stopped after step {steps[-1]}"
            raise UserError(
                f"output_dir: {str(self.path)!r} holds {state}; continue it with --resume, give another output_dir, "
                "or delete it"
            )
        was = parse_config(yaml.safe_load(self.config.read_text(encoding="utf-8")), origin=str(self.config))
        saved, given = _settings(was), _settings(cfg)
        different = sorted(k for k in saved.keys() | given.keys() if saved.get(k) != given.get(k) and k not in MAY_DIFFER)
        if different:
            lines = "".join(f"\n  {key}: was {saved.get(key)!r}, is {given.get(key)!r}" for key in different)
            raise UserError(f"--resume: {str(self.path)!r} holds a run with other settings; give it another output_dir{lines}")

    def _clear(self) -> None:
        """Remove what a run without a complete checkpoint has left: nothing of it can be continued."""
        for name in (RAY_STATE, "metrics.jsonl", "ledger.jsonl", RUN):
            (self.path / name).unlink(missing_ok=True)
        for orphan in self.path.glob(f"{CHECKPOINT}*"):
            shutil.rmtree(orphan)


def _settings(cfg: RunConfig) -> dict[str, Any]:
    """What a continuation is compared by: every key, and the global batch that follows from three of them."""
    batch = cfg.micro_batch_size * cfg.gradient_accumulation_steps * cfg.num_workers
    return {**cfg.model_dump(mode="json", exclude_none=True), "global batch": batch}
