"""Manifests that say what none would say: their checkpoint is damaged, and nothing else happens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from strategies.checkpoints.manifest import verify, write_manifest

FILE = {"bytes": 3, "sha256": "0" * 64}
WRONG: dict[str, Any] = {
    "nothing": {},
    "a list": [],
    "no files": {"files": None},
    "no checksum": {"files": {"a": {"bytes": 3}}},
    "bytes in words": {"files": {"a": {**FILE, "bytes": "three"}}},
    "no pieces": {"pieces": None},
    "no rank": {"rank": ...},
}


@pytest.mark.parametrize("name", list(WRONG))
def test_it_is_damaged(tmp_path: Path, name: str) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    write_manifest(tmp_path, 0, 1, {"pieces": {}})
    assert verify(tmp_path) is None
    path = tmp_path / "manifest-00000-of-00001.json"
    change = WRONG[name]
    manifest = {**json.loads(path.read_text()), **change} if isinstance(change, dict) and change else change
    if isinstance(manifest, dict):
        manifest = {key: value for key, value in manifest.items() if value is not ...}
    path.write_text(json.dumps(manifest))
    assert verify(tmp_path) == f"{tmp_path.name} is damaged: {path.name} doesn't say what a manifest says"


def test_it_is_cut_off(tmp_path: Path) -> None:
    write_manifest(tmp_path, 0, 1, {"pieces": {}})
    path = tmp_path / "manifest-00000-of-00001.json"
    path.write_text(path.read_text()[:20])
    damage = verify(tmp_path)
    assert damage is not None and damage.startswith(f"{tmp_path.name} is damaged: {path.name} is no JSON (")


def test_it_says_something_else(tmp_path: Path) -> None:
    """Than what was written; one of an earlier version, which says no checksum, is believed."""
    write_manifest(tmp_path, 0, 1, {"pieces": {"a": (0, [2])}, "step": 3})
    path = tmp_path / "manifest-00000-of-00001.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "step": 4}))
    assert verify(tmp_path) == f"{tmp_path.name} is damaged: {path.name} isn't what was written"
    path.write_text(json.dumps({name: value for name, value in manifest.items() if name != "checksum"}))
    assert verify(tmp_path) is None
