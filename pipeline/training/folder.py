"""The folder of a run: `config.yaml`, `metrics.jsonl`, checkpoints, `model/`, and `run.json` with where it stands."""

from __future__ import annotations

import contextlib
import json
from functools import partial
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import yaml

from pipeline.config import RunConfig, dump_config, parse_config
from pipeline.errors import RunFailed, UserError
from pipeline.patience import STORAGE_ERRORS, patiently
from pipeline.storage import Folder, Location, inside, is_uri, reason
from pipeline.training.checkpoints import CHECKPOINT, RAY_STATE, complete, step_of
from pipeline.training.continuation import changed_settings

__all__ = ["RunFolder"]

STATE = {"finished": {"prepared", "step"}}
"""Status -> what else `run.json` says then."""
RUN, CONFIG, METRICS, LEDGER, MODEL = "run.json", "config.yaml", "metrics.jsonl", "ledger.jsonl", "model"
GENERATIONS, COMPLETIONS, REPORT = "generations", "completions", "report.html"


class RunFolder:
    """`output_dir` of a run: a local path, or a URI as text.

    Raises:
        UserError: when there is no way to a URI.
    """

    def __init__(self, path: Location) -> None:
        self.path = path
        try:
            _refuse_secrets(str(path))
            self.storage = Folder(path)
        except UserError as error:
            raise UserError(f"output_dir: {error}") from error
        except STORAGE_ERRORS as error:
            raise UserError(f"output_dir: {str(path)!r} can't be reached: {reason(error)}") from error
        if not self._name or self._parent == ".":
            raise UserError(f"output_dir: {str(path)!r} is a whole store or bucket; give a folder in it")

    @property
    def model(self) -> Location:
        """The finished model or adapter."""
        return inside(self.path, MODEL)

    @property
    def metrics(self) -> Location:
        """One JSON record per logging or evaluation step."""
        return inside(self.path, METRICS)

    @property
    def ledger(self) -> Location:
        """One JSON record per optimizer step: the rows that it was taken on."""
        return inside(self.path, LEDGER)

    @property
    def config(self) -> Location:
        """The resolved config."""
        return inside(self.path, CONFIG)

    @property
    def _name(self) -> str:
        return PurePosixPath(self.storage.path).name

    @property
    def _parent(self) -> str:
        return str(PurePosixPath(self.storage.path).parent)

    def for_ray(self) -> dict[str, Any]:
        """Arguments of Ray's RunConfig that let it keep checkpoints here."""
        filesystem = self.storage.for_other_processes() if is_uri(str(self.path)) else None
        return {"name": self._name, "storage_path": self._parent, "storage_filesystem": filesystem}

    def checkpoints(self) -> list[int]:
        """Steps of the complete checkpoints, in order: those that every rank has stored its part of."""
        return sorted(step_of(name) for name in complete(self.storage.filesystem, self.storage.path))

    def state(self) -> dict[str, Any] | None:
        """What `run.json` says; None where there is no run. Raises UserError when it is broken."""
        state = self.storage.read_json(RUN)
        if state is None:
            return None
        broken = f"{inside(self.path, RUN)} is broken"
        if not isinstance(state, dict) or "status" not in state:
            raise UserError(f"{broken}: it says no status; give the output_dir of another run")
        if missing := sorted(STATE.get(state["status"], set()) - state.keys()):
            raise UserError(f"{broken}: it says no {' and no '.join(missing)}; give the output_dir of another run")
        return state

    def finished_steps(self) -> int | None:
        """Steps of the finished run, or None while there is none."""
        state = self.state()
        if state is None or state["status"] != "finished" or not self.storage.has_folder(MODEL):
            return None
        return state["step"]

    def last_checkpoint(self) -> int:
        """Step of the newest complete checkpoint; 0 where there is none, or none can be seen now."""
        with contextlib.suppress(*STORAGE_ERRORS):
            return max(self.checkpoints(), default=0)
        return 0

    def remains(self, advice: str = "") -> str:
        """What a run that was stopped has left, in a phrase, and `advice` where something can be done with it."""
        try:
            steps = self.checkpoints()
        except STORAGE_ERRORS as error:
            return f"{str(self.path)!r} can't be read now: {reason(error)}"
        return f"the checkpoint of step {steps[-1]} is complete{advice}" if steps else "no checkpoint was complete yet"

    def changes(self, cfg: RunConfig) -> list[str]:
        """Settings, a line each, by which `cfg` would train something else than the run that the folder holds."""
        text = self.storage.read(CONFIG)
        if text is None:
            return [f"{CONFIG} is missing"]
        return changed_settings(parse_config(yaml.safe_load(text), origin=str(self.config)), cfg)

    def open(self, cfg: RunConfig, resume: bool) -> None:
        """Make the folder ready for a run, or for the continuation of the one that it holds.

        Raises:
            UserError: when it holds a run and `resume` is not asked for, when that run was another one, when it holds
                something else, or when it can't be written.
        """
        try:
            self._refuse_what_is_not_ours()
            self._refuse_another_run(cfg, resume)
            self.storage.create()
            if not self.checkpoints() and self.finished_steps() is None:
                self._clear()
                self.storage.write(RUN, _json({"status": "opened"}))
            self.storage.write(CONFIG, dump_config(cfg))
        except STORAGE_ERRORS as error:
            raise UserError(f"output_dir: {str(self.path)!r} can't be written: {reason(error)}") from error

    def check(self, fingerprint: str, total_steps: int, scores: str | None = None, base: str | None = None) -> None:
        """Refuse what the run that the folder holds can't be continued with.

        Args:
            fingerprint: of the prepared data.
            scores: fingerprint of the reference's log-probabilities, where they are cached and known yet.
            base: fingerprint of the base model, where checkpoints don't hold all of it and it is known yet.

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
        if None not in (state.get("base"), base) and state["base"] != base:
            raise UserError(
                f"--resume: the base model has changed: the run in {path!r} started from the weights {state['base']}, and now "
                f"there are {base} in their place; put them back, or give another output_dir"
            )
        if finished is not None and not self.checkpoints():
            raise UserError(
                f"--resume: the run in {path!r} has finished with step {finished} and left no checkpoint to "
                f"continue from up to step {total_steps}; give another output_dir"
            )

    @property
    def run_id(self) -> str:
        """Of the run that was started in this folder, also after it was resumed; empty before."""
        return self.known().get("id", "")

    def known(self) -> dict[str, Any]:
        """What `run.json` says, however long storage takes; empty where there is no run.

        Raises:
            RunFailed: when it has failed for minutes.
        """
        try:
            return patiently(self.state, f"reading {inside(self.path, RUN)}") or {}
        except STORAGE_ERRORS as error:
            raise RunFailed(f"{inside(self.path, RUN)} can't be read: {reason(error)}") from error

    def start(self, fingerprint: str, total_steps: int, scores: str | None = None, base: str | None = None) -> None:
        """Record what a run trains on, before its workers start; arguments and errors are those of `check`."""
        patiently(partial(self.check, fingerprint, total_steps, scores, base), f"reading {self.path}")
        before = self.known()
        known = {"id": before.get("id") or uuid4().hex, "prepared": fingerprint, "scores": scores, "base": base}
        events = {"events": before.get("events", [])}
        self._write_patiently({"status": "started", **known, "total_steps": total_steps, **events})

    def finish(self, step: int, best_metric: float | None) -> None:
        """Record that the run has ended."""
        state = patiently(self.state, f"reading {inside(self.path, RUN)}")
        assert state is not None
        self._write_patiently({**state, "status": "finished", "step": step, "best_metric": best_metric})

    def write_state(self, state: dict[str, Any]) -> None:
        """Write `run.json`. Raises what storage raises."""
        self.storage.write(RUN, _json(state))

    def _write_patiently(self, state: dict[str, Any]) -> None:
        """Write `run.json`, when storage fails later.

        Raises:
            RunFailed: when it has failed for minutes, or is full.
        """
        try:
            patiently(partial(self.write_state, state), f"writing {inside(self.path, RUN)}")
        except STORAGE_ERRORS as error:
            raise RunFailed(f"{inside(self.path, RUN)} can't be written: {reason(error)}") from error

    def _refuse_what_is_not_ours(self) -> None:
        """A folder that holds anything but a run is nobody's to clear or to overwrite."""
        others = [name for name in self.storage.names() if not name.startswith(".")]
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
        if lines := "".join(f"\n  {line}" for line in self.changes(cfg)):
            raise UserError(f"--resume: {str(self.path)!r} holds a run with other settings; give it another output_dir{lines}")

    def _clear(self) -> None:
        """Remove what a run without a complete checkpoint has left: nothing of it can be continued."""
        for name in (RAY_STATE, METRICS, LEDGER, GENERATIONS, COMPLETIONS, REPORT, RUN):
            self.storage.delete(name)
        for orphan in self.storage.names():
            if orphan.startswith(CHECKPOINT):
                self.storage.delete(orphan)


def _json(state: dict[str, Any]) -> str:
    return json.dumps(state, indent=2) + "\n"


def _refuse_secrets(where: str) -> None:
    """A URI is written to config.yaml, and shown."""
    if is_uri(where) and urlsplit(where).password is not None:
        raise UserError(
            "the URI holds a key, and is written to config.yaml; leave it out, and give keys in the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for S3)"
        )
