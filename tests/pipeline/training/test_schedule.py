"""On how many hosts several runs of one command train, without training any."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cluster.placement import WorkerPlan
from pipeline.doctor.machine import Machine
from pipeline.training.together import schedule
from pipeline.training.together.schedule import Schedule


def test_slots_are_those_of_all_runs_that_share(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fitting_slots(recipes: Any, copies: int, machine: Machine) -> int:
        asked.append(sorted(recipes))
        return min(asked[-1])

    monkeypatch.setattr(schedule, "fitting_slots", fitting_slots)
    monkeypatch.setattr(schedule, "node_resources", lambda: [{"CPU": 1.0}])
    monkeypatch.setattr(schedule, "this_machine", lambda use_gpu: Machine("CPU", 2**30, 2**30))
    folder = SimpleNamespace(for_ray=dict, storage=SimpleNamespace(path="run"))
    workers = WorkerPlan(1, False, {"CPU": 1.0})
    # In place of a recipe the slots that it leaves room for; the first one asks for the least.
    runs: Any = [
        SimpleNamespace(name=f"run {n}", plan=SimpleNamespace(cfg=n, workers=workers, folder=folder)) for n in (9, 2, 5)
    ]
    shared: Any = SimpleNamespace(note=lambda text: None)
    plan = Schedule(runs, shared, debug=False)._plan_hosts(runs, [])
    assert asked == [[2, 5, 9]] and (plan.hosts, plan.slots) == (1, 2)
