"""Rows with pictures: where they come from, where they stand, and the ids of their prompts."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import threading
from datetime import timedelta
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as DatasetImage
from PIL import Image
from rich.console import Console

from pipeline.config import parse_config
from pipeline.data import Preview
from pipeline.data.pictures import IMAGES, picture_path
from pipeline.data.sources import hub
from pipeline.data.store import open_store
from pipeline.errors import UserError
from strategies.models.chat_templates import CHATML
from strategies.vision.processing import VisionProcessing
from strategies.vision.rows import tokenise
from strategies.vision.sizes import with_size
from tests.pipeline.data.conftest import make_config, prepare_here, write_jsonl
from tests.tiny_vision import FAMILIES, Vision, llava, picture, picture_pairs, save_vision


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


RED_IMAGE, BLUE_IMAGE = picture("red", "circle"), picture("blue", "square", (64, 32))
RED, BLUE = encoded(RED_IMAGE), encoded(BLUE_IMAGE)


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
    folder.mkdir(exist_ok=True)
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
    "of the user's home": "~/red.png",
    "uri": "file://{folder}/red.png",
    "data URL": f"data:image/png;base64,{base64.b64encode(RED).decode()}",
    "data URL of another case": f"DATA:image/PNG;BASE64,{base64.b64encode(RED).decode()}",
    "uri of another case": "FILE://{folder}/red.png",
    "struct": {"bytes": None, "path": "red.png"},
}


@pytest.mark.parametrize("name", list(VALUES))
@pytest.mark.parametrize("where", ["image", "images", "part", "url", "image_url", "source"])
def test_kinds_of_pictures(tmp_path: Path, name: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    value = json.loads(json.dumps(VALUES[name]).replace("{folder}", str(tmp_path)))
    if where == "image":
        row = {"image": value, **asked(PLACE, "Which?")}
    elif where == "images":
        row = {"images": [value], **asked(PLACE, "Which?")}
    elif where == "part":
        row = asked({"type": "image", "image": value}, "Which?")
    elif where == "url":
        row = asked({"type": "image", "url": value}, "Which?")
    elif where == "source":
        # Anthropic's: of base64 without a URL.
        kind, base = ("base64", str(value).partition(",")[2]) if name == "data URL" else ("url", "red.png")
        row = asked({"type": "image", "source": {"type": kind, "data" if kind == "base64" else "url": base}}, "Which?")
    else:
        row = asked({"type": "image_url", "image_url": {"url": value}}, "Which?")
    store = prepared(tmp_path, [row])
    assert reasons(store) == [] if store.rejected_rows else True
    (ours,) = store.read().to_pylist()
    assert picture_path(store.path, ours[IMAGES][0]).read_bytes() == RED
    assert ours["prompt"] == "<|im_start|>user\n<image>Which?<|im_end|>\n<|im_start|>assistant\n"
    assert ours["prompt_ids"].count(llava().processor.image_token_id) == 16


def gif() -> bytes:
    frames = [picture(color, "square") for color in ("red", "blue")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


ONE = asked(PLACE, "Which?")
TWO = asked(PLACE, PLACE, "Which?")
DDS = encoded(RED_IMAGE, "DDS")
REJECTED: list[tuple[Any, str]] = [
    ({"image": "none.png", **ONE}, r"can't be read: none\.png: .*none\.png"),
    ({"image": data_url(RED[:100]), **ONE}, "a picture can't be read: "),
    ({"image": data_url(b"text"), **ONE}, "a picture can't be read: it is of no format that Pillow knows$"),
    ({"image": data_url(DDS[:80] + b"\0\x18" + DDS[82:]), **ONE}, "a picture can't be read: Unknown pixel format flags 6144"),
    ({"image": "http://[::1/red.png", **ONE}, "a picture can't be read: http://.*Invalid IPv6 URL"),
    ({"image": "\ud800.png", **ONE}, r"a picture can't be read: \\ud800\.png"),
    ({"image": data_url(encoded(RED_IMAGE, "EPS")), **ONE}, r"a picture is PostScript \(EPS\); convert it to PNG"),
    ({"image": data_url(gif()), **ONE}, "a picture has 2 frames"),
    ({"image": data_url(encoded(Image.new("I;16", (8, 8)))), **ONE}, "more than 8 bits a channel"),
    ({"image": data_url(encoded(Image.new("1", (10_000, 9_000)))), **ONE}, "90000000 pixels.*could be decompression bomb"),
    ({"image": "data:image/png,abc", **ONE}, "must hold base64"),
    ({"image": "data:image/png;base64,@@", **ONE}, "is no base64"),
    ({"image": 3, **ONE}, "a picture must be a path, a URI, bytes, or a mapping of bytes and path, got int"),
    ({"image": {"bytes": None, "path": None}, **ONE}, "got nothing"),
    ({"image": "red.png", "images": ["blue.png"], **ONE}, "in 'image' and in 'images'"),
    ({"images": ["red.png"], **TWO}, "'prompt' has 2 parts of type image without a picture of their own, and the row has 1"),
    (ONE, "'prompt' has 1 parts of type image without a picture of their own, and the row has 0 pictures"),
    ({"images": ["red.png", "blue.png"], **ONE}, "'prompt' has 1 parts .* and the row has 2 pictures"),
    ({"images": ["red.png"], **asked({"type": "image", "url": "red.png"}, "?")}, "no part of a message stands for"),
    (asked({"type": "image", "url": "red.png", "path": "red.png"}, "?"), "in 'url' and in 'path'; give one"),
    ({"images": ["red.png"], **asked({"type": "image", "index": 1}, "?")}, "is the picture 1 of the row, which has 1"),
    ({"image": "red.png", **asked(PLACE, "Is <image> a tag?")}, "placeholders of pictures .* the messages have 1 pictures"),
    (asked({"type": "image", "source": {"type": "file", "file_id": "a"}}, "?"), "base64 with data, or of type url with url"),
    (asked({"type": "image", "source": {"type": "base64", "data": "a" * 2001}}, "?"), "is no base64"),
    (asked("Is <image> a tag?"), "'prompt' holds the token of a picture, '<image>', 1 times beside 0 pictures"),
    ({"image": "red.png", **asked(PLACE, "?", chosen="an <image>")}, "placeholders of pictures"),
    ({"image": "red.png", **asked(PLACE, "\ue0030\ue004")}, r"the text holds U\+E003"),
    ({"image": "red.png", "prompt": "Which?", "chosen": "a", "rejected": "b"}, "0 of the row's 1 pictures stand in its text"),
    ({"images": ["red.png"], "prompt": "<image><image>?", "chosen": "a", "rejected": "b"}, "0 of the row's 1 pictures"),
    ({"image": "red.png", "prompt": "<image>?", "chosen": "<image>", "rejected": "b"}, "an answer has a picture"),
    ({"video": "a.mp4", **asked("Which?")}, "the column 'video' is no text"),
    (
        {
            "images": ["red.png"],
            "prompt": [{"role": "user", "content": "<image> and <image>?"}],
            "chosen": "a",
            "rejected": "b",
        },
        "'prompt' has 2 placeholders of pictures in its text, and the row has 1 pictures",
    ),
]


@pytest.mark.parametrize(("row", "reason"), REJECTED, ids=[reason[:40] for _, reason in REJECTED])
def test_rejected_rows(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    good = {"image": "red.png", **ONE}
    if isinstance(row.get("chosen"), str) and not isinstance(row["prompt"], str):
        row = {**row, **{name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}}
    store = prepared(tmp_path, [row, good])
    (found,) = reasons(store)
    assert re.search(reason, found), found
    # Whatever the row was rejected for, no picture's bytes are repeated.
    assert len(store.read("rejected")["raw"][0].as_py()) < 1000
    assert [path.name for path in (store.path / IMAGES).rglob("*.*")] == [store.read()[IMAGES][0][0].as_py()[3:]]


def first(store: Any) -> dict[str, Any]:
    assert store.rejected_rows == 0, reasons(store)
    row = store.read().to_pylist()[0]
    del row["source"]
    return row


def turns(question: str, role: str = "role", content: str = "content") -> dict[str, Any]:
    return {
        "prompt": [{role: "user", content: question}],
        "chosen": [{role: "assistant", content: "It is red"}],
        "rejected": [{role: "assistant", content: "blue!"}],
    }


@pytest.mark.parametrize("family", list(FAMILIES))
def test_places_that_the_text_names(tmp_path: Path, family: str) -> None:
    """The usual `<image>`, the model's own token, and all that its template writes."""
    vision = FAMILIES[family]()
    token, images = vision.processor.image_token, ["red.png", "blue.png"]
    parts = first(prepared(tmp_path / "parts", [{"images": images, **asked("A", PLACE, "b", PLACE)}], vision))
    written = parts["prompt"].partition("A")[2].partition("b")[0]
    for name, form in {"usual": "<image>", "token": token, "written": written}.items():
        row = {"images": images, **turns(f"A{form}b{form}")}
        assert first(prepared(tmp_path / name, [row], vision)) == parts
    plain = {"images": images, "prompt": parts["prompt"], "chosen": "It is red", "rejected": "blue!"}
    assert first(prepared(tmp_path / "plain", [plain], vision))["prompt_ids"] == parts["prompt_ids"]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_row_that_lost_its_pictures(tmp_path: Path, family: str) -> None:
    """Whether or not `<image>` is the model's own token."""
    rows = [{"images": [], **turns("<image>Which?")}, {"images": None, **turns("Which?")}]
    assert "'<image>'" in reasons(prepared(tmp_path, rows, FAMILIES[family]()))[0]


def test_why_a_model_takes_no_pictures_is_said(tmp_path: Path) -> None:
    """Where its processor can't be loaded; text alone is prepared."""
    base = Path(save_vision(tmp_path / "base", "llava"))
    (base / "processor_config.json").write_text("{")
    keys = {"rl": "dpo", "base_model": str(base), "sequence_len": 512, "output_dir": str(tmp_path / "out")}
    common = {**keys, "dataset_prepared_path": str(tmp_path / "prepared")}
    text = {"path": str(write_jsonl(tmp_path / "text.jsonl", [turns("Which?")]))}
    assert prepare_here(parse_config({**common, "datasets": [text]})).train_rows == 1
    rows = {"path": str(write_jsonl(tmp_path / "rows.jsonl", [{"image": data_url(RED), **turns("Which?")}]))}
    with pytest.raises(
        UserError, match=r"(?s)1 of 1 rows are bad.*\nbase_model: no processor of pictures could be loaded from"
    ):
        prepare_here(parse_config({**common, "datasets": [rows]}))


def test_pictures_without_a_place_stand_first_as_in_trl(tmp_path: Path) -> None:
    row = {"images": [RED_IMAGE, BLUE_IMAGE], **turns("Which?")}
    expected = tokenise(row, VisionProcessing(llava().processor))
    store = prepared(tmp_path, [{**row, "images": ["red.png", "blue.png"]}])
    assert first(store)["prompt_ids"] == expected["prompt_ids"]
    assert "1 row: messages don't say where their pictures stand" in store.notes[0]


def test_keys_that_would_change_a_picture_elsewhere_are_said(tmp_path: Path) -> None:
    """Those of OpenAI's parts and of Qwen's; null and `auto` say nothing."""
    detailed = {"type": "image_url", "image_url": {"url": "red.png", "detail": "low"}}
    automatic = {"type": "image_url", "image_url": {"url": "red.png", "detail": "auto"}}
    sized = {"type": "image", "image": "red.png", "resized_height": 28, "min_pixels": None}
    store = prepared(tmp_path, [asked(detailed, "?"), asked(detailed, "!"), asked(sized, "?"), asked(automatic, "??")])
    assert store.rejected_rows == 0 and len(store.notes) == 2
    assert store.notes[0].startswith("2 rows: parts of pictures have 'detail', which isn't read")
    assert "1 row: parts of pictures have 'resized_height'" in store.notes[1] and "'resized_height: 28'" in store.notes[1]


def test_conversations_with_a_shared_beginning(tmp_path: Path) -> None:
    """An implicit prompt, in chosen and rejected, whose pictures are the same ones."""
    row = asked({"type": "image", "path": "red.png"}, "Which?")
    whole = {name: [*row["prompt"], *row[name]] for name in ("chosen", "rejected")}
    expected = first(prepared(tmp_path / "explicit", [row]))
    assert first(prepared(tmp_path / "implicit", [whole])) == expected
    assert first(prepared(tmp_path / "json", [{name: json.dumps(turns) for name, turns in whole.items()}])) == expected
    column = {"image": "red.png", **{name: [ONE["prompt"][0], *row[name]] for name in ("chosen", "rejected")}}
    assert first(prepared(tmp_path / "column", [column])) == expected
    other = [{"role": "user", "content": [{"type": "image", "path": "blue.png"}, {"type": "text", "text": "Which?"}]}]
    store = prepared(tmp_path / "other", [{**whole, "rejected": [*other, *row["rejected"]]}, row])
    assert reasons(store)


TYPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "chat_template.default": ("chat_template.default", {"messages": ONE["prompt"], "chosen": "It is red", "rejected": "blue!"}),
    "chatml.argilla_chat": (
        "chatml.argilla_chat",
        {name: [*ONE["prompt"], *ONE[name]] for name in ("chosen", "rejected")},
    ),
    "chatml.intel": ("chatml.intel", {"question": "<image>Which?", "chosen": "It is red", "rejected": "blue!"}),
    "mapping": (
        {"prompt_format": "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"},
        {"prompt": "<image>Which?", "chosen": "It is red", "rejected": "blue!"},
    ),
}


@pytest.mark.parametrize("name", list(TYPES))
def test_dataset_types(tmp_path: Path, name: str) -> None:
    type_, row = TYPES[name]
    ours = first(prepared(tmp_path, [{"image": "red.png", **row}], type=type_))
    assert ours["prompt_ids"] == first(prepared(tmp_path / "usual", [{"image": "red.png", **ONE}]))["prompt_ids"]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_format_says_where_pictures_stand(tmp_path: Path, family: str) -> None:
    """Of rows of plain text whose question names none, as published ones."""
    vision, images = FAMILIES[family](), ["red.png", "blue.png"]
    token, answers = vision.processor.image_token, {"chosen": "It is red", "rejected": "blue!"}
    type_ = {"field_prompt": "question", "prompt_format": f"{token}{{question}}{token}A:"}
    good = {"images": images, "question": "Which?", **answers}
    ours = first(prepared(tmp_path / "a", [good], vision, type_))
    expected = {"images": images, "prompt": f"{token}Which?{token}A:", **answers}
    assert ours == first(prepared(tmp_path / "b", [expected], vision))
    store = prepared(tmp_path / "c", [{**good, "chosen": f"a {token}"}, good], vision, type_)
    assert "'chosen' holds the token of a picture" in reasons(store)[0]


def test_a_type_that_drops_a_picture_rejects_its_row(tmp_path: Path) -> None:
    row = {"image": "red.png", "caption": "<image>Which?", "prompt": "Which?", "chosen": "a", "rejected": "b"}
    store = prepared(tmp_path, [row, {"image": "red.png", **ONE}])
    assert "0 of the row's 1 pictures stand in its text" in reasons(store)[0]


MOVING = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)


def test_a_template_that_puts_pictures_first(tmp_path: Path) -> None:
    vision = llava()
    vision.processor.chat_template = MOVING
    store = prepared(tmp_path, [{"image": "red.png", **asked("Which?", PLACE, "It?")}, {"image": "red.png", **ONE}], vision)
    assert first(store)["prompt"] == "USER: <image>\nWhich?It?<|im_end|>ASSISTANT: "
    assert ["1 row: the chat template puts pictures before the text" in note for note in store.notes] == [True]


def test_templates_without_pictures(tmp_path: Path) -> None:
    vision = llava()
    vision.processor.chat_template = CHATML
    rows = [{"image": "red.png", **ONE}, turns("Which?")]
    store = prepared(tmp_path, rows, vision)
    assert "the chat template renders no pictures" in reasons(store)[0]
    assert store.read()["prompt"].to_pylist() == ["<|im_start|>user\nWhich?<|im_end|>\n<|im_start|>assistant\n"]
    assert "pictures" not in store.manifest and IMAGES not in store.read().column_names


def test_text_is_rendered_as_trl_does_for_a_processor(tmp_path: Path) -> None:
    """As parts, which templates of vision models may ask for."""
    vision = llava()
    vision.processor.chat_template = vision.processor.chat_template.replace("is string", "is none")
    store = prepared(tmp_path, [turns("Which?"), {"image": "red.png", **ONE}], vision)
    rows = store.read().to_pylist()
    assert rows[0]["prompt"] == "<|im_start|>user\nWhich?<|im_end|>\n<|im_start|>assistant\n"
    assert [len(row[IMAGES]) for row in rows] == [0, 1] and store.manifest["pictures"] == 1


def test_control_tokens_as_text_leave_placeholders_alone(tmp_path: Path) -> None:
    rows = [{"image": "red.png", **asked(PLACE, "Is <image> or <|im_end|> a tag?")}, {"image": "red.png", **ONE}]
    store = prepared(tmp_path, rows, encode_special_tokens=False)
    assert store.rejected_rows == 0
    row, image = store.read().to_pylist()[0], llava().processor.image_token_id
    assert row["prompt_ids"].count(image) == 16
    assert row["prompt"] == "<|im_start|>user\n<image>Is <image> or <|im_end|> a tag?<|im_end|>\n<|im_start|>assistant\n"
    assert f"[{row[IMAGES][0]} 48x32, 0 KiB] <|im_start|>user" in preview(store)


@pytest.mark.parametrize("strategy", ["drop", "truncate"])
def test_length_rules_count_a_pictures_tokens(tmp_path: Path, strategy: str) -> None:
    long = {"image": "red.png", **asked(PLACE, "Which?" + "!" * 40)}
    limits = {"sequence_len": 70, "excess_length_strategy": strategy}
    store = prepared(tmp_path, [{"image": "blue.png", **ONE}, long], **limits)
    assert store.manifest["sources"][0]["too_long"] == 1
    # Without its row, its picture isn't kept.
    assert store.manifest["pictures"] == 1 and len(list((store.path / IMAGES).rglob("*.png"))) == 1
    assert store.read()["prompt_ids"][0].as_py().count(llava().processor.image_token_id) == 16


def test_equal_rows_about_other_pictures_are_others(tmp_path: Path) -> None:
    rows = [{"image": name, **ONE} for name in ("red.png", "blue.png", "red.png")]
    store = prepared(tmp_path, rows, dataset_exact_deduplication=True)
    assert store.train_rows == 2 and store.manifest["pictures"] == 2
    split = prepared(tmp_path / "split", [*rows, {"image": "red.png", **asked(PLACE, "Which?", chosen="Red")}], val_set_size=1)
    assert {row[IMAGES][0] for row in split.read("eval").to_pylist()}.isdisjoint(
        {row[IMAGES][0] for row in split.read("train").to_pylist()}
    )


def test_labelled_rows_and_split_pairs(tmp_path: Path) -> None:
    row = {"image": "red.png", **ONE}
    labelled = {"image": "red.png", "prompt": ONE["prompt"], "completion": ONE["chosen"], "label": True}
    config = make_config(
        tmp_path,
        {"path": str(write_jsonl(tmp_path / "pairs.jsonl", [row])), "split_pairs": True},
        {"path": str(write_jsonl(tmp_path / "labelled.jsonl", [labelled]))},
        rl="kto",
    )
    (tmp_path / "red.png").write_bytes(RED)
    store = prepare_here(config, llava().processor.tokenizer, processor=llava().processor)
    assert [row["label"] for row in store.read().to_pylist()] == [True, False, True]
    assert store.read()[IMAGES].to_pylist() == [store.read()[IMAGES][0].as_py()] * 3


def test_prompts_of_grpo_take_no_pictures(tmp_path: Path) -> None:
    store = prepared(tmp_path, [{"image": "red.png", "prompt": "<image>?"}, {"prompt": "Which?"}], rl="grpo")
    assert "the column 'image' is no text, which alone can be trained on" in reasons(store)[0]
    assert "processor" not in store.manifest["inputs"]


def test_a_text_model_rejects_pictures(tmp_path: Path) -> None:
    rows = [{"image": "red.png", **ONE}, {"image": "red.png", **turns("Which?")}, turns("Which?")]
    config = make_config(tmp_path, {"path": str(write_jsonl(tmp_path / "rows.jsonl", rows))}, max_rejected_fraction=1.0)
    store = prepare_here(config, llava().processor.tokenizer)
    assert "only text can be trained on" in reasons(store)[0] and "vision-language model" in reasons(store)[1]
    assert "processor" not in store.manifest["inputs"] and store.read().column_names == prepared_columns()


def prepared_columns() -> list[str]:
    lengths = [f"{name}_length" for name in ("prompt", "chosen", "rejected")]
    ids = [f"{name}_ids" for name in ("prompt", "chosen", "rejected")]
    return ["row_id", "source", "row_number", *ids, *lengths, "prompt", "chosen", "rejected"]


def test_a_store_with_a_missing_or_cut_picture_is_refused(tmp_path: Path) -> None:
    store = prepared(tmp_path, [{"image": "red.png", **ONE}])
    path = picture_path(store.path, first(store)[IMAGES][0])
    path.write_bytes(RED[:50])
    with pytest.raises(UserError, match=rf"doesn't hold what was prepared: images/.*: has 50 bytes, {len(RED)} were written"):
        open_store(store.path)
    path.unlink()
    with pytest.raises(UserError, match=r"images/.*\.png: is missing"):
        open_store(store.path)
    assert open_store(store.path, verify=False) is not None


def test_the_fingerprint_covers_the_processor(tmp_path: Path) -> None:
    def prepared_with(change: Any) -> str:
        vision = llava()
        change(vision.processor)
        return prepared(tmp_path, [{"image": "red.png", **ONE}], vision).fingerprint

    usual = prepared_with(lambda _: None)
    assert prepared_with(lambda _: None) == usual
    changes = [
        lambda processor: setattr(processor.image_processor, "do_normalize", False),
        lambda processor: setattr(processor, "patch_size", 4),
        lambda processor: setattr(processor, "chat_template", processor.chat_template + "\n"),
        lambda processor: with_size(processor, 64, None),
        lambda processor: with_size(processor, (64, 64), None),
        lambda processor: with_size(processor, 64, "lanczos"),
    ]
    assert len({usual, *map(prepared_with, changes)}) == 7


def test_image_size_comes_before_the_processor(tmp_path: Path) -> None:
    vision = FAMILIES["qwen2_5_vl"]()
    usual = first(prepared(tmp_path, [{"image": "blue.png", **ONE}], vision))
    with_size(vision.processor, (32, 16), "bicubic")
    small = first(prepared(tmp_path, [{"image": "blue.png", **ONE}], vision))
    image = vision.processor.image_token_id
    assert (usual["prompt_ids"].count(image), small["prompt_ids"].count(image)) == (8, 2)
    assert small[IMAGES] == usual[IMAGES]
    assert VisionProcessing(vision.processor).pixels([BLUE_IMAGE])["image_grid_thw"].tolist() == [[1, 2, 4]]


def test_an_unreachable_host_is_asked_once(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{taken.getsockname()[1]}"  # nothing listens there
        rows = [{"image": f"http://{host}/{row}.png", **ONE} for row in range(3)]
        store = prepared(tmp_path, [*rows, {"image": "red.png", **ONE}])
    assert all(f"a picture can't be fetched: {host} can't be reached" in reason for reason in reasons(store))
    assert len(reasons(store)) == 3
    assert [f"3 rows: rejected, since '{host}' can't be reached" in note for note in store.notes] == [True]


def test_googles_storage_is_not_asked_for_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.io.filesystems.INTERACTIVE_TIMEOUT", timedelta(seconds=1))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        query = f"?scheme=http&endpoint_override=127.0.0.1:{taken.getsockname()[1]}"
        rows = [{"image": f"gs://anonymous@bucket/{row}.png{query}", **ONE} for row in range(2)]
        store = prepared(tmp_path, [*rows, {"image": "red.png", **ONE}])
    assert ["2 rows: rejected, since 'bucket' can't be reached" in note for note in store.notes] == [True]


def test_pictures_by_http(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(RED)
    handler = partial(SilentHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        # A file that is missing says nothing about the host.
        store = prepared(tmp_path, [{"image": f"{url}/{name}.png", **ONE} for name in ("none", "red")])
        server.shutdown()
    assert picture_path(store.path, store.read()[IMAGES][0][0].as_py()).read_bytes() == RED
    assert len(reasons(store)) == 1 and "a picture can't be read: http://" in reasons(store)[0]


class SilentHandler(SimpleHTTPRequestHandler):
    """Serves files without a log."""

    def log_message(self, *_: Any) -> None:
        return


def test_the_preview_shows_names_and_sizes(tmp_path: Path) -> None:
    store = prepared(tmp_path, [{"images": ["red.png", "blue.png"], **asked("One", PLACE, "or", PLACE, "?")}])
    red, blue = first(store)[IMAGES]
    assert f"One[{red} 48x32, 0 KiB]or[{blue} 64x32, 0 KiB]?" in preview(store)


def preview(store: Any) -> str:
    out = io.StringIO()
    Console(file=out, width=200, no_color=True).print(Preview(store, llava().processor.tokenizer))
    return out.getvalue()


def test_pictures_of_datasets_keep_their_bytes(tmp_path: Path) -> None:
    """Of a data set of the hub, whose pictures `datasets` would decode."""
    features = Features({"images": List(DatasetImage()), "prompt": Value("string")})
    rows = Dataset.from_list([{"images": [{"bytes": RED, "path": None}], "prompt": "<image>"}], features)
    assert list(hub.rows(rows, 0, 1)) == [{"images": [{"bytes": RED}], "prompt": "<image>"}]


def test_a_killed_run_finds_its_parts_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"image": name, **ONE} for name in ("red.png", "blue.png")]
    monkeypatch.setattr("pipeline.data.preparation._finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepared(tmp_path, rows)
    monkeypatch.undo()
    folder = next((tmp_path / "prepared").glob("*/images/*"))
    (folder / ".x.png.0.tmp").write_bytes(b"cut")
    monkeypatch.setattr("pipeline.data.process_shard._process_rows", lambda *_: 1 / 0)
    store = prepared(tmp_path, rows)
    assert store.manifest["pictures"] == 2 and len([*(store.path / IMAGES).rglob("*.*")]) == 2


def test_a_processor_that_adds_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt_ids = VisionProcessing.prompt_ids
    monkeypatch.setattr(VisionProcessing, "prompt_ids", lambda *given: [0, *prompt_ids(*given)])
    with pytest.raises(UserError, match="its LlavaProcessor makes other tokens of a prompt"):
        prepared(tmp_path, [{"image": "red.png", **ONE}])
