"""State of sweeps that earlier versions saved: Ray Tune pickles objects under the names that their classes had then."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from pipeline.io import filesystems, storage
from pipeline.tuning import monitor, objective, search

__all__ = ["earlier_names"]


class _Explorer(search.Perturb):
    """`Perturb`, whose attributes had other names."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        names = {"_own": "_baseline_values", "_chance": "_rng"}
        vars(self).update({names.get(name, name): value for name, value in state.items()})


def _patient_s3(options: dict[str, Any], name: str | None = None) -> filesystems.RetryingS3:
    return filesystems.retrying_s3(options, name)


NAMES: dict[str, dict[str, Any]] = {
    "pipeline.storage": {**vars(storage), "PatientS3": filesystems.RetryingS3, "_patient_s3": _patient_s3},
    "pipeline.tuning.objectives": {**vars(objective), "Measure": objective.SweepObjective},
    "pipeline.tuning.searching": {**vars(search), "_Explorer": _Explorer},
    "pipeline.tuning.watching": {**vars(monitor), "Relayed": monitor.MonitorCallback},
}
"""Module of an earlier version -> its names."""


@contextmanager
def earlier_names() -> Iterator[None]:
    """Context in which what earlier versions pickled is unpickled as objects of this one."""
    modules = {name: ModuleType(name) for name in NAMES}
    for name, module in modules.items():
        vars(module).update(NAMES[name])
    # pickle imports a class's module by name, and takes one that is in sys.modules without a file.
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
