"""Stage 1: raw preference data becomes token ids in content-addressed Parquet.

sources/        where rows come from: files, folders, URIs, the hub; how they are cut into shards
transforms/     what a dataset type means: a raw row becomes prompt and completions as text
kinds.py        what a row holds, by method: a pair, a labelled answer, a prompt
tokenise.py     text becomes ids; length.py decides about long rows
plan.py         what a config asks for; fingerprint.py names it
staging.py      one shard becomes staged parts, in a task that engine.py runs on Ray Data; columns.py is their table
decide.py       which rows train, evaluate, or are duplicates; finalise.py writes them out
preparation.py  the stage as a whole; store.py reads what it leaves behind, preview.py shows it
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.data.preparation import prepare as prepare
    from pipeline.data.preview import render_preview as render_preview
    from pipeline.data.store import Prepared as Prepared
    from pipeline.data.transforms import dataset_types as dataset_types
    from pipeline.data.transforms import load_transform as load_transform
    from pipeline.data.transforms import register_dataset_type as register_dataset_type

_HOMES = {
    "Prepared": "pipeline.data.store",
    "dataset_types": "pipeline.data.transforms",
    "load_transform": "pipeline.data.transforms",
    "prepare": "pipeline.data.preparation",
    "register_dataset_type": "pipeline.data.transforms",
    "render_preview": "pipeline.data.preview",
}
__all__ = ["Prepared", "dataset_types", "load_transform", "prepare", "register_dataset_type", "render_preview"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
