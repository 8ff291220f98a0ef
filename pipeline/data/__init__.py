"""Stage 1: tokenizes raw preference data into content-addressed Parquet.

sources/          reads raw rows from files, folders, URIs and the hub; splits sources into shards
transforms/       dataset types: convert a raw row to prompt and completions as text
keys.py           config keys of the data; dataset_keys.py those of an entry of `datasets:`
row_kinds.py      kinds of rows by method: a pair, a labelled completion, a prompt
tokenize.py       converts text to ids; truncation.py drops or truncates long rows
plan.py           resolves a config to sources and settings; fingerprint.py hashes them
job.py            settings of the tasks
process_shard.py  writes the staged parts of one shard, in a task of pipeline/ray/tasks.py; columns.py is their table
staged_parts.py   staged parts as files, which a killed preparation finds again
split.py          assigns rows to train, eval or duplicates; write_store.py writes the store
preparation.py    runs the whole stage; store.py reads the store, preview.py displays it
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from strategies.lazy import lazy_names

if TYPE_CHECKING:
    from pipeline.data.preparation import prepare
    from pipeline.data.preview import Preview
    from pipeline.data.store import Prepared
    from pipeline.data.transforms import dataset_types, load_transform, register_dataset_type
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "pipeline.data.preparation": "prepare",
            "pipeline.data.preview": "Preview",
            "pipeline.data.store": "Prepared",
            "pipeline.data.transforms": "dataset_types load_transform register_dataset_type",
        },
    )

__all__ = ["Prepared", "Preview", "dataset_types", "load_transform", "prepare", "register_dataset_type"]
