"""Stage 2: the reference's log-probabilities of every prepared pair, computed once for all runs.

hashing.py       hashes of files and token ids
precision.py     dtype of weights and autocast, resolved before any actor starts
fingerprint.py   identity of the reference's weights
plan.py          fingerprint and tasks of a config's scores
pictures.py      checks that the models take the rows' pictures
token_budget.py  checks that every pair fits the tokens of one forward
actor.py         the reference in memory: rows in, log-probabilities out, on Ray Data's actors
score_files.py   score files: staged by tasks, joined row for row with the prepared parts
reuse.py         reuse of rows that the same reference has scored for other data
score_store.py   complete scores, verified whenever they are opened; scoring.py runs the stage
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from strategies.lazy import lazy_names

if TYPE_CHECKING:
    from pipeline.reference.fingerprint import base_fingerprint, pin_base
    from pipeline.reference.pictures import check_given_reference, check_models, check_pictures
    from pipeline.reference.score_store import Scores
    from pipeline.reference.scoring import check_mode, score
    from pipeline.reference.token_budget import check_embeddings, check_positions, check_training_budget
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "pipeline.reference.fingerprint": "base_fingerprint pin_base",
            "pipeline.reference.pictures": "check_given_reference check_models check_pictures",
            "pipeline.reference.score_store": "Scores",
            "pipeline.reference.scoring": "check_mode score",
            "pipeline.reference.token_budget": "check_embeddings check_positions check_training_budget",
        },
    )

__all__ = [
    "Scores",
    "base_fingerprint",
    "check_embeddings",
    "check_given_reference",
    "check_mode",
    "check_models",
    "check_pictures",
    "check_positions",
    "check_training_budget",
    "pin_base",
    "score",
]
