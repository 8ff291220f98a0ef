"""What a failure of a host's workers means for its runs: for which of them it counts, and which leave."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from pipeline.training.turn_note import SEVERAL

__all__ = ["Judgement", "judge"]


@dataclass(frozen=True)
class Judgement:
    """What follows from a failure, by the runs' names."""

    counted: frozenset[str]
    """Runs for which it counts."""
    alone: frozenset[str] = frozenset()
    """Runs to be tried without others, which may have been at fault, or have taken the memory."""
    failed: frozenset[str] = frozenset()
    """Runs that have failed: no other one can have been at fault."""


def judge(restarts: Mapping[str, int], turn: str | None, lacked_memory: bool, leaving: Collection[str] = ()) -> Judgement:
    """Judge a failure of workers.

    Args:
        restarts: name -> restarts that are left, of all runs that the workers had.
        turn: name of the run whose turn it was; `SEVERAL`, or None before any turn.
        lacked_memory: whether a worker was ended for its memory.
        leaving: runs for which nothing counts any more.
    """
    counted = ({turn} if turn in restarts else set(restarts)) - set(leaving)
    ended = {name for name in counted if not restarts[name]}
    # Before anyone leaves: who is the last one to leave wasn't alone.
    has_others = len(restarts) > 1
    if lacked_memory and has_others:
        # Another try beside the others would end the same way.
        ended |= counted & {turn}
    is_alone = not has_others or (turn not in restarts and turn != SEVERAL)
    found = frozenset(ended)
    return Judgement(frozenset(counted), failed=found) if is_alone else Judgement(frozenset(counted), alone=found)
