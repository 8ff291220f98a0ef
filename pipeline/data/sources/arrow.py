"""Arrow data as the JSON-like rows that it was made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

__all__ = ["arrow_batches", "decoded_rows", "without_nulls"]


def arrow_batches(source: Any) -> Iterator[pa.RecordBatch]:
    """The batches of an Arrow file or stream."""
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    if not is_file:
        return iter(pa.ipc.open_stream(source))
    file = pa.ipc.open_file(source)
    return (file.get_batch(number) for number in range(file.num_record_batches))


def decoded_rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """Rows as dicts; JSON columns (`datasets.Json`) parsed, keys that an object never had left out."""
    decoders = {field.name: _decoder(field.type) for field in batch.schema}
    for row in batch.to_pylist():
        yield {name: decoders[name](value) for name, value in row.items()}


def _decoder(kind: pa.DataType) -> Callable[[Any], Any]:
    if isinstance(kind, pa.JsonType):
        return lambda value: None if value is None else json.loads(value)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        item = _decoder(kind.value_type)
        return lambda value: None if value is None else [item(element) for element in value]
    if pa.types.is_struct(kind):
        inner = {field.name: _decoder(field.type) for field in kind}
        return lambda value: None if value is None else {k: inner[k](v) for k, v in value.items() if _said(k, v)}
    return lambda value: value


def without_nulls(value: Any) -> Any:
    """The same for values that somebody else has decoded."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if _said(key, inner)}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _said(key: str, value: Any) -> bool:
    """Structs of one column share all their keys, so a null mostly means that the object lacked the key.

    `content: null` is how calls of tools are written, and stays.
    """
    return value is not None or key == "content"
