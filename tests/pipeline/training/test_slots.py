"""Runs in the slots of hosts: who gets which, and what becomes of a run that ends there."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cluster.config import ClusterKeys
from pipeline.errors import RunCancelled, RunFailed, UserError
from pipeline.io.holder import here
from pipeline.io.storage import locate
from pipeline.ray.channel import NodeChannel
from pipeline.training import host as hosts
from pipeline.training import slot_launch
from pipeline.training.events import SlotEnded, StepReport, merged
from pipeline.training.host import Hosts
from pipeline.training.host_worker import _described, _is_of_device
from pipeline.training.hosted_run import HostedRun
from pipeline.training.signals import SigtermHandler
from pipeline.training.slot_commands import receive, received
from pipeline.training.slot_launch import SlotLauncher, SlotLeft, SlotUnwanted, SlotWanted, train_in_slot
from strategies.slots import CantShare, Ended
from tests.waiting import wait_for


class Host:
    """A host that only remembers which runs it was given."""

    def __init__(self, plan: Any, number: int, note: Any, outbox: Any, starts: Any, takes_turns: bool = False) -> None:
        self.plan, self.number, self.takes_turns = plan, number, takes_turns
        self.runs: dict[str, HostedRun] = {}
        self.returned: list[HostedRun] = []
        self.stopped: list[str] = []
        self.has_ended = False

    @property
    def has_room(self) -> bool:
        return len(self.runs) < self.plan.slots

    def attach(self, run: HostedRun) -> None:
        self.runs[run.name] = run

    def stop(self, name: str) -> None:
        self.stopped.append(name)

    def release(self, name: str) -> None:
        self.runs.pop(name, None)


def wanted(name: str, folder: str | None = None) -> SlotWanted:
    job: Any = SimpleNamespace(cfg=SimpleNamespace(output_dir=folder or name))
    return SlotWanted(name, job, NodeChannel(Path("nowhere")), here())


@pytest.fixture
def two_hosts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hosts:
    monkeypatch.chdir(tmp_path)
    Path("nowhere").mkdir()
    monkeypatch.setattr(hosts, "Host", Host)
    plan: Any = SimpleNamespace(hosts=2, slots=2)
    return Hosts(plan, NodeChannel(Path("nowhere")), lambda text: None)


def ask(to: Hosts, *requests: Any) -> list[list[str]]:
    for request in requests:
        to._handle(request)
    to._assign()
    return [list(host.runs) for host in to.hosts]


def test_a_run_that_begins_again_keeps_its_failures(two_hosts: Hosts) -> None:
    ask(two_hosts, SlotWanted("a", wanted("a").job, NodeChannel(Path("nowhere")), here(), 2))
    assert two_hosts.hosts[0].runs["a"].failures == 2


def test_runs_are_spread_over_hosts_and_wait_for_slots(two_hosts: Hosts) -> None:
    assert ask(two_hosts, wanted("a")) == [["a"]]
    assert ask(two_hosts, *map(wanted, "bcde")) == [["a", "c"], ["b", "d"]]
    assert ask(two_hosts, SlotUnwanted("d"), wanted("f")) == [["a", "c"], ["b", "d"]]
    assert [host.stopped for host in two_hosts.hosts] == [["d"], ["d"]]  # whichever has it
    del two_hosts.hosts[0].runs["a"]
    assert ask(two_hosts, SlotUnwanted("e")) == [["c", "f"], ["b", "d"]]


def test_the_host_that_replaces_one_takes_turns_as_that_one_did(
    two_hosts: Hosts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Host, "poll", lambda self: None, raising=False)
    two_hosts.channel = NodeChannel(tmp_path)
    ask(two_hosts, wanted("a"), wanted("b"))
    first: Any = two_hosts.hosts[0]
    first.takes_turns = first.has_ended = True
    two_hosts._step()
    assert ask(two_hosts, wanted("c"), wanted("d")) == [["b", "d"], ["c"]] and not two_hosts.hosts[1].takes_turns
    again: Any = two_hosts.hosts[1]
    again.takes_turns = again.has_ended = True
    again.returned, again.runs = list(again.runs.values()), {}
    two_hosts._step()
    assert [list(host.runs) for host in two_hosts.hosts] == [["b", "d"], ["c"]] and two_hosts.hosts[1].takes_turns


def test_a_run_waits_until_its_former_attempt_has_left(two_hosts: Hosts) -> None:
    ask(two_hosts, wanted("first", "folder"))
    assert ask(two_hosts, wanted("again", "folder"), wanted("other")) == [["first"], ["other"]]
    assert ask(two_hosts, SlotLeft("first")) == [["again"], ["other"]]


def test_a_run_that_has_left_gets_no_other_host(two_hosts: Hosts) -> None:
    two_hosts._waiting = {name: HostedRun(wanted(name)) for name in "abc"}
    gone = SlotWanted("b", wanted("b").job, NodeChannel(Path("gone")), here())
    two_hosts._waiting["b"] = HostedRun(gone)
    assert ask(two_hosts, SlotLeft("a")) == [["c"]]


def test_what_fails_in_the_hosts_thread_ends_the_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(self: Any) -> None:
        raise RuntimeError("no such host")

    monkeypatch.setattr(hosts, "Host", Host)
    monkeypatch.setattr(Host, "poll", fail, raising=False)
    requests, events = tmp_path / "requests", tmp_path / "events"
    requests.mkdir()
    events.mkdir()
    plan: Any = SimpleNamespace(hosts=1, slots=1)
    opened = Hosts(plan, NodeChannel(requests), lambda text: None)
    for name in ("a", "b"):
        opened._handle(SlotWanted(name, wanted(name).job, NodeChannel(events), here()))
    monkeypatch.setattr(Host, "end", lambda self: None, raising=False)
    read = NodeChannel(events)
    found: list[Any] = []
    late = SlotWanted("late", wanted("late").job, NodeChannel(events), here())

    def ask_late() -> None:
        with opened:
            wait_for(lambda: found.extend(read.take()) or len(found) == 2)
            NodeChannel(requests).put(late)
            wait_for(lambda: found.extend(read.take()) or len(found) == 3)

    with pytest.raises(RuntimeError, match="no such host"):
        ask_late()
    assert {(one.name, one.failure) for one in found} == {
        (name, "its host can't be run: RuntimeError: no such host") for name in ("a", "b", "late")
    }


def test_hosts_start_before_any_run_asks(two_hosts: Hosts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Their workers load the base while the runs' own processes start."""
    two_hosts.channel = NodeChannel(tmp_path)
    for name in ("poll", "end"):
        monkeypatch.setattr(Host, name, lambda self: None, raising=False)
    with two_hosts as opened:
        assert len(opened.hosts) == 2
    assert ask(two_hosts, *map(wanted, "ab")) == [["a"], ["b"]]


def test_how_a_run_ended_is_described_without_its_objects() -> None:
    assert _described(Ended("a", {"step": 4}), True) == SlotEnded("a", {"step": 4})
    refused = _described(Ended("a", error=ValueError("rl_beta: no")), True)
    assert (refused.result, refused.failure, refused.refused) == (None, "rl_beta: no", True)
    alone = _described(Ended("a", error=CantShare("it trains the base")), True)
    assert alone == SlotEnded("a", None, "it trains the base", try_alone=True)
    failed = _described(Ended("a", error=RuntimeError("a\n  b")), True)
    assert failed == SlotEnded("a", None, "RuntimeError: a b", has_raised=True)
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")):
        for has_others, why in ((True, "it ran out of memory beside others"), (False, "it ran out of memory")):
            assert _described(Ended("a", error=error), has_others) == SlotEnded("a", None, why, try_alone=True)


def test_an_error_of_the_device_is_found_behind_others() -> None:
    def raise_behind(cause: bool) -> None:
        try:
            raise torch.AcceleratorError("device-side assert")
        except RuntimeError as error:
            raise ValueError("no loss") from error if cause else None

    for cause in (True, False):
        with pytest.raises(ValueError, match="no loss") as raised:
            raise_behind(cause)
        assert _is_of_device(raised.value)
    assert _is_of_device(torch.AcceleratorError("device-side assert"))
    assert not _is_of_device(torch.OutOfMemoryError("no")) and not _is_of_device(RuntimeError("no"))


@pytest.mark.parametrize(
    ("ended", "error", "message"),
    [
        (SlotEnded("a", None, "rl_beta: no", refused=True), UserError, "^rl_beta: no$"),
        (SlotEnded("a", None, "RuntimeError: x"), RunFailed, r"training failed: RuntimeError: x \(it stays; continue"),
        (SlotEnded("a", {"step": 3, "refused": "not finite"}), UserError, r"not finite \(it stays"),
        (SlotEnded("a", {"step": 3, "stopped": True}), RunCancelled, "was ended after step 3"),
    ],
)
def test_what_a_run_raises(ended: SlotEnded, error: type[Exception], message: str) -> None:
    launcher = SlotLauncher.__new__(SlotLauncher)
    folder = SimpleNamespace(path="run", remains=lambda advice: f"it stays{advice.replace(',', ';')}")
    launcher.plan, launcher.beside = SimpleNamespace(folder=folder), SigtermHandler()  # type: ignore[assignment]
    with pytest.raises(error, match=message):
        launcher._judged(ended)
    assert launcher._judged(SlotEnded("a", {"step": 4, "best_metric": None})) == {"step": 4, "best_metric": None}


class Attempts:
    """The hosts of a run whose attempts end as told; it keeps what the run sends."""

    def __init__(self, events: NodeChannel, *ends: dict[str, Any]) -> None:
        self.events, self.ends, self.sent = events, list(ends), list[Any]()
        self.folder = events.folder

    def put(self, request: Any) -> None:
        self.sent.append(request)
        if isinstance(request, SlotWanted):
            # The end of the attempt before, by a host that hadn't heard of it.
            self.events.put(SlotEnded("before", {"step": 0, "stopped": True}))
            self.events.put(SlotEnded(name=request.name, **self.ends.pop(0)))


def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_failures: int, *ends: dict[str, Any]) -> Any:
    """A run with a checkpoint of step 4; `notes` is what it shows, `hosts.sent` what it asks for."""
    monkeypatch.setattr(slot_launch, "worker_job", lambda *_, **__: None)
    monkeypatch.setattr(slot_launch, "remove_everywhere", lambda *_: None)
    notes: list[str] = []
    failures: list[dict[str, Any]] = []
    display: Any = SimpleNamespace(note=notes.append, stage=lambda *_, **__: None)
    events = SimpleNamespace(add=lambda kind, **what: failures.append(what), step=0, saved=None)
    folder = SimpleNamespace(
        path="run",
        storage=SimpleNamespace(carried=lambda: None),
        known=lambda: {"scratch": "none"},
        last_checkpoint=lambda: 4,
        remains=lambda advice: f"it stays{advice.replace(',', ';')}",
        metrics=locate(str(tmp_path / "metrics.jsonl")),
        ledger=locate(str(tmp_path / "ledger.jsonl")),
    )
    plan: Any = SimpleNamespace(
        cfg=ClusterKeys.model_validate({"ray": {"max_failures": max_failures}}),
        folder=folder,
        events=events,
        steps=8,
        owner=SimpleNamespace(is_lost=False),
        cancel=None,
        tracking=SimpleNamespace(notes=list),
    )
    channel = NodeChannel(tmp_path)
    hosts: Any = Attempts(channel, *ends)
    made: Any = SlotLauncher(hosts, plan, display, channel, beside=SigtermHandler())
    made.notes, made.failures = notes, failures
    return made


PASSING = {"result": None, "failure": "OSError: no route", "has_raised": True}


def test_an_error_of_a_run_is_restarted_as_those_of_workers_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = launcher(tmp_path, monkeypatch, 2, PASSING, PASSING, {"result": {"step": 8}})
    assert run.run() == {"step": 8}
    first, second, third = (request for request in run.hosts.sent if isinstance(request, SlotWanted))
    assert [one.failures for one in (first, second, third)] == [0, 1, 2]
    assert [one.name for one in run.hosts.sent] == [name for one in (first, second, third) for name in (one.name, one.name)]
    assert len({first.name, second.name, third.name}) == 3
    assert [note.partition(" (")[2] for note in run.notes[1::2]] == ["restart 1 of 2)", "restart 2 of 2)"]
    assert [note.endswith("OSError: no route") for note in run.notes[::2]] == [True, True]
    assert [failure["restart"] for failure in run.failures] == [1, 2]


@pytest.mark.parametrize(
    ("max_failures", "ends", "error", "attempts"),
    [
        (0, [PASSING], RunFailed, 1),
        (1, [PASSING, PASSING], RunFailed, 2),
        (3, [{"result": None, "failure": "rl_beta: no", "refused": True}], UserError, 1),
        (3, [{"result": {"step": 3, "refused": "not finite"}}], UserError, 1),
        (3, [{"result": None, "failure": "worker 0: SIGKILL"}], RunFailed, 1),
    ],
)
def test_what_ends_a_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    max_failures: int,
    ends: list[dict[str, Any]],
    error: type[Exception],
    attempts: int,
) -> None:
    run = launcher(tmp_path, monkeypatch, max_failures, *ends)
    with pytest.raises(error):
        run.run()
    assert sum(isinstance(request, SlotWanted) for request in run.hosts.sent) == attempts
    assert len(run.notes) == 2 * (attempts - 1)


def test_a_run_that_others_may_hinder_gets_workers_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    notes: list[str] = []
    monkeypatch.setattr(
        slot_launch, "SlotLauncher", lambda *arguments: SimpleNamespace(run=lambda: "memory ran out", remove_scratch=list)
    )
    monkeypatch.setattr(slot_launch, "run_training", lambda plan, display, beside: {"step": 8})
    monkeypatch.setattr(slot_launch.NodeChannel, "opened", lambda: nullcontext(NodeChannel(tmp_path)))
    display: Any = SimpleNamespace(note=notes.append)
    folder = SimpleNamespace(last_checkpoint=lambda: 4)
    plan: Any = SimpleNamespace(cfg=ClusterKeys(), folder=folder)
    assert train_in_slot(NodeChannel(tmp_path), plan, display) == {"step": 8}
    plan.cfg = ClusterKeys.model_validate({"fsdp_config": {}, "ray": {"num_workers": 2}})
    with pytest.raises(RunFailed, match="memory ran out, after the checkpoint of step 4, from which workers of its own can't"):
        train_in_slot(NodeChannel(tmp_path), plan, display)
    folder.last_checkpoint = lambda: 0
    assert train_in_slot(NodeChannel(tmp_path), plan, display) == {"step": 8}
    assert set(notes) == {"memory ran out: it is tried again with workers of its own"}


def test_commands_come_in_order() -> None:
    assert received(0) == []
    for number in range(3):
        receive(number)
    assert received(5) == [0, 1, 2] and received(0.01) == []


def test_reports_of_all_ranks_are_one() -> None:
    reports = [StepReport(2, [], [{"step": 2, "row_ids": [rank + 1]}]) for rank in (1, 0)]
    assert merged(reports).ledger == [{"step": 2, "row_ids": [1, 2]}]
    assert merged([SlotEnded("a", {}), SlotEnded("a", {})]) == SlotEnded("a", {})
