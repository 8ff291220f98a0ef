"""The builder's contract with a processor: raw rows with pictures, every method, full and LoRA."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, List
from datasets import Image as DatasetImage
from peft import PeftModel
from PIL import Image, ImageChops
from transformers import AutoModelForImageTextToText, AutoProcessor

from strategies import HFRLTrainerBuilder, TrainDatasetMeta, train
from strategies.batch.kto_sampler import MismatchedRows
from strategies.dataset_rows import as_dataset
from strategies.models.saving import write_model_card
from strategies.vision.images import pictures_of
from strategies.vision.modules import outside_tower
from strategies.vision.processing import VisionProcessing
from strategies.vision.rows import tokenise
from tests.laws.runs import CONFIG, LORA, losses, same_history
from tests.tiny import pairs
from tests.tiny_vision import FAMILIES, labelled_pictures, llava, picture, picture_pairs, save_vision, vision_trained

METHODS = ("dpo", "ipo", "simpo", "orpo", "kto")


@pytest.mark.parametrize("adapter", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("rl", METHODS)
def test_every_method_trains(tmp_path: Path, rl: str, adapter: dict[str, Any]) -> None:
    trainer = vision_trained(tmp_path, llava(), rl=rl, max_steps=6, micro_batch_size=4, learning_rate=3e-3, **adapter)
    history = losses(trainer)
    assert len(history) == 6 and min(history[3:]) < history[0]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_prompts_pictures_are_encoded_once(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vision = FAMILIES[family]()
    inner, pictures = vision.model.base_model, []
    encode = type(inner).get_image_features

    def counted(self: Any, pixel_values: Any, *args: Any, **kwargs: Any) -> Any:
        pictures.append(len(args[0] if family == "qwen2_5_vl" else pixel_values))
        return encode(self, pixel_values, *args, **kwargs)

    monkeypatch.setattr(type(inner), "get_image_features", counted)
    vision_trained(tmp_path, vision, rows=picture_pairs(4), max_steps=1, micro_batch_size=4, sample_packing=False)
    # Policy and reference, in the step and in the check before it; Idefics3 has all pictures of a forward in one row.
    assert pictures == [1 if family == "idefics3" else 4] * 4


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_rows_without_pictures_train_among_others(tmp_path: Path, family: str, packing: bool) -> None:
    """Alone in a forward they get a blank picture, which changes nothing."""
    mixed = [row for pair in zip(picture_pairs(4), text_rows(4), strict=True) for row in pair]

    def run(name: str, size: int, tokens: int) -> Any:
        limits = {"sample_packing": True, "tokens_per_forward": tokens} if packing else {"sample_packing": False}
        batch = {"micro_batch_size": size, "gradient_accumulation_steps": 8 // size}
        return vision_trained(tmp_path / name, FAMILIES[family](), rows=mixed, max_steps=4, **batch, **limits)

    same_history(run("alone", 1, 450), run("together", 8, 4000))


def text_rows(number: int) -> list[dict[str, Any]]:
    return [
        {
            "images": [],
            "prompt": [{"role": "user", "content": [{"type": "text", "text": pair["prompt"]}]}],
            "chosen": [{"role": "assistant", "content": pair["chosen"]}],
            "rejected": [{"role": "assistant", "content": pair["rejected"]}],
        }
        for pair in pairs(number)
    ]


def test_text_alone_trains_the_text_model(tmp_path: Path) -> None:
    vision = llava()
    builder = HFRLTrainerBuilder(
        {**CONFIG, "output_dir": str(tmp_path), "max_steps": 2}, vision.model, vision.processor.tokenizer
    )
    trainer = builder.build()
    trainer.train_dataset = pairs(8)
    trainer.train()
    assert len(losses(trainer)) == 2
    trained = {name.split(".")[1] for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert trained == {"language_model", "weight"}


@pytest.mark.parametrize("shape", ["image", "images", "plain", "dataset"])
def test_shapes_of_rows(tmp_path: Path, shape: str) -> None:
    rows: Any = picture_pairs(8)
    usual = vision_trained(tmp_path / "usual", llava(), rows=rows, max_steps=3)
    if shape == "image":
        rows = [{"image": row.pop("images")[0], **row} for row in rows]
    elif shape == "plain":
        rows = [_plain(row) for row in rows]
    elif shape == "dataset":
        rows = Dataset.from_list(rows)
    same_history(usual, vision_trained(tmp_path / shape, llava(), rows=rows, max_steps=3))


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """The row as text: what the template makes of it."""
    text = row["prompt"][0]["content"][1]["text"]
    prompt = f"<|im_start|>user\n<image>{text}<|im_end|>\n<|im_start|>assistant\n"
    answers = {name: f"{row[name][0]['content']}<|im_end|>\n" for name in ("chosen", "rejected")}
    return {"images": row["images"], "prompt": prompt, **answers}


@pytest.mark.parametrize("family", ["llava", "idefics3"])
def test_a_saved_model_loads_with_its_processor(tmp_path: Path, family: str) -> None:
    keys = {**CONFIG, "base_model": save_vision(tmp_path / "base", family), "output_dir": str(tmp_path), "max_steps": 2}
    model, _, _ = train({**keys, "sequence_len": 512}, TrainDatasetMeta(picture_pairs(8)))
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    row = picture_pairs(1)[0]
    text = processor.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[row["images"]], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model.eval()(**inputs).logits)
    assert not torch.equal(loaded.lm_head.weight, FAMILIES[family]().model.lm_head.weight)


@pytest.mark.parametrize(("size", "words"), [(16, "padded to 16 x 16"), ([32, 16], "stretched to 32 x 16")])
def test_the_saved_processor_has_the_size_and_the_card_says_it(tmp_path: Path, size: Any, words: str) -> None:
    vision = llava()
    trainer = vision_trained(tmp_path, vision, rows=picture_pairs(4), max_steps=1, image_size=size)
    vision.processor.save_pretrained(tmp_path / "processor")
    image, saved = picture("red", "circle"), AutoProcessor.from_pretrained(tmp_path / "processor")
    pixels = VisionProcessing(vision.processor).pixels([image])["pixel_values"]
    assert torch.equal(VisionProcessing(saved).pixels([image])["pixel_values"], pixels)
    write_model_card(trainer, tmp_path)
    assert f"| Pictures | {words} pixels (bilinear) before the processor" in (tmp_path / "README.md").read_text()
    write_model_card(vision_trained(tmp_path, vision, rows=picture_pairs(4), max_steps=1), tmp_path)
    assert "Pictures" not in (tmp_path / "README.md").read_text()


def test_an_adapter_leaves_the_tower_alone_unless_it_is_named(tmp_path: Path) -> None:
    def adapted(**keys: Any) -> set[str]:
        vision = llava()
        trainer = vision_trained(tmp_path, vision, max_steps=1, **LORA, **keys)
        assert isinstance(trainer.model, PeftModel)
        return {name.split(".")[3] for name, _ in trainer.model.named_parameters() if "lora_A" in name}

    assert adapted() == {"language_model"}
    assert adapted(lora_target_linear=True) == {"language_model"}
    assert adapted(lora_target_modules=["q_proj", "v_proj"]) == {"language_model"}
    assert adapted(lora_target_modules=r".*vision_tower.*(q|v)_proj") == {"vision_tower"}


def test_a_target_of_the_tower_alone_is_refused() -> None:
    """Rather than left out silently."""
    model = llava().model
    for targets in (["q_proj", "fc1"], r".*\.fc1"):
        with pytest.raises(ValueError, match=r"lora_target_modules: only modules that encode pictures match '.*fc1', such as"):
            outside_tower(model, targets)
    assert outside_tower(model, ["vision_tower.vision_model.encoder.layers.0.mlp.fc1"]) is None
    assert outside_tower(model, ["q_proj", "nothing"]) == outside_tower(model, "all-linear")


@pytest.mark.parametrize("family", list(FAMILIES))
def test_places_that_a_model_reads_as_text_are_refused(family: str) -> None:
    """LLaVA's `<image>`, in rows for another model; so are keys of parts that would do nothing."""
    processing, pair = VisionProcessing(FAMILIES[family]().processor), picture_pairs(1)[0]
    if processing.processor.image_token != "<image>":
        for images in (pair["images"], None):
            with pytest.raises(ValueError, match="has '<image>' in its text, .* give content as parts"):
                tokenise({**pair, "images": images, "prompt": [{"role": "user", "content": "<image>Which?"}]}, processing)
    with pytest.raises(ValueError, match="a part of type image has 'max_pixels', which isn't read"):
        tokenise({**pair, **_user({"type": "image", "max_pixels": 9, "min_pixels": None})}, processing)
    with pytest.raises(
        ValueError, match="a part of type image has a picture of its own in 'url'; give all pictures in the col"
    ):
        tokenise({**pair, **_user({"type": "image", "url": "other.png"})}, processing)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": []}, r"train_dataset: row 0: .*number of image.*"),
        ({"images": [b"no picture"]}, "train_dataset: row 0: a picture can't be read"),
        ({"images": ["nowhere.png"]}, r"train_dataset: row 0: a picture can't be read: .*nowhere\.png"),
    ],
)
def test_rows_that_cannot_be_trained_on(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    rows = [{**picture_pairs(1)[0], **change}]
    with pytest.raises(ValueError, match=f"(?i){words}"):
        vision_trained(tmp_path, llava(), rows=rows)


def _gif() -> bytes:
    buffer = io.BytesIO()
    frames = [picture(color, "square") for color in ("red", "blue")]
    frames[0].save(buffer, format="GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def _user(*parts: Any, **more: Any) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": [*parts, {"type": "text", "text": "Which?"}], **more}]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": [Image.open(io.BytesIO(_gif()))]}, "row 0: a picture has 2 frames"),
        ({"images": [_gif()]}, "row 0: a picture has 2 frames"),
        ({"images": [Image.new("I;16", (8, 8))]}, "row 0: a picture has more than 8 bits a channel"),
        ({"images": [3]}, "row 0: expected a picture, its bytes or a path, got int"),
        ({"images": "a.png"}, "images: expected a list of pictures, got str"),
        ({"image": picture("red", "circle")}, "pictures in image and in images"),
        ({"images": [], **_user({"type": "text", "text": "?", "image": "a.png"})}, "a part of type 'image'"),
        ({"images": [], **_user({"type": "image_url", "image_url": "a.png"})}, "a part of type 'image_url'"),
        ({"images": [], **_user(images=["a.png"])}, "a part of type 'images'"),
        ({"images": [], **_user({"type": "image", "image": "a.png"})}, "a part of type 'image'"),
        ({"video": "a.mp4"}, "the column 'video'"),
        ({"prompt": None}, "row 0: no prompt"),
    ],
)
def test_no_picture_is_lost_or_taken_for_another(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        vision_trained(tmp_path, llava(), rows=[{**picture_pairs(1)[0], **change}])


def test_pictures_are_those_that_were_given(tmp_path: Path) -> None:
    """Not those of the file that they were opened from, and not encoded again with losses; upright, by any way."""
    drawn = picture("red", "circle")
    drawn.save(tmp_path / "a.jpg", quality=30)
    opened = Image.open(tmp_path / "a.jpg")
    opened.paste((0, 0, 255), (0, 0, 8, 8))
    turned = Image.Exif()
    turned[0x0112] = 6
    drawn.save(tmp_path / "turned.png", exif=turned)
    path, upright = tmp_path / "turned.png", drawn.transpose(Image.Transpose.ROTATE_270)
    values = [opened, Image.open(path), path, str(path), path.read_bytes()]
    rows = as_dataset([{"images": [value]} for value in values], "rows")
    for row, expected in zip(rows, [opened, *[upright] * 4], strict=True):
        (image,) = pictures_of(row)
        assert ImageChops.difference(image, expected.convert("RGB")).getbbox() is None


def test_plain_answers_get_no_end_token_and_that_is_said(tmp_path: Path) -> None:
    rows = [{"images": [], "prompt": "a", "chosen": "b", "rejected": "cd"}]
    trainer = vision_trained(tmp_path, llava(), rows=rows, max_steps=1)
    assert trainer.train_dataset[0]["rejected_ids"] == trainer.processing_class.tokenizer("cd")["input_ids"]
    assert any("no end token" in note for note in trainer.notes)


def test_pictures_are_never_cut(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sequence_len: row 0 of train_dataset has .* would cut tokens of its pictures"):
        vision_trained(tmp_path, llava(), rows=picture_pairs(2), sequence_len=20)


def test_pictures_without_a_processor_are_refused(tmp_path: Path) -> None:
    vision = llava()
    builder = HFRLTrainerBuilder({**CONFIG, "output_dir": str(tmp_path)}, vision.model, vision.processor.tokenizer)
    builder.train_dataset = picture_pairs(2)
    with pytest.raises(ValueError, match="processor"):
        builder.build()


def test_labelled_rows_keep_their_pictures(tmp_path: Path) -> None:
    rows = labelled_pictures(5)
    trainer = vision_trained(tmp_path, llava(), rows=rows, rl="kto", max_steps=1, micro_batch_size=2)
    assert trainer.train_dataset.column_names == ["prompt_ids", "completion_ids", "label", "images"]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_an_evaluation_of_labelled_rows_is_that_of_each_row(tmp_path: Path, family: str) -> None:
    """The last forward is not full."""
    rows, vision = labelled_pictures(5), FAMILIES[family]()
    trainer = vision_trained(tmp_path, vision, rows=rows, rl="kto", max_steps=1, micro_batch_size=2, eval_batch_size=2)
    whole = trainer.evaluate(rows)
    trainer.args.per_device_eval_batch_size = 5
    assert trainer.evaluate(rows)["eval_logps/chosen"] == pytest.approx(whole["eval_logps/chosen"], rel=1e-5)


@pytest.mark.parametrize("first", [{}, {"images": []}])
def test_pictures_that_the_first_row_lacks_are_kept(tmp_path: Path, first: dict[str, Any]) -> None:
    text = {key: value for key, value in text_rows(1)[0].items() if key != "images"}
    trainer = vision_trained(tmp_path, llava(), rows=[{**text, **first}, *picture_pairs(3)], max_steps=1)
    assert [len(row["images"] or ()) for row in trainer.train_dataset] == [0, 1, 1, 1]


@pytest.mark.parametrize("family", ["llava", "idefics3"])
def test_a_prompt_that_ends_in_a_picture(tmp_path: Path, family: str) -> None:
    row = {"images": [picture("red", "circle")], "prompt": "Which? <image>", "chosen": "red", "rejected": "blue"}
    vision_trained(tmp_path, FAMILIES[family](), rows=[row], sample_packing=False, max_steps=1)
    if family == "idefics3":  # a token follows its pictures
        vision_trained(tmp_path, FAMILIES[family](), rows=[row], max_steps=1)
        return
    with pytest.raises(ValueError, match="sample_packing: the prompt of row 0 of train_dataset ends in a picture"):
        vision_trained(tmp_path, FAMILIES[family](), rows=[row], max_steps=1)


def test_the_same_question_about_other_pictures_is_another_prompt(tmp_path: Path) -> None:
    pairs_of_one = [{**labelled_pictures(1)[0], "images": [picture(color, "circle")]} for color in ("red", "blue", "red")]
    trainer = vision_trained(tmp_path, llava(), rows=pairs_of_one, rl="kto", max_steps=1, micro_batch_size=3)
    assert trainer._prompts_of(MismatchedRows(trainer.train_dataset)).tolist() == [0, 1, 0]


def test_tools_and_the_templates_options_are_rendered(tmp_path: Path) -> None:
    vision = llava()
    vision.processor.chat_template = "{{ tools | length if tools else 0 }}{{ mood }}" + vision.processor.chat_template
    rows = [{**row, "tools": [{"name": "f"}], "chat_template_kwargs": {"mood": "calm"}} for row in picture_pairs(2)]
    trainer = vision_trained(tmp_path, vision, rows=rows, max_steps=1)
    assert vision.processor.tokenizer.decode(trainer.train_dataset[0]["prompt_ids"]).startswith("1calm")


def test_evaluation_sets_by_name(tmp_path: Path) -> None:
    keys = {**CONFIG, "base_model": save_vision(tmp_path / "base", "llava"), "output_dir": str(tmp_path), "max_steps": 1}
    evaluated = {"a": picture_pairs(2), "b": picture_pairs(3)}
    _, _, trainer = train({**keys, "sequence_len": 512, "eval_steps": 1}, TrainDatasetMeta(picture_pairs(4), evaluated))
    assert {"eval_a_loss", "eval_b_loss"} <= {name for entry in trainer.state.log_history for name in entry}


@pytest.mark.parametrize("rl", ["dpo", "kto"])
def test_prepared_rows_without_their_pictures_are_refused(tmp_path: Path, rl: str) -> None:
    trainer = vision_trained(tmp_path, llava(), rl=rl, max_steps=1, micro_batch_size=2)
    rows = trainer.train_dataset.remove_columns("images")
    trainer.train_dataset = rows
    with pytest.raises(ValueError, match="row 0 has tokens of pictures and no pictures"):
        trainer.get_train_dataloader()


def test_transparent_pictures_stand_on_white(tmp_path: Path) -> None:
    """As a processor has them, and so TRL and those who use the model."""
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (8, 8, 24, 24))
    (ours,) = pictures_of({"images": [image]})
    processor = llava().processor.image_processor
    given, converted = (processor([one], return_tensors="pt")["pixel_values"] for one in (image, ours))
    assert torch.equal(given, converted) and ours.getpixel((0, 0)) == (255, 255, 255)


def test_pictures_with_grpo_are_refused(tmp_path: Path) -> None:
    vision = llava()
    keys = {key: value for key, value in CONFIG.items() if key != "sequence_len"}
    trl = {"reward_funcs": ["tests.reward_functions.length"], "num_generations": 2, "max_completion_length": 4}
    keys |= {"output_dir": str(tmp_path), "rl": "grpo", "trl": trl, "micro_batch_size": 2}
    builder = HFRLTrainerBuilder(keys, vision.model, vision.processor.tokenizer, vision.processor)
    builder.train_dataset = [{"images": row["images"], "prompt": row["prompt"]} for row in picture_pairs(2)]
    with pytest.raises(ValueError, match="the column 'images' is no text"):
        builder.build()


@pytest.mark.parametrize("kind", ["columns", "torch"])
def test_pictures_of_jpeg_files_stay_as_they_are(tmp_path: Path, kind: str) -> None:
    """Neither a column of `datasets.Image` nor a data set of torch is encoded as JPEG once more."""
    rows = picture_pairs(2)
    for row in rows:
        buffer = io.BytesIO()
        row["images"][0].resize((50, 37)).save(buffer, format="JPEG", quality=30)
        row["images"] = [{"bytes": buffer.getvalue(), "path": None}]
    expected = [pictures_of(row)[0].tobytes() for row in rows]
    raw: Any = Dataset.from_list(rows).cast_column("images", List(DatasetImage()))
    vision = llava()
    builder = HFRLTrainerBuilder(
        {**CONFIG, "output_dir": str(tmp_path)}, vision.model, vision.processor.tokenizer, vision.processor
    )
    builder.train_dataset = raw if kind == "columns" else OfTorch(raw)
    trained_on = builder.build().train_dataset
    assert [pictures_of(row)[0].tobytes() for row in trained_on] == expected


class OfTorch(torch.utils.data.Dataset[Any]):
    """A map-style data set that isn't one of `datasets`."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        if index >= len(self.rows):
            raise IndexError(index)
        return self.rows[index]
