"""What of a worker's reports and errors reaches the driver, and what ends a run at once."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pipeline.errors import UserError
from pipeline.runs.events import RunEvents
from pipeline.runs.folder import RunFolder
from pipeline.training.controller_callback import ForwardEvents
from pipeline.training.events import StepReport, WorkersFailed
from pipeline.training.run_log import RunLogger
from strategies.outside import OutsideError


class Recorded(list[Any]):
    """A channel."""

    def put(self, event: Any) -> None:
        self.append(event)


class Full(Recorded):
    """A channel whose disk is full for a while."""

    is_full = True

    def put(self, event: Any) -> None:
        if self.is_full:
            raise OSError(28, "No space left on device")
        super().put(event)


def test_a_run_does_not_end_because_the_disk_of_its_events_is_full() -> None:
    channel = Full()
    forward = ForwardEvents(cast("Any", channel))
    for step in (1, 2):
        forward.after_report(None, [{"report": StepReport(step, [], [])}], None)
    forward.after_exception(None, {0: RuntimeError("a worker died")})
    assert channel == []
    channel.is_full = False
    forward.after_report(None, [{"report": StepReport(3, [], [])}], None)
    assert [getattr(event, "step", None) for event in channel] == [1, 2, None, 3]


REFUSALS = [kind("row 7 is too long") for kind in (ValueError, UserError, OutsideError)]


@pytest.mark.parametrize("refusal", REFUSALS)
def test_input_that_a_worker_refuses_is_not_tried_again(refusal: Exception) -> None:
    """Ray restarts after what workers raise, not after what is raised here."""
    channel = Recorded()
    with pytest.raises(UserError, match="row 7 is too long"):
        ForwardEvents(cast("Any", channel)).after_exception(None, {0: RuntimeError("Connection closed by peer"), 1: refusal})
    assert channel == []


def test_what_may_go_well_the_next_time_is_told() -> None:
    channel = Recorded()
    cut_off = json.JSONDecodeError("Expecting value", "", 0)
    ForwardEvents(cast("Any", channel)).after_exception(None, {0: RuntimeError("out\n  of memory"), 1: cut_off})
    [event] = channel
    assert isinstance(event, WorkersFailed) and event.died == []
    assert event.failures == {
        0: "RuntimeError: out of memory",
        1: "JSONDecodeError: Expecting value: line 1 column 1 (char 0)",
    }


@pytest.mark.parametrize("is_resumed", [False, True])
def test_a_checkpoint_is_shown_and_tracked_once(tmp_path: Path, is_resumed: bool) -> None:
    """Restarted workers report the checkpoint that they start from again; that of a resumed run has been shown before."""
    folder = RunFolder(tmp_path / "run")
    folder.storage.create()
    folder.start("data", 12)
    if is_resumed:
        RunEvents(folder).note_saved("a")
        folder.start("data", 12)
    shown, tracked = list[str](), list[str]()
    tracking = SimpleNamespace(log=lambda records: None, add_checkpoint=tracked.append)
    plan = SimpleNamespace(folder=folder, events=RunEvents(folder), tracking=tracking)
    hangs = SimpleNamespace(record_progress=lambda step: None)
    logger = RunLogger(cast("Any", plan), cast("Any", SimpleNamespace(saved=shown.append)), cast("Any", hangs))
    reports = (("a", 5), (None, 6), ("b", 9), ("b", 9), ("c", 12))
    logger.handle_events(StepReport(step, [], [], checkpoint=name) for name, step in reports)
    assert shown == tracked == (["b", "c"] if is_resumed else ["a", "b", "c"])
