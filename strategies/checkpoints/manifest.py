"""Manifests: the files that a rank wrote, their checksums, and the identity of the run."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["FORMAT_VERSION", "MANIFEST", "identity_mismatch", "own_files", "read_manifests", "verify", "write_manifest"]

FORMAT_VERSION = 1
MANIFEST = re.compile(r"manifest-(\d{5})-of-(\d{5})\.json")
OF_A_RANK = re.compile(r"(?:state|manifest|generation)-(\d{5})-of-\d{5}\.\w+|rng_state_(\d+)\.pth")
"""Files whose names contain their rank; all others belong to rank 0."""


def manifest_name(rank: int, world_size: int) -> str:
    """Return the file name of a rank's manifest."""
    return f"manifest-{rank:05d}-of-{world_size:05d}.json"


def own_files(folder: Path, rank: int) -> list[Path]:
    """Return the files of a checkpoint folder, shared by the ranks of a node, that this rank describes and stores.

    Hidden files belong to no rank: they are partial files that another rank is about to rename (manifests, safetensors).
    """
    visible = (path for path in folder.rglob("*") if not path.name.startswith("."))
    return sorted(path for path in visible if _rank_of(path) == rank and path.is_file())


def _rank_of(path: Path) -> int:
    match = OF_A_RANK.fullmatch(path.name)
    return int(match.group(1) or match.group(2)) if match else 0


def write_manifest(folder: Path, rank: int, world_size: int, content: Mapping[str, Any]) -> None:
    """Write the manifest of this rank's files, atomically."""
    files = {str(path.relative_to(folder)): _described(path) for path in own_files(folder, rank)}
    name = manifest_name(rank, world_size)
    manifest = {"format_version": FORMAT_VERSION, "rank": rank, "world_size": world_size, "files": files, **content}
    manifest = json.loads(json.dumps(manifest))  # as it is read back, which the checksum is computed of
    # Renamed when whole: a checkpoint counts as complete once all of its manifests are there.
    partial = folder / f".{name}.partial"
    partial.write_text(json.dumps({**manifest, "checksum": _checksum(manifest)}))
    os.replace(partial, folder / name)


def _checksum(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest without its checksum."""
    content = {name: value for name, value in manifest.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def read_manifests(folder: Path) -> list[dict[str, Any]]:
    """Return the manifests of all ranks, by rank.

    Raises:
        ValueError: if one is missing or unreadable: the checkpoint is incomplete.
    """
    # Ranks are padded with zeros, so that the order of names is that of ranks.
    names = sorted(path.name for path in folder.iterdir() if MANIFEST.fullmatch(path.name))
    if missing := missing_manifests(names):
        raise ValueError(f"{folder.name} is incomplete: it lacks {missing[0]}")
    return [_read_manifest(folder / name) for name in names]


def _read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest, possibly of another format version, and check its structure."""
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path.parent.name} is damaged: {path.name} is no JSON ({error})") from error
    files = manifest.get("files") if isinstance(manifest, dict) else None
    is_whole = isinstance(files, dict) and all(
        isinstance(file, dict) and isinstance(file.get("bytes"), int) and isinstance(file.get("sha256"), str)
        for file in files.values()
    )
    if not is_whole or not isinstance(manifest.get("pieces"), dict) or {"rank", "world_size"} - manifest.keys():
        raise ValueError(f"{path.parent.name} is damaged: {path.name} doesn't say what a manifest says")
    if manifest.get("checksum", _checksum(manifest)) != _checksum(manifest):  # absent in older manifests
        raise ValueError(f"{path.parent.name} is damaged: {path.name} isn't what was written")
    return manifest


def is_complete(folder: Path) -> bool:
    """Return whether a folder has the manifests of all ranks."""
    return folder.is_dir() and not missing_manifests(path.name for path in folder.iterdir())


def missing_manifests(names: Iterable[str]) -> list[str]:
    """Return the names of manifests that a checkpoint with these files lacks."""
    existing = {match.group(0): int(match.group(2)) for match in map(MANIFEST.fullmatch, names) if match}
    # Without any manifest, rank 0's is what is missing, whatever the number of workers was.
    world_size = max(existing.values(), default=1)
    return [name for rank in range(world_size) if (name := manifest_name(rank, world_size)) not in existing]


def verify(folder: Path, manifests: Iterable[Mapping[str, Any]] | None = None) -> str | None:
    """Check the files of a checkpoint against its manifests; return a phrase on the first problem, or None."""
    try:
        manifests = read_manifests(folder) if manifests is None else manifests
    except ValueError as error:
        return str(error)
    for manifest in manifests:
        for name, expected in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{folder.name} is damaged: {name} is missing"
            # Before the checksum: a truncated file is found without reading it.
            if path.stat().st_size != expected["bytes"]:
                return f"{folder.name} is damaged: {name} has {path.stat().st_size:,} bytes, not {expected['bytes']:,}"
            if _described(path)["sha256"] != expected["sha256"]:
                return f"{folder.name} is damaged: {name} has another checksum than its manifest says"
    return None


def identity_mismatch(manifest: Mapping[str, Any], identity: Mapping[str, Any]) -> list[str]:
    """Return the differences between a checkpoint's run and the current one, a line each.

    Args:
        manifest: of rank 0.
        identity: of the current run; names that only one of them has are not compared.
    """
    if (version := manifest.get("format_version")) != FORMAT_VERSION:
        return [f"format: was {version}, this version of prefray reads {FORMAT_VERSION}"]
    saved = manifest.get("identity", {})
    common = {name: value for name, value in identity.items() if name in saved}
    return [f"{name}: was {saved[name]}, is {value}" for name, value in common.items() if saved[name] != value]
