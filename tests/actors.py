"""Ray's actors, which are processes below this one."""

from __future__ import annotations

import re
from collections import Counter

import psutil

__all__ = ["actors"]

OF_A_SESSION = {
    "ActorLocationTracker",
    "DashboardAgent",
    "IDLE",
    "RuntimeEnvAgent",
    "_AutoscalingCoordinatorActor",
    "_StatsActor",
}
"""Processes that Ray keeps for as long as it runs."""


def actors() -> Counter[str]:
    """Return the number of actors of each class, without those that Ray keeps."""
    found: Counter[str] = Counter()
    for process in psutil.Process().children(recursive=True):
        try:
            title = re.match(r"ray::([A-Z_]\w*)", " ".join(process.cmdline()))
        except psutil.Error:
            continue
        if title is not None and title[1] not in OF_A_SESSION:
            found[title[1]] += 1
    return found
