"""A prepared store of pairs about pictures, written by hand: rows, the files of their pictures, and a manifest."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.fingerprint import FORMAT_VERSION, digest
from pipeline.data.pictures import IMAGES, list_pictures, picture_path
from pipeline.data.store import CHECKSUM, COUNTS, MANIFEST, Prepared, checksum, open_store
from pipeline.io.digests import as_written
from pipeline.io.storage import Folder
from tests.laws.vision import prepared_pictures
from tests.tiny_vision import Vision

__all__ = ["picture_store"]

COMPLETIONS = {"pair": ("chosen", "rejected"), "unpaired": ("completion",)}


def picture_store(root: Path, vision: Vision, train: int = 16, evaluated: int = 4, kind: str = "pair") -> Prepared:
    """Write the store below `root`, in the folder that its fingerprint names, and open it."""
    folder = root / digest({"kind": kind, "train": train, "eval": evaluated, "tokens": len(vision.processor.tokenizer)})
    rows = prepared_pictures(vision, train + evaluated, "kto" if kind == "unpaired" else "dpo")
    names: set[str] = set()
    for number, row in enumerate(rows):
        row[IMAGES] = [_store(folder, image) for image in row[IMAGES]]
        names.update(row[IMAGES])
        row |= {"source": "drawn", "row_number": number + 1, "row_id": number}
        for name in ("prompt", *COMPLETIONS[kind]):
            text = vision.processor.tokenizer.decode(row[f"{name}_ids"], skip_special_tokens=True)
            row |= {name: text, f"{name}_length": len(row[f"{name}_ids"])}
    files = []
    for split, part in (("train", rows[:train]), ("eval", rows[train:])):
        path = folder / split / "part-00000.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(_table(part), path)
        files.append({"file": f"{split}/{path.name}", "rows": len(part), **as_written(path)})
    counts = {**dict.fromkeys(COUNTS, 0), "read": train + evaluated, "train": train, "eval": evaluated}
    manifest: dict[str, Any] = {
        "fingerprint": folder.name,
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "sources": [{"path": "drawn", **counts}],
        "lengths": {"total": {"p50": 1}},
        "notes": [],
        "files": sorted(files, key=lambda entry: entry["file"]),
        "inputs": {},
        "pictures": len(names),
        "picture_list": list_pictures(Folder(folder), names),
    }
    Folder(folder).write_json(MANIFEST, {**manifest, CHECKSUM: checksum(manifest)})
    store = open_store(folder)
    assert store is not None
    return store


def _store(folder: Path, image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    name = hashlib.blake2b(buffer.getvalue(), digest_size=16).hexdigest()
    path = picture_path(folder, f"{name[:2]}/{name}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
    return f"{name[:2]}/{name}.png"


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    types = {name: pa.list_(pa.int32()) for name in rows[0] if name.endswith("_ids")} | {IMAGES: pa.list_(pa.string())}
    return pa.table({name: pa.array([row[name] for row in rows], types.get(name)) for name in rows[0]})
