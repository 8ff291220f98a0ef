"""Stage 2: the reference's log-probabilities of every prepared pair, computed once for all runs.

hashing.py    what files and token ids are, as hashes
precision.py  the dtype of the weights and of autocast, decided before any actor starts
identity.py   which weights the reference has
plan.py       what a config asks for: the fingerprint, and the tasks that are left
budget.py     whether every pair fits the tokens of one forward
actor.py      the reference in memory: rows in, log-probabilities out; pool.py runs actors of it on Ray Data
parts.py      files of scores: staged by tasks, joined row for row with the prepared parts
known.py      rows that other scores of the same reference have already: no forward is run for them
store.py      what is left behind, verified whenever it is opened; scoring.py is the stage as a whole
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.reference.budget import check_training_budget as check_training_budget
    from pipeline.reference.identity import base_fingerprint as base_fingerprint
    from pipeline.reference.precision import settle as settle
    from pipeline.reference.scoring import check_mode as check_mode
    from pipeline.reference.scoring import score as score
    from pipeline.reference.store import Scores as Scores

_HOMES = {
    "Scores": "pipeline.reference.store",
    "base_fingerprint": "pipeline.reference.identity",
    "check_mode": "pipeline.reference.scoring",
    "check_training_budget": "pipeline.reference.budget",
    "score": "pipeline.reference.scoring",
    "settle": "pipeline.reference.precision",
}
__all__ = ["Scores", "base_fingerprint", "check_mode", "check_training_budget", "score", "settle"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
