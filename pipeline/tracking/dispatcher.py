"""Calls the trackers of a run or sweep: each starts it once, logs every record once, and ends it with its status."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import textwrap
import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from pipeline.config import RunConfig
from pipeline.errors import RunCancelled, RunStopped, UserError
from pipeline.io.retry import STORAGE_ERRORS, with_retries
from pipeline.io.storage import Folder, inside
from pipeline.runs.folder import METRICS
from pipeline.runs.metrics import MetricsFile, identity
from pipeline.secrets import redact_text
from pipeline.tracking.tracker import EndStatus, Tracker, TrialInfo
from pipeline.ui.display import Display
from strategies.config.trackers import TRACKER_NAMES, used_trackers

__all__ = ["TRACKERS", "TrackerThread", "Tracking", "check_trackers", "tracker_variables"]

TRACKERS: dict[str, type[Tracker]] = {name: import_module(f"pipeline.tracking.{name}").TRACKER for name in TRACKER_NAMES}
"""NAME of each config key `use_NAME` -> the tracker in `NAME.py`."""
ATTEMPTS = 3
"""Attempts per call; the trackers' libraries retry too."""
PAUSE_S = 10.0
SAVED = "trackers.json"
CLOSE_WITHIN_S: dict[EndStatus, float] = {"finished": 300.0, "failed": 30.0, "killed": 15.0}
"""How long a run that has ended waits for a tracker."""
UPLOAD_WITHIN_S = 4 * 3600.0
"""The same, for a finished run whose model is uploaded."""


def check_trackers(cfg: RunConfig) -> None:
    """Check before anything starts that all trackers can be used.

    Raises:
        UserError: for a missing package or API key, or an unreachable server.
    """
    for name in used_trackers(cfg):
        package = TRACKERS[name].package
        if find_spec(package) is None:
            raise UserError(
                f"use_{name}: {package} is not installed; pip install 'prefray[trackers]', or remove the tracker's keys"
            )
        TRACKERS[name].check(cfg)


def tracker_variables(cfg: RunConfig) -> dict[str, str]:
    """Return the environment variables that other processes need to report to the same trackers."""
    prefixes = tuple(prefix for tracker in TRACKERS.values() for prefix in tracker.variables)
    return {name: os.environ[name] for name in os.environ if name.startswith(prefixes)} if used_trackers(cfg) else {}


def attempt(call: Callable[[], None]) -> Exception | None:
    """Call a tracker; return what it raised."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - libraries raise what they like, and training doesn't depend on them
        return error
    return None


class TrackerThread:
    """Calls one tracker in order in a thread, so that a slow or broken one doesn't delay training.

    Args:
        tracker: the tracker, already started.
        note: receives messages for the user.
        subject: name of what continues when the tracker fails, in messages.
    """

    def __init__(self, tracker: Tracker, note: Callable[[str], None], subject: str = "training") -> None:
        self.tracker, self._note, self._subject = tracker, note, subject
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._lost, self._has_failed, self._closing = 0, False, threading.Event()
        # A daemon: a library that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name=f"to {tracker.label}", daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], None]) -> None:
        """Queue a call; it is dropped after three failures."""
        self._calls.put(call)

    def close(self, call: Callable[[], None], within_s: float) -> None:
        """Queue the last call, and wait until all calls are done."""
        self._calls.put(call)
        self._calls.put(None)
        self._closing.set()
        self._thread.join(timeout=within_s)
        if self._thread.is_alive():
            self._note(f"{self.tracker.label} hasn't taken everything within {within_s:.0f} s; the rest is left out")
        elif self._lost:
            self._note(f"{self.tracker.label} hasn't taken {self._lost} of the things that it was told")

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            for _ in range(ATTEMPTS):
                if (error := attempt(call)) is None:
                    break
                if not self._has_failed:
                    why = textwrap.shorten(redact_text(f"{type(error).__name__}: {error}"), 300, placeholder=" ...")
                    self._note(f"{self.tracker.label} has failed, {self._subject} goes on: {why}")
                self._has_failed = True
                # No pause once the run has ended: then its user waits.
                self._closing.wait(PAUSE_S)
            else:
                self._lost += 1


class Tracking:
    """The trackers of one run, or of a sweep: then only those that nest trials in the sweep's run.

    Args:
        cfg: the recipe.
        folder: the run's folder, in which ids of its tracker runs are saved.
        resume: resume the run in the folder; known before the folder is opened.
        trial: set if the run is a trial. A sweep doesn't fail for its trials' trackers: errors at the start become notes.
        is_sweep: whether this is a sweep.
        saved: ids of tracker runs from another file: sweeps of earlier versions have them in `sweep.json`.
    """

    def __init__(
        self,
        cfg: RunConfig,
        folder: Folder,
        resume: bool,
        trial: TrialInfo | None = None,
        is_sweep: bool = False,
        saved: dict[str, Any] | None = None,
    ) -> None:
        self._cfg, self._folder, self._trial, self._is_sweep = cfg, folder, trial, is_sweep
        self._names = [name for name in used_trackers(cfg) if TRACKERS[name].nests_trials or not is_sweep]
        self._threads: dict[str, TrackerThread] = {}
        self._notes: deque[str] = deque()
        self._saved: dict[str, Any] = saved or {}
        logged: set[tuple[int, str]] = set()
        if resume and self._names:
            with contextlib.suppress(*STORAGE_ERRORS):  # the run itself reports them
                self._saved |= json.loads(folder.read(SAVED) or "{}")
                logged = {identity(record) for record in MetricsFile(inside(folder.where, METRICS)).read()}
        # A tracker that the run didn't have before gets its whole history.
        self._logged = {name: set(logged) if name in self._saved else set() for name in self._names}

    @property
    def ids(self) -> dict[str, str]:
        """Tracker -> id of its run, for the trackers that have started."""
        return {name: thread.tracker.saved["id"] for name, thread in self._threads.items()}

    @contextlib.contextmanager
    def running(self, display: Display) -> Iterator[None]:
        """Start the trackers; end their runs with the status of the body.

        Raises:
            UserError: when a tracker can't start its run.
        """
        # Until the body shows otherwise: any other exception is a failure.
        status: EndStatus = "failed"
        try:
            self._start(display)
            yield
            status = "finished"
        except (RunCancelled, RunStopped, KeyboardInterrupt):
            status = "killed"
            raise
        finally:
            for thread in self._threads.values():
                uploads = status == "finished" and thread.tracker.uploads_models()
                thread.close(partial(thread.tracker.finish, status), UPLOAD_WITHIN_S if uploads else CLOSE_WITHIN_S[status])
            for note in self.notes():
                display.note(note)

    def log(self, records: list[dict[str, Any]]) -> None:
        """Log new records: a run that resumes from a checkpoint repeats some."""
        for name, thread in self._threads.items():
            if new := [record for record in records if identity(record) not in self._logged[name]]:
                # When it is submitted: a retry is the thread's matter, and a record that is dropped there is not sent again.
                self._logged[name].update(map(identity, new))
                thread.submit(partial(thread.tracker.log, new))

    def add_checkpoint(self, name: str) -> None:
        """Report a checkpoint that is complete."""
        for thread in self._threads.values():
            thread.submit(partial(thread.tracker.add_checkpoint, name))

    def add_result(self, metrics: dict[str, float], names: list[str]) -> None:
        """Report a sweep's best trial by its metrics, and files of the sweep's folder."""
        for thread in self._threads.values():
            thread.submit(partial(self._add_result, thread.tracker, metrics, names))

    def _add_result(self, tracker: Tracker, metrics: dict[str, float], names: list[str]) -> None:
        """Runs in the tracker's thread, so that storage that fails is tried again as the tracker is."""
        tracker.add_result(metrics, {name: text for name in names if (text := self._folder.read(name)) is not None})

    def notes(self) -> list[str]:
        """Return and clear the messages for the user since the last call."""
        return [self._notes.popleft() for _ in range(len(self._notes))]

    def _start(self, display: Display) -> None:
        what, subject = ("the sweep's run", "the sweep") if self._is_sweep else ("the run", "training")
        for name in self._names:
            tracker = TRACKERS[name](self._cfg, self._folder, self._trial, self._saved.get(name, {}))
            if (error := attempt(tracker.start)) is not None:
                why = f"{tracker.label} can't begin {what}: {redact_text(str(error) or type(error).__name__)}"
                if self._trial is None:
                    raise UserError(f"use_{name}: {why}") from error
                self._notes.append(why)
                continue
            self._saved[name] = tracker.saved
            self._threads[name] = TrackerThread(tracker, self._notes.append, subject)
            if tracker.link is not None:
                display.note(f"{tracker.label}: {tracker.link}")
        if self._names:
            # Before training: the run of a killed driver is resumed in the trackers too.
            text = json.dumps(self._saved, indent=2) + "\n"
            with_retries(partial(self._folder.write, SAVED, text), f"writing {SAVED}")
