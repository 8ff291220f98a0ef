"""Files of weights in a store, checked for completeness by a few bytes of each."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipeline.io.storage import Folder

__all__ = ["WEIGHTS", "check_whole", "missing_shards"]

WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
"""Endings of files with weights."""
LONGEST_HEADER = 100_000_000
"""Bytes, as safetensors itself has it."""
ZIP_BEGINS, ZIP_ENDS = b"PK\x03\x04", b"PK\x05\x06"
ZIP_TAIL = 22 + 65_535
"""Bytes that hold a zip's end, the longest comment included."""


def missing_shards(folder: Folder, names: Mapping[str, int]) -> list[str]:
    """Return the files that the indices of a folder name and that it doesn't have.

    Args:
        names: of all of its files, with their sizes.

    Raises:
        OSError: when an index can't be read; UserError when it is no JSON.
    """
    wanted: set[str] = set()
    for index in (name for name in names if name.endswith((".safetensors.index.json", ".bin.index.json"))):
        shards = (folder.read_json(index) or {}).get("weight_map", {}).values()
        found = {f"{index.rpartition('/')[0]}/{shard}".lstrip("/") for shard in shards}
        # An index of another format, none of whose files was uploaded, is never read.
        wanted |= found if found & names.keys() else set()
    return sorted(wanted - names.keys())


def check_whole(folder: Folder, name: str, size: int) -> str | None:
    """Return how a file of weights is cut short, in a phrase; None where it isn't, or that can't be seen. Raises OSError."""
    with folder.filesystem.open_input_file(f"{folder.path}/{name}") as file:
        if name.endswith(".safetensors"):
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(LONGEST_HEADER, size - 8):
                return f"{name} has no header of safetensors"
            try:
                tensors = json.loads(file.read(length))
            except ValueError:
                return f"{name} has no header of safetensors"
            data = max((entry["data_offsets"][1] for key, entry in tensors.items() if key != "__metadata__"), default=0)
            return None if 8 + length + data == size else f"{name} has {size} bytes, and its tensors take {8 + length + data}"
        begins = file.read(4)
        if name.endswith(".gguf"):
            return None if begins == b"GGUF" else f"{name} is no GGUF file"
        if begins == ZIP_BEGINS:
            file.seek(max(0, size - ZIP_TAIL))
            return None if ZIP_ENDS in file.read(ZIP_TAIL) else f"{name} ends before its end"
    return None if size else f"{name} is empty"
