"""What becomes of the runs of a host when something of it dies."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

from pipeline.errors import UserError
from pipeline.io.holder import here
from pipeline.ray.channel import NodeChannel, Outbox
from pipeline.training import one_host
from pipeline.training.events import SlotEnded, WorkersFailed, WorkerStarted
from pipeline.training.hosted_run import HostedRun
from pipeline.training.one_host import Host
from pipeline.training.slot_launch import SlotWanted
from pipeline.training.turn_note import SEVERAL, TurnNote
from strategies.slots.commands import Attach, Stop, TakeTurns
from tests.waiting import wait_for

A, B, C = sorted(uuid4().hex for _ in range(3))
KILLED = "Memory on the node (IP: 10.0.0.5, ID: ab) was 9.5GB used / 10.0GB limit"


class Sent(dict[str, list[Any]]):
    """An outbox that keeps what it was given, by the names of the runs."""

    def send(self, channel: Any, event: Any) -> None:
        self.setdefault(channel.folder.name, []).append(event)


class Actor:
    """Keeps the commands that it was given."""

    def __init__(self) -> None:
        self.commands: list[Any] = []
        self.execute = SimpleNamespace(remote=lambda _, *command: self.commands.extend(command))


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """One of three slots, without Ray: `host.die(error)` ends it."""
    died, errors = threading.Event(), list[BaseException]()

    def fit() -> None:
        died.wait()
        raise errors[0]

    def die(error: BaseException) -> None:
        errors.append(error)
        died.set()
        wait_for(lambda: made.poll() or made.has_ended)

    @contextmanager
    def opened() -> Iterator[NodeChannel]:
        yield NodeChannel(tmp_path)

    cleaned: list[Any] = []
    notes: list[str] = []
    monkeypatch.setattr(one_host, "remove_orphaned_groups", lambda: 0)
    monkeypatch.setattr(one_host, "remove_everywhere", lambda *where: cleaned.append(where))
    monkeypatch.setattr(one_host.NodeChannel, "opened", opened)
    monkeypatch.setattr("pipeline.training.turn_note.get_value", lambda *_: None)
    monkeypatch.setattr(Host, "_trainer", lambda self: SimpleNamespace(fit=fit))
    run: Any = SimpleNamespace(cfg=SimpleNamespace(ray=SimpleNamespace(hang_timeout=60)))
    plan: Any = SimpleNamespace(run=run, slots=3, idle_s=5.0)
    made: Any = Host(plan, 0, notes.append, Sent(), [])  # type: ignore[arg-type]
    made.die, made.sent, made.cleaned, made.notes = die, made._outbox, cleaned, notes
    made._handle(WorkerStarted(0, Actor(), "here", "id", 1))
    yield made
    if not made.has_ended:
        die(RuntimeError("the test is over"))


def attach(host: Any, *names: str, max_failures: int = 0) -> None:
    cfg: Any = SimpleNamespace(output_dir=uuid4().hex, ray=SimpleNamespace(max_failures=max_failures))
    for name in names:
        job: Any = SimpleNamespace(cfg=cfg, scratch="prefray-none")
        events = Path(host._channel.folder, "runs", name)
        events.mkdir(parents=True, exist_ok=True)
        host.attach(HostedRun(SlotWanted(name, job, NodeChannel(events), here())))
    host.sent.clear()


def fail(host: Any, turn: str | None, why: str = "SIGKILL") -> None:
    """The worker dies in a run's turn."""
    if turn is not None:
        TurnNote(host._channel, is_here=True).write(turn)
    host._handle(WorkersFailed({0: why}, [0], 1.0))


def ended(host: Any) -> dict[str, SlotEnded]:
    return {name: event for name, events in host.sent.items() for event in events if isinstance(event, SlotEnded)}


def test_a_failure_counts_for_the_run_whose_turn_it_was(host: Any) -> None:
    attach(host, A, B, max_failures=1)
    fail(host, A)
    assert {name: events[0].spared for name, events in host.sent.items()} == {
        A: "",
        B: "it was another run's turn",
    } and not ended(host)
    fail(host, B)
    assert not ended(host)
    fail(host, A)
    assert ended(host) == {A: SlotEnded(A, None, "the workers that it shared died in its turn", try_alone=True)}
    fail(host, B)
    # Nobody was beside it any more.
    assert ended(host)[B] == SlotEnded(B, None, "worker 0: SIGKILL") and not host.runs


def test_a_failure_before_any_turn_counts_for_all(host: Any) -> None:
    attach(host, A, B)
    fail(host, None)
    assert ended(host) == {name: SlotEnded(name, None, "worker 0: SIGKILL") for name in (A, B)}


def test_a_host_without_memory_has_fewer_slots(host: Any) -> None:
    attach(host, A, B, C, max_failures=9)
    fail(host, B, KILLED)
    assert list(ended(host)) == [B] and ended(host)[B].try_alone
    assert list(host.runs) == [A, C] and not host.has_room


def test_where_several_leave_for_memory_slots_shrink_once(host: Any) -> None:
    host.takes_turns = True
    attach(host, A, B, C)
    fail(host, SEVERAL, KILLED)
    assert set(ended(host)) == {A, B, C} and all(one.try_alone for one in ended(host).values())
    assert ended(host)[A].failure == "the workers that it shared died while several runs computed together"
    attach(host, A)
    assert host.has_room
    attach(host, B)
    assert not host.has_room


def test_after_a_failure_of_several_runs_take_turns(host: Any) -> None:
    """It counts for none; the next one has a name."""
    attach(host, A, B)
    fail(host, SEVERAL, KILLED)
    assert {name: events[0].spared for name, events in host.sent.items()} == dict.fromkeys(
        (A, B), "several runs computed together"
    )
    assert not ended(host) and host.notes == [
        "host 0: several runs computed together when its workers died; from now on they take turns"
    ]
    actor = Actor()
    host._handle(WorkerStarted(0, actor, "here", "id", 2))
    assert [type(command) for command in actor.commands] == [TakeTurns, Attach, Attach]
    fail(host, A, KILLED)
    assert list(ended(host)) == [A] and list(host.runs) == [B] and len(host.notes) == 1


def test_a_failure_after_the_end_of_the_run_whose_turn_it_was_counts_for_no_other(host: Any) -> None:
    attach(host, A, B)
    host._handle(SlotEnded(A, {"step": 8}))
    fail(host, A)
    assert host.sent[B][0].spared == "it was another run's turn" and list(host.runs) == [B]


def test_a_run_that_leaves_is_not_at_fault(host: Any) -> None:
    attach(host, A, B)
    host.stop(A)
    host.runs[A].wanted.events.folder.rmdir()
    fail(host, A)
    assert ended(host) == {A: SlotEnded(A, {"step": 0, "stopped": True})} and list(host.runs) == [B]
    # Nobody reads its channel any more, who would do it.
    wait_for(lambda: host.cleaned == [("prefray-none", {"id"})])


def test_runs_that_nobody_reads_do_not_begin_again(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker has told them their ends, and died before it told the host."""
    monkeypatch.setattr(one_host, "ORPHANS_EVERY_S", 0)
    attach(host, A, B, C, max_failures=1)
    fail(host, None)
    host.runs[A].wanted.events.folder.rmdir()
    actor = Actor()
    host._handle(WorkerStarted(0, actor, "here", "id", 2))
    assert [command.name for command in actor.commands] == [B, C] and list(host.runs) == [B, C]
    host.runs[B].wanted.events.folder.rmdir()
    host._stop_orphans()
    assert actor.commands[2:] == [Stop(B)] and host.runs[B].is_leaving
    host.release(C)
    fail(host, C)
    assert not host.runs and not ended(host).get(C)


def test_runs_of_a_host_that_died_want_another_one(host: Any) -> None:
    attach(host, A, B, max_failures=1)
    TurnNote(host._channel, is_here=True).write(A)
    host.die(RuntimeError("The actor\n  died"))
    assert [(run.name, run.failures) for run in host.returned] == [(A, 1), (B, 0)] and not ended(host)
    assert host.sent[A][0].failures == {0: "The actor died"}


@pytest.mark.parametrize("wrap", [lambda error: error, lambda error: SimpleError(error)])
def test_what_a_host_refuses_all_its_runs_refuse(host: Any, wrap: Callable[[Any], BaseException]) -> None:
    attach(host, A, max_failures=9)
    host.die(wrap(UserError("base_model: no")))
    assert ended(host) == {A: SlotEnded(A, None, "base_model: no", refused=True)}


class SimpleError(RuntimeError):
    """As Ray Train wraps what its callbacks raise."""

    def __init__(self, error: Exception) -> None:
        super().__init__("controller")
        self.controller_failure = error


def test_what_a_full_disk_does_not_take_is_sent_later(tmp_path: Path) -> None:
    class Full(NodeChannel):
        is_full = True

        def put(self, item: Any) -> None:
            if self.is_full:
                raise OSError(28, "No space left on device")
            super().put(item)

    full, outbox = Full(tmp_path), Outbox()
    outbox.send(full, 1)
    outbox.send(NodeChannel(tmp_path / "closed"), 2)
    outbox.send(full, 3)
    full.is_full = False
    outbox.flush()
    assert list(NodeChannel(tmp_path).take()) == [1, 3] and not outbox._unsent
