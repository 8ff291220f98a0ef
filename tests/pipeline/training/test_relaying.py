"""What of a worker's error reaches the driver, and what ends a run at once."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.training.relaying import Relay
from strategies.errors import OutsideError


class Recorded(list[dict[str, Any]]):
    """A queue."""

    def put(self, event: dict[str, Any]) -> None:
        self.append(event)


REFUSALS = [kind("row 7 is too long") for kind in (ValueError, UserError, OutsideError)]


@pytest.mark.parametrize("refusal", REFUSALS)
def test_input_that_a_worker_refuses_is_not_tried_again(refusal: Exception) -> None:
    """Ray restarts after what workers raise, not after what is raised here."""
    queue = Recorded()
    with pytest.raises(UserError, match="row 7 is too long"):
        Relay(queue).after_exception(None, {0: RuntimeError("Connection closed by peer"), 1: refusal})
    assert queue == []


def test_what_may_go_well_the_next_time_is_told() -> None:
    queue = Recorded()
    cut_off = json.JSONDecodeError("Expecting value", "", 0)
    Relay(queue).after_exception(None, {0: RuntimeError("out\n  of memory"), 1: cut_off})
    [event] = queue
    assert (event["event"], event["died"]) == ("failure", [])
    assert event["failures"] == {
        0: "RuntimeError: out of memory",
        1: "JSONDecodeError: Expecting value: line 1 column 1 (char 0)",
    }
