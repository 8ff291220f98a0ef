"""Decoding of Arrow data into the JSON-like rows that it was written from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

__all__ = ["arrow_batches", "decoded_rows", "without_nulls"]


def arrow_batches(source: Any) -> Iterator[pa.RecordBatch]:
    """Read the batches of an Arrow file or stream."""
    # `save_to_disk` writes the stream format under the same extension as files; only the first bytes differ.
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    if not is_file:
        return iter(pa.ipc.open_stream(source))
    file = pa.ipc.open_file(source)
    # Lazily: batches of a memory-mapped file are read from disk as they are used.
    return (file.get_batch(index) for index in range(file.num_record_batches))


def decoded_rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """Decode rows to dicts: JSON columns (`datasets.Json`) are parsed, null struct fields are dropped (`_is_present`)."""
    decoders = {field.name: _decoder(field.type) for field in batch.schema}
    for row in batch.to_pylist():
        yield {name: decoders[name](value) for name, value in row.items()}


def _decoder(data_type: pa.DataType) -> Callable[[Any], Any]:
    if isinstance(data_type, pa.JsonType):
        return lambda value: None if value is None else json.loads(value)
    if pa.types.is_list(data_type) or pa.types.is_large_list(data_type):
        item = _decoder(data_type.value_type)
        return lambda value: None if value is None else [item(element) for element in value]
    if pa.types.is_struct(data_type):
        inner = {field.name: _decoder(field.type) for field in data_type}
        return lambda value: None if value is None else {k: inner[k](v) for k, v in value.items() if _is_present(k, v)}
    return lambda value: value


def without_nulls(value: Any) -> Any:
    """Drop null struct fields from a value that `datasets` has decoded."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if _is_present(key, inner)}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _is_present(key: str, value: Any) -> bool:
    """Return whether an object had the key: structs of a column share all keys, so a null mostly means a missing one.

    `content: null` is kept, since messages with tool calls are written so.
    """
    return value is not None or key == "content"
