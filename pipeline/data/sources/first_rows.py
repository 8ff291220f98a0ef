"""The first rows of a dataset's local files, for checks before anything is prepared."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from pipeline.data.sources.filesystem import NETWORK_ERRORS, is_uri
from pipeline.data.sources.locate import locate
from pipeline.data.sources.readers import RawRow, read_rows
from pipeline.data.sources.shards import Shard
from pipeline.data.sources.sniff import sniff

__all__ = ["first_rows"]

FILES, ROWS = 3, 20


def first_rows(dataset: Mapping[str, Any]) -> Iterator[tuple[str, RawRow]]:
    """Yield (path of its file, row) of the first rows of the first files; none of what isn't on this machine or can't be read.

    Args:
        dataset: keys of an entry of `datasets:`.
    """
    # Whatever is wrong with the data is said where they are prepared; a UserError is a ValueError, too.
    with suppress(*NETWORK_ERRORS):
        for file in (locate(dataset) or [])[:FILES]:
            if not is_uri(file.location):
                yield from (
                    (file.location, row) for row in itertools.islice(read_rows(Shard(0, 0, sniff(file), 0, None)), ROWS)
                )
