"""Workers that are killed at random moments change nothing but the time; `python -m benchmarks.chaos` is the long version."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.chaos import parser, run


@pytest.mark.release
@pytest.mark.usefixtures("ray_session")
def test_killed_at_random(tmp_path: Path) -> None:
    # Soon after a start, so that no kill comes when the run has ended.
    given = [
        "--kills",
        "2",
        "--seed",
        "3",
        "--sharding",
        "fsdp2",
        "--save-steps",
        "20",
        "--steps",
        "160",
        "--longest-pause",
        "1",
    ]
    options = parser().parse_args(given)
    outcome = run(options, tmp_path)
    assert len(outcome.kills) == 2
    assert outcome.same_weights
    assert outcome.ledger == ""
    # While a checkpoint is being stored, the one before it is the last.
    repeated = [kill.repeated for kill in outcome.kills]
    assert all(steps is not None and steps < 2 * options.save_steps for steps in repeated), repeated
