"""Names of pictures become what trainers read."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from pipeline.data.pictures import picture_column
from pipeline.io.storage import Folder


def test_names_become_paths() -> None:
    names = pa.chunked_array([[["a/b.png"], [], None], [["c/d.jpg", "e/f.png"]]], pa.list_(pa.string()))
    store = Folder(Path("/store"))
    paths = [[one["path"] for one in row] for row in picture_column(store, names).to_pylist()]
    assert paths == [["/store/images/a/b.png"], [], [], ["/store/images/c/d.jpg", "/store/images/e/f.png"]]
    # A slice begins within its chunk.
    assert picture_column(store, names.slice(2)).to_pylist() == picture_column(store, names).to_pylist()[2:]
    assert picture_column(store, names.slice(0, 0)).to_pylist() == []
