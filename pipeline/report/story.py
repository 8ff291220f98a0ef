"""What happened to a run, as its page tells it: from the events of `run.json` (`pipeline/training/history.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from pipeline.report.page import Column, Row, Section, Table

__all__ = ["Story"]

HELD = {
    "began": {"host", "workers", "sharding"},
    "training": {"step", "nodes", "repeated", "setup", "notes"},
    "failure": {"step", "workers", "restart"},
    "ended": {"step", "how"},
}
"""Kind of event -> what it holds beside its time."""


class Story:
    """A run's events, and the records that say how long it was alive where nobody recorded its end.

    Args:
        state: what `run.json` says.
        records: of `metrics.jsonl`.

    Raises:
        ValueError: for an event that isn't one.
    """

    def __init__(self, state: dict[str, Any], records: Sequence[dict[str, Any]]) -> None:
        self.events: list[dict[str, Any]] = state.get("events", [])
        if not isinstance(self.events, list) or not all(map(_is_event, self.events)):
            raise ValueError("it holds events that aren't a run's")
        self._state = state
        self._times = sorted(record["time"] for record in records if "time" in record)

    @property
    def status(self) -> str:
        """In a word or two."""
        if self._state["status"] == "finished":
            return "finished"
        last = self.events[-1] if self.events else {}
        return last.get("how", "not finished")

    @property
    def began(self) -> dict[str, Any] | None:
        """The last time that a driver started workers."""
        return self._last("began")

    @property
    def training(self) -> dict[str, Any] | None:
        """The last attempt that trained."""
        return self._last("training")

    @property
    def restarts(self) -> int:
        """How often workers were started again after a failure."""
        return sum(event["event"] == "failure" and event["restart"] is not None for event in self.events)

    @property
    def marks(self) -> list[int]:
        """Steps that the run went on from."""
        return sorted({event["step"] for event in self.events if event["event"] == "training" and event["step"]})

    @property
    def seconds(self) -> float | None:
        """That drivers had workers, or waited for them; up to the last sign of those whose end nobody recorded."""
        starts = [place for place, event in enumerate(self.events) if event["event"] == "began"]
        if not starts:
            return self._times[-1] - self._times[0] if self._times else None
        bounds = [*starts[1:], len(self.events)]
        return sum(self._length(self.events[start:end]) for start, end in zip(starts, bounds, strict=True))

    def _length(self, events: Sequence[dict[str, Any]]) -> float:
        last = events[-1]["time"]
        if events[-1]["event"] != "ended":
            following = [event["time"] for event in self.events if event["time"] > last]
            last = max([last, *(time for time in self._times if time < min(following, default=float("inf")))])
        return last - events[0]["time"]

    def _last(self, kind: str) -> dict[str, Any] | None:
        return next((event for event in reversed(self.events) if event["event"] == kind), None)

    def section(self) -> Section:
        """All of it as a table."""
        if not self.events:
            words = "This run has no record of what happened to it: it is of an earlier version."
            return Section("events", "What happened", words)
        rows = [Row([moment(event["time"]), str(event.get("step", "")), text]) for event, text in self._told()]
        words = ""
        if self.status == "not finished":
            words = "Nobody has recorded the end of this run: it goes on, or its driver was killed."
        columns = [Column("time (UTC)", is_text=True), Column("step"), Column("event", is_text=True)]
        return Section("events", "What happened", words, table=Table(columns, rows))

    def _told(self) -> Iterator[tuple[dict[str, Any], str]]:
        workers = 0
        for place, event in enumerate(self.events):
            match event["event"]:
                case "began":
                    workers = 0
                    again = "continued" if any(one["event"] == "training" for one in self.events[:place]) else "started"
                    yield event, f"{again} on {event['host']}, with {asked(event['workers'])}"
                case "training":
                    now = sum(map(len, event["nodes"].values()))
                    yield event, _training(event, now, workers)
                    workers = now
                case "failure":
                    for worker in event["workers"]:
                        yield event, _failure(worker)
                    yield {"time": event["time"]}, _consequence(event)
                case "ended":
                    why = f": {event['why']}" if event.get("why") else ""
                    yield event, f"{event['how']}{why}"


def _is_event(event: Any) -> bool:
    return isinstance(event, dict) and HELD.get(event.get("event", ""), {""}) | {"time"} <= event.keys()


def _training(event: dict[str, Any], now: int, before: int) -> str:
    text = f"training with {plural(now, 'worker')} on {nodes(event['nodes'])}"
    if before and before != now:
        text += f" (before: {before})"
    if event["repeated"]:
        text += f"; {plural(event['repeated'], 'step')} repeated"
    return "; ".join([text, *event["notes"]])


def _failure(worker: dict[str, Any]) -> str:
    node = f" on {worker['node']}" if worker["node"] else ""
    return f"worker {worker['rank']}{node} {worker['what']}: {worker['why']}"


def _consequence(event: dict[str, Any]) -> str:
    return "no restart was left" if event["restart"] is None else f"restart {event['restart']} (ray.max_failures)"


def nodes(found: dict[str, list[int]]) -> str:
    """Nodes, each with the number of its workers."""
    return ", ".join(f"{name} ({len(ranks)})" for name, ranks in found.items())


def asked(workers: dict[str, Any]) -> str:
    """The workers that were asked for."""
    each = ", ".join(f"{amount:g} {name}" for name, amount in workers["resources"].items())
    number = plural(workers["number"], "worker")
    if workers["least"] is not None:
        number = f"{workers['least']} to {number}"
    return f"{number} of {each}"


def plural(number: int, word: str) -> str:
    """A number of things."""
    return f"{number:,} {word}{'s' * (number != 1)}"


def moment(seconds: float) -> str:
    """A moment, in seconds since the epoch."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def duration(seconds: float) -> str:
    """So long."""
    return str(timedelta(seconds=round(seconds)))
