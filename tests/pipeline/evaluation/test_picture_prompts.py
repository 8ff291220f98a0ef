"""`prefray generate` about pictures: answers are those of transformers' own processor and `generate`."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from pipeline import generate
from pipeline.cli import app
from pipeline.errors import UserError
from pipeline.evaluation.chat import chat
from pipeline.evaluation.generate_on_ray import SamplingOptions
from pipeline.merging.merge import merge
from pipeline.ui.display import SilentDisplay
from strategies.vision.sizes import with_size
from tests.tiny_vision import FAMILIES, picture

NEW = 6
OPTIONS = SamplingOptions(max_new_tokens=NEW, temperature=0)
ASKED = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}]
runner = CliRunner()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models of two families, and two pictures."""
    root = tmp_path_factory.mktemp("models")
    for family in ("llava", "idefics3"):
        vision = FAMILIES[family]()
        for weight in vision.model.parameters():
            weight.data.mul_(3 if weight.ndim > 1 else 1)  # a fresh model hardly looks at its input
        vision.model.save_pretrained(root / family)
        vision.processor.save_pretrained(root / family)
    for color in ("red", "blue"):
        picture(color, "circle" if color == "red" else "square").save(root / f"{color}.png")
    (root / "empty.png").touch()
    return root


def answer(base: Path, messages: list[Any], *images: Any) -> str:
    """The greedy answer, by transformers alone."""
    processor, model = AutoProcessor.from_pretrained(base), AutoModelForImageTextToText.from_pretrained(base)
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=list(images) or None, return_tensors="pt")
    options = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": [processor.image_token_id]}
    ids = torch.as_tensor(model.generate(**inputs, **options))
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("family", ["llava", "idefics3"])
def test_answers_are_those_of_transformers(models: Path, family: str) -> None:
    """Whatever the shape of the row; texts and several pictures stand among them."""
    base, red, blue = models / family, picture("red", "circle"), picture("blue", "square")
    data = base64.b64encode((models / "red.png").read_bytes()).decode()
    of_red: list[Any] = [
        {"image": "red.png", "prompt": ASKED},
        {"images": ["red.png"], "messages": [{"role": "user", "content": "<image>Which?"}]},
        {"image": f"file://{models}/red.png", "prompt": "Which?", "chosen": "It is red"},
        [{"role": "user", "content": [{"type": "image", "path": "red.png"}, {"type": "text", "text": "Which?"}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": f"DATA:image/png;base64,{data}"}}, "Which?"]}],
    ]
    two = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "or"}, {"type": "image"}]}]
    rows = [*of_red, {"image": "blue.png", "prompt": ASKED}, {"images": ["blue.png", "red.png"], "prompt": two}, "Which?"]
    (models / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = runner.invoke(
        app, ["generate", str(base), "--file", str(models / "p.jsonl"), "--max-new-tokens", str(NEW), "--json", "-"]
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    answers = [row["policy"] for row in found["answers"]]
    expected = [answer(base, ASKED, red)] * len(of_red) + [answer(base, ASKED, blue), answer(base, two, blue, red)]
    assert answers == [*expected, answer(base, [{"role": "user", "content": "Which?"}])]
    assert len({*answers[len(of_red) - 1 :]}) == 4 or family == "idefics3"  # a picture matters
    shown = [row["prompt"] for row in found["answers"]]
    assert shown[0] == "[red.png]Which?" and shown[4] == "[picture]Which?" and shown[6] == "[blue.png]or[red.png]"
    opened = generate(str(base), [{"image": red, "prompt": ASKED}], options=OPTIONS)
    assert opened.rows[0]["policy"] == answers[0]


def test_a_picture_of_the_command_line(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    command = ["generate", "llava", "--image", "red.png", "--max-new-tokens", str(NEW), "--json", "-"]
    rows = [json.loads(runner.invoke(app, [*command, *ask]).stdout)["answers"][0] for ask in (["Which?"], ["<image>Which?"])]
    piped = json.loads(runner.invoke(app, command, input="Which?\n").stdout)["answers"][0]
    assert rows[0] == rows[1] == piped
    assert rows[0]["policy"] == answer(models / "llava", ASKED, picture("red", "circle"))
    plain = generate("llava", [{"image": "red.png", "prompt": "<image>Which?"}], options=OPTIONS, raw=True).rows[0]
    assert plain["policy"] != rows[0]["policy"]


def test_an_adapters_folder_has_the_settings_of_its_pictures(models: Path, tmp_path: Path) -> None:
    base, asked = str(models / "llava"), [{"image": str(models / "red.png"), "prompt": "Which?"}]
    model = AutoModelForImageTextToText.from_pretrained(base)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)  # which changes nothing yet
    with_size(AutoProcessor.from_pretrained(base), 16, None).save_pretrained(tmp_path)
    (row,) = generate(str(tmp_path), asked, options=OPTIONS).rows
    (small,) = generate(base, asked, options=OPTIONS, overrides=["image_size=16"]).rows
    assert row["policy"] == row["reference"] == small["policy"] != generate(base, asked, options=OPTIONS).rows[0]["policy"]
    for policy, reference, key in ((base, str(tmp_path), "--reference"), (str(tmp_path), base, "reference_model")):
        with pytest.raises(UserError, match=f"^{key}: '{reference}' makes other pixels of a picture .image_size: "):
            generate(policy, asked, reference, OPTIONS)
    assert generate(base, ["Which?"], str(tmp_path), OPTIONS).rows
    merged = merge(tmp_path, tmp_path / "merged", verify=False).path
    assert generate(str(merged), asked, options=OPTIONS).rows[0]["policy"] == row["policy"]
    assert "| Pictures | padded to 16 x 16 pixels (bilinear) before" in (tmp_path / "merged" / "README.md").read_text()


def test_a_picture_in_a_column_that_is_not_read_is_said(models: Path, tiny_base: str) -> None:
    unread: list[Any] = ["red.png", {"bytes": None, "path": "a/b.JPG"}, ["data:image/png;base64,AAAA", "blue.webp"]]
    read = {"prompt": "Which?", "answer": "red", "source": "shapes", "chosen": "a.png", "score": 3, "ids": [1], "image": None}
    for base in (str(models / "llava"), tiny_base):
        notes = generate(base, [read, *({"prompt": "Which?", "photo": value} for value in unread)], options=OPTIONS).notes
        assert len(notes) == 1, notes
        assert notes[0].startswith("3 rows: the column 'photo' names or holds a picture, and isn't read (prompts row 2: ")


@pytest.mark.parametrize("raw", [False, True])
def test_a_chat_goes_on_after_a_prompt_that_has_no_answer(
    models: Path, raw: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("<image> or <image>?\n<image>Which?\n\n"))
    base, images = str(models / "llava"), [str(models / "red.png")]
    chat(base, None, OPTIONS, raw, (), SilentDisplay(), False, images)
    printed = " ".join(capsys.readouterr().out.split())
    refused = "0 of the row's 1 pictures stand in its text" if raw else "has 2 placeholders of pictures in its text"
    assert refused in printed
    rows = generate(base, [{"images": images, "prompt": "<image>Which?"}], options=OPTIONS, raw=raw).rows
    assert rows[0]["policy"].split()[0] in printed.partition(refused)[2]


BAD: list[tuple[Any, str]] = [
    ({"image": "none.png", "prompt": "Which?"}, "line 2: a picture can't be read: none.png: "),
    (
        {"image": "bad.jsonl", "prompt": "Which?"},
        "line 2: a picture can't be read: it is of no format that Pillow knows (bad.jsonl)",
    ),
    ({"images": ["red.png", "empty.png"], "prompt": "Which?"}, "line 2: a picture is empty: empty.png"),
    ({"image": "https://[::1/red.png", "prompt": "Which?"}, "line 2: a picture can't be read: https://"),
    ({"images": ["red.png"], "prompt": "<image> or <image>?"}, "line 2: 'prompt' has 2 placeholders of pictures in its text"),
    (
        {"prompt": ASKED},
        "line 2: 'prompt' has 1 parts of type image without a picture of their own, and the row has 0 pictures",
    ),
    ("Is <image> a tag?", "line 2: 'prompt' holds the token of a picture, '<image>', 1 times beside 0 pictures"),
    ([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}], "line 2: it has 'video' in a message"),
    ({"video": "a.mp4", "prompt": "Which?"}, "line 2: has 'video', and prompts are text, or text with pictures"),
]


@pytest.mark.parametrize(("row", "message"), BAD, ids=[message[8:40] for _, message in BAD])
def test_a_bad_picture_is_said_with_its_line(models: Path, row: Any, message: str) -> None:
    (models / "bad.jsonl").write_text(f'"Which?"\n{json.dumps(row)}\n')
    done = runner.invoke(app, ["generate", str(models / "llava"), "--file", str(models / "bad.jsonl")])
    assert done.exit_code == 2 and message in " ".join(done.stderr.split()), done.output


def test_pictures_that_are_too_large_and_options_that_contradict(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.sources.pictures.MAX_BYTES", 100)
    red = str(models / "red.png")
    for arguments, message in (
        (["Which?", "--image", red], "prompt 1: a picture has more than 0 MiB"),
        (["--file", str(models / "p.jsonl"), "--image", red], "--image: is for prompts as arguments or input"),
    ):
        done = runner.invoke(app, ["generate", str(models / "llava"), *arguments])
        assert done.exit_code == 2 and message in " ".join(done.stderr.split()), done.output


def test_a_text_model_takes_no_pictures(tiny_base: str, models: Path) -> None:
    for row in ({"image": str(models / "red.png"), "prompt": "Which?"}, {"messages": ASKED}):
        (models / "text.jsonl").write_text(json.dumps(row))
        done = runner.invoke(app, ["generate", tiny_base, "--file", str(models / "text.jsonl")])
        stderr = " ".join(done.stderr.split())
        assert done.exit_code == 2 and "text.jsonl, line 1: it has pictures or other media, and base_model: " in stderr, stderr
        assert "takes no pictures; give a vision-language model" in stderr
