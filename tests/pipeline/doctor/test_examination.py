"""What an examination comes to."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.doctor.checks import Check
from pipeline.doctor.examination import Examination, _cluster


@pytest.mark.parametrize(
    ("resources", "has_autoscaler", "status", "finding"),
    [
        ([{"CPU": 2.0}, {"CPU": 8.0, "GPU": 1.0}], False, "pass", "2 nodes with 10 CPU, 1 GPU"),
        ([{}], True, "pass", "1 node with 0 CPU"),
        ([{}], False, "fail", "1 node with 0 CPU: nothing can run; add nodes"),
    ],
)
def test_a_cluster_that_can_run_nothing(resources: Any, has_autoscaler: bool, status: str, finding: str) -> None:
    found = _cluster([{"Resources": each} for each in resources], has_autoscaler)
    assert found.status == status and found.finding.startswith(finding)


def test_one_failed_check_fails_it_all() -> None:
    fine = Check("disk", "warn", "little")
    assert Examination((fine,), None).verdict(None) == "nothing is in the way" and not Examination((fine,), None).failed
    bad = Examination((fine, Check("cluster", "fail", "none")), None)
    assert bad.failed and bad.verdict(None) == "1 check failed: cluster"
