"""What a failure of a host's workers means for its runs: for which of them it counts, and which leave."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

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
    takes_turns: bool = False
    """Whether slots take turns of whole steps from now on, so that the next failure has a name."""


def judge(
    restarts: Mapping[str, int],
    turn: str | None,
    *,
    lacked_memory: bool,
    took_turns: bool = False,
    leaving: Collection[str] = (),
) -> Judgement:
    """Judge a failure of workers: it counts for the run whose turn it was, and before any turn for all.

    Where several computed together it counts for none, and slots take turns from then on. If they did already, it counts for
    all: a host must not start for ever.

    Args:
        restarts: name -> restarts that are left, of all runs that the workers had.
        turn: name of the run whose turn it was; `SEVERAL`, or None before any turn.
        lacked_memory: whether a worker was ended for its memory.
        took_turns: whether slots took turns of whole steps alone.
        leaving: runs for which nothing counts any more.
    """
    if turn is None or (turn == SEVERAL and took_turns):
        counted = set(restarts)
    elif turn in restarts:
        counted = {turn}
    else:
        # One of several, without a name, or a run that has ended since: it would be the failure of another one.
        counted = set()
    counted -= set(leaving)
    ended = {name for name in counted if not restarts[name]}
    # Before anyone leaves: who is the last one to leave wasn't alone.
    has_others = len(restarts) > 1
    if lacked_memory and has_others and turn in counted:
        # Another try beside the others would end the same way.
        ended = {turn}
    found = Judgement(frozenset(counted), takes_turns=took_turns or turn == SEVERAL)
    if has_others and turn is not None:
        return replace(found, alone=frozenset(ended))
    return replace(found, failed=frozenset(ended))
