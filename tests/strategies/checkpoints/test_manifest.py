"""Manifests that say what none would say: their checkpoint is damaged, and nothing else happens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from strategies.checkpoints.manifest import find_damage, write_manifest

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
    assert find_damage(tmp_path) is None
    path = tmp_path / "manifest-00000-of-00001.json"
    change = WRONG[name]
    manifest = {**json.loads(path.read_text()), **change} if isinstance(change, dict) and change else change
    if isinstance(manifest, dict):
        manifest = {key: value for key, value in manifest.items() if value is not ...}
    path.write_text(json.dumps(manifest))
    assert find_damage(tmp_path) == f"{tmp_path.name} is damaged: {path.name} doesn't say what a manifest says"


def test_it_is_cut_off(tmp_path: Path) -> None:
    write_manifest(tmp_path, 0, 1, {"pieces": {}})
    path = tmp_path / "manifest-00000-of-00001.json"
    path.write_text(path.read_text()[:20])
    damage = find_damage(tmp_path)
    assert damage is not None and damage.startswith(f"{tmp_path.name} is damaged: {path.name} is no JSON (")
