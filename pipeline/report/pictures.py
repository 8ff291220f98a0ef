"""A few training rows with their pictures, as thumbnails inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

from pipeline.data.pictures import IMAGES, read_picture
from pipeline.data.row_kinds import COMPLETIONS
from pipeline.data.store import TRAIN, Prepared
from pipeline.io.retry import STORAGE_ERRORS
from pipeline.io.storage import Folder
from pipeline.report.page import Comparison, Message, Picture, Section
from strategies.vision.images import pictures_of

__all__ = ["picture_sections"]

ROWS, EACH = 4, 4
"""Number of rows shown, and of pictures of each."""
SIDE = 96
"""Most pixels of a thumbnail's width or height."""
BATCH = 64
"""Rows converted at a time."""


def picture_sections(store: Prepared) -> list[Section]:
    """Return a section with the first training rows that have pictures; none for a store without pictures.

    Raises:
        OSError, pyarrow.ArrowException: when the rows can't be read; a picture that can't be read is replaced by the reason.
    """
    if not store.manifest.get("pictures"):
        return []
    comparisons = [_comparison(store, row) for row in _rows(store)]
    if not comparisons:
        return []
    words = f"The first training rows with pictures; the data have {store.manifest['pictures']:,} different pictures in all."
    return [Section("pictures", "Rows with their pictures", words, comparisons=comparisons)]


def _rows(store: Prepared) -> Iterator[dict[str, Any]]:
    """Yield the first `ROWS` training rows that have a picture."""
    names = ["prompt", *COMPLETIONS[store.manifest["kind"]], IMAGES]
    labels = ["label"] if store.manifest["kind"] == "unpaired" else []
    found = 0
    for part in store.parts(TRAIN):
        # Part by part: the text of a whole store may not fit into memory.
        for batch in store.read_part(part, [*names, *labels]).to_batches(BATCH):
            for row in filter(lambda row: row[IMAGES], batch.to_pylist()):
                yield row
                found += 1
                if found == ROWS:
                    return


def _comparison(store: Prepared, row: dict[str, Any]) -> Comparison:
    more = f" (the first {EACH} of {len(row[IMAGES])} pictures)" if len(row[IMAGES]) > EACH else ""
    pictures = [_picture(store.folder, name) for name in row[IMAGES][:EACH]]
    if store.manifest["kind"] == "unpaired":
        answers = [Message("desirable" if row["label"] else "undesirable", row["completion"])]
    else:
        answers = [Message(name, row[name]) for name in COMPLETIONS[store.manifest["kind"]]]
    return Comparison(Message(f"prompt{more}", row["prompt"]), answers, pictures)


def _picture(store: Folder, name: str) -> Picture:
    """Return a thumbnail of a stored picture, or the reason why there is none."""
    try:
        [image] = pictures_of({"images": [read_picture(store, name)]})
    except (ValueError, *STORAGE_ERRORS) as error:
        return Picture(f"{name}: {error}")
    label = f"{name}, {image.width} x {image.height} pixels"
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    # Bounded: of noise, 96 x 96 pixels take 8 kB.
    image.save(buffer, format="JPEG", quality=85)
    return Picture(label, f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}")
