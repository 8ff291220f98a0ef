"""Sweeps that an earlier version began are resumed: what it pickled is read under the names of now."""

from __future__ import annotations

import pickle
import random
import sys
from types import ModuleType
from typing import Any

import pytest

from pipeline.config import parse_config
from pipeline.io.filesystems import RetryingS3
from pipeline.tuning.earlier import NAMES, earlier_names
from pipeline.tuning.monitor import MonitorCallback
from pipeline.tuning.objective import SweepObjective
from pipeline.tuning.search import SAMPLE, Perturb


def pickled_as(module: str, name: str, state: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> bytes:
    """An object of a class that was named so, with that state."""
    there = ModuleType(module)
    kind = type(name, (), {"__module__": module})
    setattr(there, name, kind)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, module, there)
        one = kind()
        vars(one).update(state)
        return pickle.dumps(one)


@pytest.mark.parametrize(
    ("module", "name", "now"),
    [
        ("pipeline.tuning.watching", "Relayed", MonitorCallback),
        ("pipeline.tuning.objectives", "Measure", SweepObjective),
        ("pipeline.tuning.searching", "_Explorer", Perturb),
    ],
)
def test_names_of_earlier_versions(module: str, name: str, now: type, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = pickled_as(module, name, {}, monkeypatch)
    with pytest.raises(ModuleNotFoundError):
        pickle.loads(saved)
    with earlier_names():
        assert isinstance(pickle.loads(saved), now)
    assert not NAMES.keys() & sys.modules.keys()


def test_pbt_perturbs_as_it_would_have(monkeypatch: pytest.MonkeyPatch) -> None:
    space = {"learning_rate": {"loguniform": [1e-5, 1e-3]}}
    recipe = {"base_model": "m", "datasets": [{"path": "p"}], "val_set_size": 2, "output_dir": "o", "tune": {"space": space}}
    tune, values = parse_config(recipe).tune, {"learning_rate": 1e-4}
    assert tune is not None
    state = {"_tune": tune, "_own": values, "_chance": random.Random(7)}
    saved = pickled_as("pipeline.tuning.searching", "_Explorer", state, monkeypatch)
    config = {SAMPLE: {"number": 1, "values": None}}
    with earlier_names():
        assert pickle.loads(saved)(config) == Perturb(tune, values, 7)(config) != config


@pytest.mark.parametrize("arguments", [({"region": "us-east-1"},), ({"region": "us-east-1"}, None)])
def test_storage_of_earlier_versions(arguments: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tune saves the filesystem of a sweep on S3 with it; the first versions had no names for keys."""
    there = ModuleType("pipeline.storage")
    exec("def _patient_s3(*arguments): ...", vars(there))

    class Saved:
        def __reduce__(self) -> tuple[Any, ...]:
            return vars(there)["_patient_s3"], arguments

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pipeline.storage", there)
        vars(there)["_patient_s3"].__module__ = "pipeline.storage"
        saved = pickle.dumps(Saved())
    with earlier_names():
        assert isinstance(pickle.loads(saved), RetryingS3)
