"""Raw rows about pictures, of TRL's shapes, to prepared rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset, concatenate_datasets
from trl.data_utils import apply_chat_template, is_conversational, prepare_multimodal_messages

from strategies.media import PICTURES, USUAL, ignored_keys
from strategies.vision.images import encode_pictures, pictures_of
from strategies.vision.processing import VisionProcessing

__all__ = ["with_pictures"]

OF_PREPARED = ("base64", "path", "source", "url")
"""Keys of parts that hold a picture where `prepare` reads rows; TRL's have none."""
TEXTS = ("prompt", "chosen", "rejected", "completion")


def with_pictures(rows: Any, vision: VisionProcessing, name: str) -> Any:
    """Tokenise raw rows with a processor. Their pictures stay where they are, in `image` or `images`.

    Raises:
        ValueError: naming the first row whose pictures and placeholders don't match, or whose picture can't be read.
    """
    if not isinstance(rows, (Dataset, IterableDataset)):
        rows = Dataset.from_list([encode_pictures(rows[index]) for index in range(len(rows))])
    indices = {"with_indices": True, "fn_kwargs": {"vision": vision, "name": name}}
    if isinstance(rows, IterableDataset):
        return rows.map(_tokenise, **indices)
    # The ids alone: `map` would write pictures that it has decoded, those of JPEG files with loss.
    ids = rows.map(_tokenise, remove_columns=rows.column_names, **indices)
    return concatenate_datasets([rows.remove_columns([*{*ids.column_names} & {*rows.column_names}]), ids], axis=1)


def _tokenise(row: Mapping[str, Any], index: int, vision: VisionProcessing, name: str) -> dict[str, Any]:
    try:
        return tokenise(row, vision)
    except ValueError as error:
        raise ValueError(f"{name}: row {index}: {error}") from error


def tokenise(row: Mapping[str, Any], vision: VisionProcessing) -> dict[str, Any]:
    """Return the ids of a prepared row."""
    images = pictures_of(row)
    texts = {key: row[key] for key in TEXTS if row.get(key) is not None}
    if "prompt" not in texts:
        raise ValueError("no prompt; with a processor every row needs one, apart from its answers")
    if is_conversational(texts):
        _check_places(row, texts["prompt"], vision)
        texts = {
            # Without pictures TRL refuses placeholders, so an answer can't have any.
            key: prepare_multimodal_messages(_plain_parts(turns), images if key == "prompt" else None)
            for key, turns in texts.items()
        }
        options = {"chat_template_kwargs": row["chat_template_kwargs"]} if row.get("chat_template_kwargs") else {}
        # As TRL: JSON text, since Arrow would give the schemas in a column each other's keys.
        tools = row.get("tools")
        texts = apply_chat_template(
            {**texts, **options}, vision.processor, tools=json.loads(tools) if isinstance(tools, str) else tools
        )
    ids = {f"{key}_ids": vision.completion_ids(text) for key, text in texts.items() if key != "prompt"}
    return {"prompt_ids": vision.prompt_ids(texts["prompt"], images), **ids}


def _check_places(row: Mapping[str, Any], prompt: Sequence[Any], vision: VisionProcessing) -> None:
    """Check that no text says where a picture stands in words that this model doesn't read, and that no part changes one.

    Raises:
        ValueError: as for a row of LLaVA's, given to another model.
    """
    users = [turn.get("content") for turn in prompt if isinstance(turn, Mapping) and turn.get("role") == "user"]
    is_read = vision.processor.image_token == USUAL
    if not is_read and any(name in row for name in PICTURES) and any(isinstance(one, str) and USUAL in one for one in users):
        raise ValueError(
            f"a turn of the user has {USUAL!r} in its text, which this model reads as text; give content as parts, "
            '{"type": "image"} and {"type": "text", "text": ...}'
        )
    parts = [part for content in users if isinstance(content, list) for part in content if isinstance(part, Mapping)]
    parts = [part for part in parts if part.get("type") == "image"]
    if own := [key for part in parts for key in OF_PREPARED if part.get(key) is not None]:
        raise ValueError(f"a part of type image has a picture of its own in {own[0]!r}; give all pictures in the column images")
    if ignored := [key for part in parts for key in ignored_keys(part)]:
        raise ValueError(
            f"a part of type image has {ignored[0]!r}, which isn't read: a picture's pixels follow from the processor's "
            "settings; remove it"
        )


def _plain_parts(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop the keys that a table adds to parts of a message that haven't them; a part without a type is text."""
    return [
        {**turn, "content": [*map(_part, turn["content"])]} if isinstance(turn["content"], list) else turn for turn in turns
    ]


def _part(part: Any) -> dict[str, Any]:
    if not isinstance(part, Mapping):
        return {"type": "text", "text": str(part)}
    return {"type": "text", **{key: value for key, value in part.items() if value is not None}}
