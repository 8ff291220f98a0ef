"""The folder of a run: `config.yaml`, `metrics.jsonl`, checkpoints, `model/`, and `run.json` with its state."""

from __future__ import annotations

import contextlib
import json
from functools import partial
from pathlib import PurePosixPath
from typing import Any
from uuid import uuid4

import yaml

from pipeline.config import RunConfig, dump_config, parse_config
from pipeline.errors import RunFailed, UserError
from pipeline.io.outputs import check_output
from pipeline.io.retry import STORAGE_ERRORS, with_retries
from pipeline.io.storage import Folder, Location, inside, is_uri, reason
from pipeline.runs.checkpoints import CHECKPOINT, complete, step_of
from pipeline.runs.resume import changed_settings
from pipeline.runs.scratch import new_scratch
from strategies.plugins import installed_plugins_only

__all__ = ["RunFolder"]

STATE = {"finished": {"prepared", "step"}}
"""Status -> other required keys of `run.json`."""
RUN, CONFIG, METRICS, LEDGER, MODEL = "run.json", "config.yaml", "metrics.jsonl", "ledger.jsonl", "model"
GENERATIONS, COMPLETIONS, PROFILES = "generations", "completions", "profiles"
REPORT, FINDINGS = "report.html", "findings.json"
FORMER_RECORD = "checkpoint_manager_snapshot.json"
"""Ray's record of the checkpoints that earlier versions reported to it. Where there is one, Ray restores it, or fails."""


class RunFolder:
    """`output_dir` of a run: a local path, or a URI as text.

    Raises:
        UserError: for a URI that can't be opened, or holds a key.
    """

    def __init__(self, path: Location) -> None:
        self.path = path
        try:
            check_output(str(path))
            self.storage = Folder(path)
        except UserError as error:
            raise UserError(f"output_dir: {error}") from error
        except STORAGE_ERRORS as error:
            raise UserError(f"output_dir: {str(path)!r} can't be reached: {reason(error)}") from error
        if not self._name or self._parent == ".":
            raise UserError(f"output_dir: {str(path)!r} is a whole store or bucket; give a folder in it")

    @property
    def model(self) -> Location:
        """Path of the trained model or adapter."""
        return inside(self.path, MODEL)

    @property
    def metrics(self) -> Location:
        """Path of `metrics.jsonl`: one JSON record per logging or evaluation step."""
        return inside(self.path, METRICS)

    @property
    def ledger(self) -> Location:
        """Path of `ledger.jsonl`: one JSON record of row ids per optimizer step."""
        return inside(self.path, LEDGER)

    @property
    def config(self) -> Location:
        """Path of the resolved config."""
        return inside(self.path, CONFIG)

    @property
    def _name(self) -> str:
        return PurePosixPath(self.storage.path).name

    @property
    def _parent(self) -> str:
        return str(PurePosixPath(self.storage.path).parent)

    def check_reached(self) -> None:
        """Raise UserError where storage at a URI doesn't answer, before anything else is started for the run."""
        if self.storage.is_local:
            return
        try:
            self.storage.exists(RUN)
        except STORAGE_ERRORS as error:
            raise UserError(f"output_dir: {str(self.path)!r} can't be reached: {reason(error)}") from error

    def check_free(self, cfg: RunConfig, resume: bool) -> None:
        """Check, without writing, that `open` will take the folder.

        Raises:
            UserError: as `open`, and where the folder can't be read.
        """
        try:
            self._refuse_other_files()
            self._refuse_another_run(self.dated(cfg) if resume else cfg, resume)
        except STORAGE_ERRORS as error:
            raise UserError(f"output_dir: {str(self.path)!r} can't be read: {reason(error)}") from error

    def for_ray(self) -> dict[str, Any]:
        """Return arguments of Ray's RunConfig that give workers this folder."""
        filesystem = self.storage.for_other_processes() if is_uri(str(self.path)) else None
        return {"name": self._name, "storage_path": self._parent, "storage_filesystem": filesystem}

    def checkpoints(self) -> list[int]:
        """Return the steps of the complete checkpoints, in ascending order."""
        return sorted(step_of(name) for name in complete(self.storage.filesystem, self.storage.path))

    def state(self) -> dict[str, Any] | None:
        """Read `run.json`; None where there is no run. Raises UserError when it is invalid."""
        state = self.storage.read_json(RUN)
        if state is None:
            return None
        broken = f"{inside(self.path, RUN)} is broken"
        if not isinstance(state, dict) or "status" not in state:
            raise UserError(f"{broken}: it says no status; give the output_dir of another run")
        if missing := sorted(STATE.get(state["status"], set()) - state.keys()):
            raise UserError(f"{broken}: it says no {' and no '.join(missing)}; give the output_dir of another run")
        return state

    def finished_steps(self, of: int | None = None) -> int | None:
        """Return the number of steps of a finished run, or None while there is none.

        Args:
            of: steps that the run should have; None for any. An early-stopped run counts with the steps it was planned for.
        """
        state = self.state()
        # The model is what those need who open a finished run, and a user may have deleted it since.
        if state is None or state["status"] != "finished" or not self.storage.has_folder(MODEL):
            return None
        planned = state.get("total_steps", 0) if state.get("ended_early") else state["step"]
        return state["step"] if of is None or planned >= of else None

    def last_checkpoint(self) -> int:
        """Return the step of the newest complete checkpoint; 0 where there is none, or storage fails."""
        with contextlib.suppress(*STORAGE_ERRORS):
            return max(self.checkpoints(), default=0)
        return 0

    def remains(self, advice: str = "") -> str:
        """Describe what is left of a stopped run, in a phrase, with `advice` where there is a checkpoint."""
        try:
            steps = self.checkpoints()
        except STORAGE_ERRORS as error:
            return f"{str(self.path)!r} can't be read now: {reason(error)}"
        return f"the checkpoint of step {steps[-1]} is complete{advice}" if steps else "no checkpoint was complete yet"

    def changes(self, cfg: RunConfig) -> list[str]:
        """Return the settings that differ between `cfg` and the saved run and mustn't, a line each."""
        text = self.storage.read(CONFIG)
        if text is None:
            return [f"{CONFIG} is missing"]
        with installed_plugins_only():  # the plugins of `cfg` are loaded already
            return changed_settings(parse_config(yaml.safe_load(text), origin=str(self.config)), cfg)

    def dated(self, cfg: RunConfig) -> RunConfig:
        """Return `cfg` with the saved run's `template_date`, unless it has one."""
        saved = yaml.safe_load(self.storage.read(CONFIG) or "") or {}
        day = saved.get("template_date") if isinstance(saved, dict) else None
        return cfg if day is None or cfg.template_date is not None else cfg.model_copy(update={"template_date": day})

    def open(self, cfg: RunConfig, resume: bool) -> None:
        """Prepare the folder for a new run, or for resuming the one in it.

        Raises:
            UserError: when it holds a run and `resume` is False, a run with other settings, or something else, or can't be
                written.
        """
        try:
            # Both before anything is written: a refused folder stays as it was.
            self._refuse_other_files()
            self._refuse_another_run(cfg, resume)
            self.storage.create()
            self.storage.delete(FORMER_RECORD)
            if self.finished_steps() is not None:
                return  # `cfg` may ask for more steps, which is known once the data are prepared
            if not self.checkpoints():
                # Before any other file: without `run.json`, what a killed driver left would be refused as another's files.
                self.storage.write(RUN, _json({"status": "opened"}))
                self._clear()
            self.storage.write(CONFIG, dump_config(cfg))
        except STORAGE_ERRORS as error:
            raise UserError(f"output_dir: {str(self.path)!r} can't be written: {reason(error)}") from error

    def check(self, fingerprint: str, total_steps: int, scores: str | None = None, base: str | None = None) -> None:
        """Check that the run in the folder can be resumed with these inputs.

        Args:
            fingerprint: of the prepared data.
            scores: fingerprint of the reference's cached log-probabilities, if known.
            base: fingerprint of the base model, where checkpoints don't contain all weights, if known.

        Raises:
            UserError: for other data, reference or base model, or without a checkpoint.
        """
        state, finished, path = self.state() or {}, self.finished_steps(), str(self.path)
        if finished is None and not self.checkpoints():
            return
        saved_data, saved_scores = state.get("prepared"), state.get("scores")
        if saved_data != fingerprint:
            raise UserError(
                f"--resume: the data have changed: the run in {path!r} was trained on the prepared data "
                f"{saved_data}, and now they are {fingerprint}; give another output_dir"
            )
        # None where the reference isn't cached (`reference` may change when a run is resumed), or not scored yet.
        if None not in (saved_scores, scores) and saved_scores != scores:
            raise UserError(
                f"--resume: the reference has changed: the run in {path!r} was trained beside the scores {saved_scores}, and "
                f"now they are {scores}; give another output_dir"
            )
        if None not in (state.get("base"), base) and state["base"] != base:
            raise UserError(
                f"--resume: the base model has changed: the run in {path!r} started from the weights {state['base']}, and now "
                f"there are {base} in their place; put them back, or give another output_dir"
            )
        # A finished run is resumed only to train more steps than it has.
        if finished is not None and not self.checkpoints():
            raise UserError(
                f"--resume: the run in {path!r} has finished with step {finished} and left no checkpoint to "
                f"continue from up to step {total_steps}; give another output_dir"
            )

    @property
    def run_id(self) -> str:
        """Id of the run, which stays when it is resumed; empty before its start."""
        return self.known().get("id", "")

    def known(self) -> dict[str, Any]:
        """Read `run.json`, with retries; empty where there is no run.

        Raises:
            RunFailed: when storage has failed for minutes.
        """
        try:
            return with_retries(self.state, f"reading {inside(self.path, RUN)}") or {}
        except STORAGE_ERRORS as error:
            raise RunFailed(f"{inside(self.path, RUN)} can't be read: {reason(error)}") from error

    def write_config(self, cfg: RunConfig) -> None:
        """Write `config.yaml`, with retries. Raises RunFailed when storage has failed for minutes, or is full."""
        self._write_patiently(CONFIG, dump_config(cfg))

    def start(self, fingerprint: str, total_steps: int, scores: str | None = None, base: str | None = None) -> None:
        """Record the run's inputs before its workers start; arguments and errors are those of `check`."""
        with_retries(partial(self.check, fingerprint, total_steps, scores, base), f"reading {self.path}")
        # The id stays when a run is resumed: workers know by it whose last step a scratch folder notes.
        before = self.known()
        run = before.get("id") or uuid4().hex
        inputs = {"id": run, "prepared": fingerprint, "scores": scores, "base": base}
        # A killed driver's scratch folder may be removed; that of a run of which this folder is a copy may be in use.
        former = before.get("scratch") if before.get("folder") == str(self.path) else None
        scratch = {"folder": str(self.path), "scratch": new_scratch(), "former_scratch": former}
        events = {"events": before.get("events", []), "saved": before.get("saved")}
        self._write_patiently(RUN, _json({"status": "started", **inputs, **scratch, "total_steps": total_steps, **events}))

    def finish(self, step: int, best_metric: float | None, ended_early: bool = False) -> None:
        """Record that the run has ended, by its number of steps or by early stopping."""
        # Read again: `RunEvents` has written to it since `start`.
        state = with_retries(self.state, f"reading {inside(self.path, RUN)}")
        assert state is not None
        ended = {"status": "finished", "step": step, "best_metric": best_metric, "ended_early": ended_early}
        self._write_patiently(RUN, _json({**state, **ended}))

    def write_state(self, state: dict[str, Any]) -> None:
        """Write `run.json`. Raises `STORAGE_ERRORS`."""
        self.storage.write(RUN, _json(state))

    def _write_patiently(self, name: str, text: str) -> None:
        """Write a file, with retries.

        Raises:
            RunFailed: when storage has failed for minutes, or is full.
        """
        try:
            with_retries(partial(self.storage.write, name, text), f"writing {inside(self.path, name)}")
        except STORAGE_ERRORS as error:
            raise RunFailed(f"{inside(self.path, name)} can't be written: {reason(error)}") from error

    def _refuse_other_files(self) -> None:
        """Refuse a folder with other files than a run's, which mustn't be cleared or overwritten."""
        others = [name for name in self.storage.names() if not name.startswith(".")]
        if others and self.state() is None:
            names = ", ".join(sorted(others)[:3])
            raise UserError(
                f"output_dir: {str(self.path)!r} is not empty ({names}) and holds no run; give another folder, or empty it"
            )

    def _refuse_another_run(self, cfg: RunConfig, resume: bool) -> None:
        steps, finished, state = self.checkpoints(), self.finished_steps(), self.state() or {}
        if not steps and finished is None:
            if state.get("status") == "finished":
                raise UserError(
                    f"output_dir: {str(self.path)!r} holds what a run of {state['step']} steps has left, and its {MODEL}/ "
                    "isn't there any more; put it back, give another output_dir, or delete this one"
                )
            return
        if not resume:
            held = f"a finished run of {finished} steps" if finished is not None else f"a run stopped after step {steps[-1]}"
            raise UserError(
                f"output_dir: {str(self.path)!r} holds {held}; continue it with --resume, give another output_dir, or delete it"
            )
        if lines := "".join(f"\n  {line}" for line in self.changes(cfg)):
            raise UserError(f"--resume: {str(self.path)!r} holds a run with other settings; give it another output_dir{lines}")

    def _clear(self) -> None:
        """Delete the files of a run without a complete checkpoint, which can't be resumed."""
        for name in (METRICS, LEDGER, GENERATIONS, COMPLETIONS, PROFILES, REPORT, FINDINGS):
            self.storage.delete(name)
        for orphan in self.storage.names():
            if orphan.startswith(CHECKPOINT):
                self.storage.delete(orphan)


def _json(state: dict[str, Any]) -> str:
    return json.dumps(state, indent=2) + "\n"
