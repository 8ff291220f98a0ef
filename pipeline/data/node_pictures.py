"""Pictures of a store as files of a node: in place where it sees the store's path, else in its cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.data.mapped import read_checked
from pipeline.data.pictures import IMAGES
from pipeline.errors import UserError
from pipeline.io.cache import Item, NodeCache
from pipeline.io.storage import Folder
from pipeline.io.tables import decoded
from pipeline.io.threads import ahead

if TYPE_CHECKING:
    from pipeline.data import Prepared

__all__ = ["pictures_item", "pictures_on_node"]

WHAT = "the pictures of the rows"


def pictures_on_node(cache: NodeCache, prepared: Prepared, beat: Callable[[], None] = lambda: None) -> Folder:
    """Return a folder of this node with the pictures of a store, as `picture_path` finds them.

    Raises:
        UserError: when a picture of a store at a URI can't be read or isn't what was written, and as `NodeCache.get`.
    """
    if prepared.folder.is_local:
        return prepared.folder
    return Folder(cache.get(pictures_item(prepared, beat), beat))


def pictures_item(prepared: Prepared, beat: Callable[[], None] = lambda: None) -> Item:
    """Return the entry of the cache with the pictures of a store at a URI."""
    entry = prepared.manifest["picture_list"]
    read = partial(read_checked, prepared.folder, what=WHAT, beat=beat)

    def fill(folder: Path) -> None:
        names = decoded(read(entry))["name"].to_pylist()
        for name, data in zip(names, ahead(lambda name: read({"file": f"{IMAGES}/{name}"}), names), strict=True):
            # Its name is the hash of its bytes.
            if hashlib.blake2b(data, digest_size=16).hexdigest() != Path(name).stem:
                raise UserError(
                    f"dataset_prepared_path: {prepared.path} doesn't hold {WHAT} as they were written: {IMAGES}/{name}"
                )
            (folder / IMAGES / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / IMAGES / name).write_bytes(data)
            beat()

    def size() -> int:
        return int(np.sum(decoded(read(entry), ["bytes"])["bytes"].to_numpy()))

    return Item(f"pictures-{entry['sha256'][:32]}", WHAT, size, fill)
