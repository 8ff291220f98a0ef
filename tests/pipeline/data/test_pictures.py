"""Rows with pictures: where they come from, where they stand, and the ids of their prompts."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.data.pictures import IMAGES, picture_path
from strategies.vision.images import decode_picture, pictures_of
from strategies.vision.processing import VisionProcessing
from strategies.vision.rows import tokenise
from tests.pipeline.data.conftest import make_config, prepare_here, write_jsonl
from tests.tiny_vision import FAMILIES, Vision, llava, picture, picture_pairs


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


RED, BLUE = encoded(picture("red", "circle")), encoded(picture("blue", "square", (64, 32)))


def asked(*parts: Any, chosen: str = "It is red", rejected: str = "blue!") -> dict[str, Any]:
    answers = {"chosen": chosen, "rejected": rejected}
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {
        "prompt": [{"role": "user", "content": content}],
        **{name: [{"role": "assistant", "content": text}] for name, text in answers.items()},
    }


PLACE = {"type": "image"}


def prepared(folder: Path, rows: list[Any], vision: Vision | None = None, type: Any = None, **keys: Any) -> Any:
    vision = vision or llava()
    (folder / "red.png").write_bytes(RED)
    (folder / "blue.png").write_bytes(BLUE)
    dataset = {"path": str(write_jsonl(folder / "rows.jsonl", rows)), **({} if type is None else {"type": type})}
    config = make_config(folder, dataset, max_rejected_fraction=1.0, **keys)
    return prepare_here(config, vision.processor.tokenizer, processor=vision.processor)


def reasons(store: Any) -> list[str]:
    return store.read("rejected")["reason"].to_pylist()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_ids_are_those_of_one_process(tmp_path: Path, family: str) -> None:
    """Of the processor on the whole prompt, for rows of TRL's shape; pictures lie in the store as they came."""
    vision = FAMILIES[family]()
    rows = picture_pairs(6)
    table = [{**row, "images": [{"bytes": encoded(image), "path": None} for image in row["images"]]} for row in rows]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "rows.parquet")
    config = make_config(tmp_path, {"path": str(tmp_path / "rows.parquet")})
    store = prepare_here(config, vision.processor.tokenizer, processor=vision.processor)
    assert store.rejected_rows == 0
    for row, raw, ours in zip(rows, table, store.read().to_pylist(), strict=True):
        expected = tokenise(row, VisionProcessing(vision.processor))
        assert ours["prompt_ids"] == expected["prompt_ids"]
        assert ours["chosen_ids"] == expected["chosen_ids"]
        assert picture_path(store.path, ours[IMAGES][0]).read_bytes() == raw["images"][0]["bytes"]
        whole = VisionProcessing(vision.processor).prompt_ids(ours["prompt"], row["images"])
        assert ours["prompt_ids"] == whole and ours["prompt_length"] == len(whole)


VALUES: dict[str, Any] = {
    "relative": "red.png",
    "absolute": "{folder}/red.png",
    "uri": "file://{folder}/red.png",
    "data URL": f"data:image/png;base64,{base64.b64encode(RED).decode()}",
    "struct": {"bytes": None, "path": "red.png"},
}


@pytest.mark.parametrize("name", list(VALUES))
@pytest.mark.parametrize("where", ["image", "images", "part", "url", "image_url"])
def test_kinds_of_pictures(tmp_path: Path, name: str, where: str) -> None:
    value = json.loads(json.dumps(VALUES[name]).replace("{folder}", str(tmp_path)))
    if where == "image":
        row = {"image": value, **asked(PLACE, "Which?")}
    elif where == "images":
        row = {"images": [value], **asked(PLACE, "Which?")}
    elif where == "part":
        row = asked({"type": "image", "image": value}, "Which?")
    elif where == "url":
        row = asked({"type": "image", "url": value}, "Which?")
    else:
        row = asked({"type": "image_url", "image_url": {"url": value}}, "Which?")
    store = prepared(tmp_path, [row])
    assert reasons(store) == [] if store.rejected_rows else True
    (ours,) = store.read().to_pylist()
    assert picture_path(store.path, ours[IMAGES][0]).read_bytes() == RED
    assert ours["prompt"] == "<|im_start|>user\n<image>Which?<|im_end|>\n<|im_start|>assistant\n"
    assert ours["prompt_ids"].count(llava().processor.image_token_id) == 16
