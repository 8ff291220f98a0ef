"""Timeline of a run on its page, from the events of `run.json` (`pipeline/runs/events.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from pipeline.report.page import Column, Row, Section, Table

__all__ = ["RunTimeline"]

FIELDS = {
    "began": {"host", "workers", "sharding"},
    "training": {"step", "nodes", "repeated", "setup", "notes"},
    "failure": {"step", "workers", "restart"},
    "ended": {"step", "how"},
}
"""Kind of event -> its fields besides the time."""


class RunTimeline:
    """A run's events. Metric records give the duration of attempts whose end wasn't recorded: their driver was killed.

    Args:
        state: content of `run.json`.
        records: records of `metrics.jsonl`.

    Raises:
        ValueError: for an invalid event.
    """

    def __init__(self, state: dict[str, Any], records: Sequence[dict[str, Any]]) -> None:
        self.events: list[dict[str, Any]] = state.get("events", [])
        if not isinstance(self.events, list) or not all(map(_is_event, self.events)):
            raise ValueError("it holds events that aren't a run's")
        self._state = state
        self._times = sorted(record["time"] for record in records if "time" in record)

    @property
    def status(self) -> str:
        """Status in a word or two."""
        if self._state["status"] == "finished":
            return "finished"
        last = self.events[-1] if self.events else {}
        return last.get("how", "not finished")

    @property
    def began(self) -> dict[str, Any] | None:
        """The last event of a driver starting workers."""
        return self._last("began")

    @property
    def training(self) -> dict[str, Any] | None:
        """The last event of training (re)starting."""
        return self._last("training")

    @property
    def restarts(self) -> int:
        """Number of restarts of the workers after failures."""
        return sum(event["event"] == "failure" and event["restart"] is not None for event in self.events)

    @property
    def marks(self) -> list[int]:
        """Steps that the run was resumed from."""
        return sorted({event["step"] for event in self.events if event["event"] == "training" and event["step"]})

    @property
    def seconds(self) -> float | None:
        """Total time with workers or waiting for them. An attempt without a recorded end counts up to its last record."""
        starts = [index for index, event in enumerate(self.events) if event["event"] == "began"]
        if not starts:
            return self._times[-1] - self._times[0] if self._times else None
        bounds = [*starts[1:], len(self.events)]
        return sum(self._length(self.events[start:end]) for start, end in zip(starts, bounds, strict=True))

    def _length(self, events: Sequence[dict[str, Any]]) -> float:
        last = events[-1]["time"]
        if events[-1]["event"] != "ended":
            # Records of the next attempt don't prolong this one.
            following = [event["time"] for event in self.events if event["time"] > last]
            last = max([last, *(time for time in self._times if time < min(following, default=float("inf")))])
        return last - events[0]["time"]

    def _last(self, kind: str) -> dict[str, Any] | None:
        return next((event for event in reversed(self.events) if event["event"] == kind), None)

    def section(self) -> Section:
        """Return the timeline as a table."""
        if not self.events:
            words = "This run has no record of what happened to it: it is of an earlier version."
            return Section("events", "What happened", words)
        rows = [Row([format_time(event["time"]), str(event.get("step", "")), text]) for event, text in self._rows()]
        words = ""
        if self.status == "not finished":
            words = "Nobody has recorded the end of this run: it goes on, or its driver was killed."
        columns = [Column("time (UTC)", is_text=True), Column("step"), Column("event", is_text=True)]
        return Section("events", "What happened", words, table=Table(columns, rows))

    def _rows(self) -> Iterator[tuple[dict[str, Any], str]]:
        workers = 0
        for index, event in enumerate(self.events):
            match event["event"]:
                case "began":
                    workers = 0
                    # An attempt that ended before training had nothing to continue.
                    again = "continued" if any(earlier["event"] == "training" for earlier in self.events[:index]) else "started"
                    yield event, f"{again} on {event['host']}, with {requested_workers(event['workers'])}"
                case "training":
                    now = sum(map(len, event["nodes"].values()))
                    yield event, _training(event, now, workers)
                    workers = now
                case "failure":
                    for worker in event["workers"]:
                        yield event, _failure(worker)
                    # Without the step, which the rows of the workers have.
                    yield {"time": event["time"]}, _consequence(event)
                case "ended":
                    why = f": {event['why']}" if event.get("why") else ""
                    yield event, f"{event['how']}{why}"


def _is_event(event: Any) -> bool:
    # An unknown kind asks for the field "", which no event has.
    return isinstance(event, dict) and FIELDS.get(event.get("event", ""), {""}) | {"time"} <= event.keys()


def _training(event: dict[str, Any], now: int, before: int) -> str:
    text = f"training with {plural(now, 'worker')} on {format_nodes(event['nodes'])}"
    if before and before != now:
        text += f" (before: {before})"
    if event["repeated"]:
        text += f"; {plural(event['repeated'], 'step')} repeated"
    return "; ".join([text, *event["notes"]])


def _failure(worker: dict[str, Any]) -> str:
    node = f" on {worker['node']}" if worker["node"] else ""
    return f"worker {worker['rank']}{node} {worker['what']}: {worker['why']}"


def _consequence(event: dict[str, Any]) -> str:
    if event["restart"] is None:
        return "no restart was left"
    return f"restart {event['restart']} (ray.max_failures)" if event["restart"] else "restart, which doesn't count for this run"


def format_nodes(ranks_by_node: dict[str, list[int]]) -> str:
    """Format nodes, each with its number of workers."""
    return ", ".join(f"{name} ({len(ranks)})" for name, ranks in ranks_by_node.items())


def requested_workers(workers: dict[str, Any]) -> str:
    """Format the requested workers and their resources."""
    each = ", ".join(f"{amount:g} {name}" for name, amount in workers["resources"].items())
    number = plural(workers["number"], "worker")
    if workers["least"] is not None:
        number = f"{workers['least']} to {number}"
    return f"{number} of {each}"


def plural(number: int, word: str) -> str:
    """Format a count: `plural(3, "step")` is `3 steps`."""
    return f"{number:,} {word}{'s' * (number != 1)}"


def format_time(seconds: float) -> str:
    """Format seconds since the epoch as `YYYY-MM-DD HH:MM:SS` in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def format_duration(seconds: float) -> str:
    """Format seconds as `H:MM:SS`."""
    return str(timedelta(seconds=round(seconds)))
