"""Who is to blame when nobody gives a sign of life."""

from __future__ import annotations

import time
from typing import Any

import pytest

from pipeline.training import hang_detection as watching
from pipeline.training.hang_detection import HangDetector
from pipeline.training.heartbeat import Heartbeat


class Answer:
    """An actor that gives the same sign whenever it is asked, or none."""

    def __init__(self, sign: Heartbeat | None) -> None:
        self.sign, self.killed = sign, False

    @property
    def execute(self) -> Any:
        return self

    def remote(self, function: Any) -> Any:
        return self


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Any:
    import ray

    monkeypatch.setattr(ray, "wait", lambda refs, timeout: (refs if refs[0].sign else [], []))
    monkeypatch.setattr(ray, "get", lambda ref: ref.sign)
    monkeypatch.setattr(ray, "kill", lambda actor: setattr(actor, "killed", True))
    return ray


def watched(monkeypatch: pytest.MonkeyPatch, *signs: Heartbeat | None) -> tuple[list[Answer], list[str]]:
    """Workers that are as they are for 100 seconds, and what a watch with a limit of 60 says."""
    actors, watch = [Answer(sign) for sign in signs], HangDetector(timeout_s=60)
    for rank, actor in enumerate(actors):
        watch.add(rank, actor, "node", pid=1)
    assert watch.check() == []
    watch._last_asked = 0.0
    assert watch.check() == []
    later = time.monotonic() + 100
    monkeypatch.setattr(watching.time, "monotonic", lambda: later)
    watch._last_asked = 0.0
    return actors, watch.check()


@pytest.mark.usefixtures("ray")
@pytest.mark.parametrize(
    ("signs", "blamed"),
    [
        ([Heartbeat(9, 3), None], [1]),
        ([Heartbeat(9, 3), Heartbeat(8, 2)], [1]),
        ([Heartbeat(9, 3), Heartbeat(9, 3)], [0, 1]),
        ([Heartbeat(5, 3, over=True), Heartbeat(9, 3)], [1]),
        ([Heartbeat(9, 3, over=True), Heartbeat(9, 3, over=True)], []),
    ],
)
def test_the_one_furthest_behind_is_killed(monkeypatch: pytest.MonkeyPatch, signs: list[Any], blamed: list[int]) -> None:
    """One that doesn't answer; else the one with the fewest signs; nobody who has nothing more to do."""
    actors, notes = watched(monkeypatch, *signs)
    assert [rank for rank, actor in enumerate(actors) if actor.killed] == blamed
    assert len(notes) == len(blamed)
    for rank, note in zip(blamed, notes, strict=True):
        assert note.startswith(f"worker {rank} on node hung: no sign of life since ")
        assert note.endswith("(ray.hang_timeout: 60 s); killed")


@pytest.mark.usefixtures("ray")
def test_what_a_worker_waits_for_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """After it was seen twice; to wait is no sign of life."""
    actor, watch, notes = Answer(Heartbeat(2)), HangDetector(timeout_s=60), []
    watch.add(0, actor, "node", pid=1)
    storage = "storage, at s3://bucket/prepared"
    for waiting in (None, None, "the files of a model", storage, None, storage, storage, storage):
        actor.sign = Heartbeat(2, waiting=waiting)
        watch._last_asked = 0.0
        notes.append(watch.check())
    assert notes[:-2] == [[]] * 6 and notes[-2:] == [[f"worker 0 on node is waiting for {storage}"], []]
    later = time.monotonic() + 100
    monkeypatch.setattr(watching.time, "monotonic", lambda: later)
    assert "hung: no sign of life" in watch.check()[0]
