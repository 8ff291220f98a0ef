"""The processor of a config, and the keys of pictures."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaProcessor

from pipeline.data.fingerprint import processor_identity
from strategies import HFRLTrainerBuilder
from strategies.config import as_config
from strategies.models.processor import find_processor, load_processor, processor_or_reason
from strategies.models.tokenizer import load_tokenizer
from strategies.vision.checks import image_settings
from strategies.vision.processing import VisionProcessing
from strategies.vision.sizes import with_size
from tests.laws.runs import CONFIG, LORA
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer
from tests.tiny_vision import FAMILIES, llava, picture, picture_pairs, save_vision, vision_trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_vision(tmp_path_factory.mktemp("llava"), "llava")


def found(base: str, **keys: Any) -> Any:
    cfg = as_config({**CONFIG, "base_model": base, **keys})
    return find_processor(cfg, load_tokenizer(cfg))


def test_a_processor_is_found_from_the_models_config(folder: str, tmp_path: Path) -> None:
    processor = found(folder)
    assert isinstance(processor, LlavaProcessor) and processor.chat_template == llava().processor.chat_template
    assert found(folder, chat_template="chatml").chat_template == load_tokenizer(chatml(folder)).chat_template
    assert found(save_tiny(tmp_path / "text")) is None
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in Path(folder).glob("*"):
        if "processor" not in file.name:
            (bare / file.name).symlink_to(file)
    assert found(str(bare)) is None


def chatml(folder: str) -> Any:
    return as_config({**CONFIG, "base_model": folder, "chat_template": "chatml"})


def test_keys_of_the_processor(folder: str) -> None:
    processor = found(folder, processor_type="LlavaProcessor", processor_kwargs={"patch_size": 4}, image_size=[16, 8])
    assert processor.patch_size == 4
    assert VisionProcessing(processor)._sized([picture("red", "circle")])[0].size == (16, 8)


@pytest.mark.parametrize("family", ["idefics3", "llava"])
def test_settings_of_all_parts_of_a_processor(tmp_path: Path, family: str) -> None:
    """Those of its pictures, kept or only read by a call; and arguments of loading."""
    settings = {"do_resize": False, "image_mean": [0.5] * 3, "do_convert_rgb": True, "local_files_only": True}
    own = {"do_image_splitting": False, "image_seq_len": 4} if family == "idefics3" else {"patch_size": 8}
    base = save_vision(tmp_path, family)
    assert found(base, processor_kwargs={**settings, **own}).image_processor.do_resize is False


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"processor_type": "NoProcessor"}, "processor_type: transformers has no processor 'NoProcessor'"),
        (
            {"processor_type": "CLIPModel"},
            "processor_type: transformers has no processor",
        ),
        (
            {"processor_type": "LlavaProcessor", "overrides_of_model_config": {"image_token_index": 5}},
            r"processor_type: LlavaProcessor writes the tokens \[259\] for a picture, and .* looks for 5",
        ),
        ({"processor_type": "AutoTokenizer"}, "processor_type: transformers has no processor"),
        ({"processor_type": "Gemma3Processor"}, "processor_type: no processor of pictures could be loaded from .*boi_token_id"),
        ({"processor_type": "Idefics3Processor"}, "processor_type: a Idefics3Processor can't take pictures with the model's"),
        ({"processor_kwargs": {"do_resise": False}}, "processor_kwargs.do_resise: LlavaProcessor has no such setting"),
    ],
)
def test_processors_that_are_none_of_the_models(folder: str, keys: dict[str, Any], message: str) -> None:
    cfg = as_config({**CONFIG, "base_model": folder, **keys})
    for load in (load_processor, find_processor):
        with pytest.raises(ValueError, match=message):
            load(cfg, load_tokenizer(cfg))


@pytest.mark.parametrize("keys", [{"image_size": 32}, {"processor_type": "AutoProcessor"}, {"processor_kwargs": {"a": 1}}])
def test_keys_of_pictures_with_a_text_model(tmp_path: Path, keys: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{min(keys)}: base_model '.*' takes no pictures; remove the key"):
        found(save_tiny(tmp_path), **keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"image_resize_algorithm": "bicubic"}, "image_resize_algorithm: has no effect without image_size"),
        ({"image_size": 0}, "image_size"),
        ({"image_size": [32]}, "image_size"),
        ({"image_size": 32, "image_resize_algorithm": "cubic"}, "image_resize_algorithm"),
        ({"processor_kwargs": {"trust_remote_code": True}}, "processor_kwargs.trust_remote_code: has a key of its own"),
        ({"processor_kwargs": {"revision": "a"}}, "processor_kwargs.revision: has a key of its own: write revision_of_model"),
        ({"freeze_mm_modules": True, **LORA}, "freeze_mm_modules: has no effect with an adapter"),
    ],
)
def test_wrong_keys(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_config({**CONFIG, **keys})


def test_a_number_pads_to_a_square_and_two_stretch() -> None:
    image = Image.new("RGB", (40, 20), "white")
    processor = llava().processor
    (square,) = VisionProcessing(with_size(processor, 20, None))._sized([image])
    assert square.size == (20, 20) and square.getpixel((10, 0)) == (0, 0, 0) and square.getpixel((10, 10)) == (255,) * 3
    (stretched,) = VisionProcessing(with_size(processor, [10, 20], None))._sized([image])
    assert stretched.size == (10, 20) and stretched.getpixel((5, 0)) == (255,) * 3
    # Of a config without a size, whatever the processor was used for before.
    assert VisionProcessing(with_size(processor, None, None))._sized([image]) == [image]


def test_the_trainer_resizes_as_the_config_says(tmp_path: Path) -> None:
    vision = FAMILIES["qwen2_5_vl"]()
    trainer = vision_trained(tmp_path, vision, rows=picture_pairs(2), max_steps=1, image_size=32)
    image = vision.processor.image_token_id
    # 32 pixels a side are 4 patches, and 4 tokens.
    assert [list(row["prompt_ids"]).count(image) for row in trainer.train_dataset] == [4, 4]


def test_the_saved_processor_resizes_as_the_model_was_trained(tmp_path: Path, folder: str) -> None:
    image = picture("red", "circle")
    processor = found(folder, image_size=[24, 12], image_resize_algorithm="bicubic")
    expected = VisionProcessing(processor).pixels([image])["pixel_values"]
    saved = shutil.copytree(folder, tmp_path / "saved")
    processor.save_pretrained(saved)
    again = found(str(saved))
    assert torch.equal(VisionProcessing(again).pixels([image])["pixel_values"], expected)
    assert not torch.equal(VisionProcessing(found(folder)).pixels([image])["pixel_values"], expected)
    # The data's fingerprint and the cached scores are those of the recipe with the key.
    assert image_settings(again) == image_settings(processor)
    assert processor_identity(again) == processor_identity(processor) != processor_identity(found(folder))
    # Transformers passes over the setting, and keeps it.
    assert AutoProcessor.from_pretrained(saved).image_processor.prefray["image_size"] == [24, 12]
    # A recipe's own size wins, for that recipe.
    assert VisionProcessing(with_size(again, 10, None))._sized([image])[0].size == (10, 10)
    assert VisionProcessing(with_size(again, None, None))._sized([image])[0].size == (24, 12)


def test_an_adapter_brings_the_processor_of_its_training(tmp_path: Path, folder: str) -> None:
    """Continued, or read beside its tokenizer; an adapter without a processor has the base's."""
    trained = found(folder, image_size=16, chat_template="chatml", processor_kwargs={"do_center_crop": False})
    trained.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    for keys in ({"adapter": "lora", "lora_model_dir": str(tmp_path)}, {"tokenizer_config": str(tmp_path)}):
        processor = found(folder, **keys)
        assert image_settings(processor) == image_settings(trained) != image_settings(found(folder))
        assert processor.chat_template == trained.chat_template
    assert image_settings(found(folder, tokenizer_config=str(tmp_path), image_size=8))["image_size"] == 8
    (tmp_path / "processor_config.json").unlink()
    assert image_settings(found(folder, tokenizer_config=str(tmp_path))) == image_settings(found(folder))


@pytest.mark.parametrize(
    "settings", [32, {"image_size": 0, "image_resize_algorithm": "box"}, {"image_size": [8]}, {"image_size": 8}]
)
def test_a_saved_size_that_is_none(tmp_path: Path, folder: str, settings: Any) -> None:
    saved = shutil.copytree(folder, tmp_path / "saved")
    file = saved / "processor_config.json"
    values = json.loads(file.read_text())
    values["image_processor"]["prefray"] = settings
    file.write_text(json.dumps(values))
    cfg = as_config({**CONFIG, "base_model": str(saved)})
    processor, reason = processor_or_reason(cfg, load_tokenizer(cfg))
    assert processor is None
    assert re.match(r"the processor's settings have prefray: .*, which is no size of pictures; write image_size", reason or "")
    assert found(str(saved), image_size=8) is not None


@pytest.mark.parametrize("freeze", [True, False])
def test_the_tower_is_frozen(tmp_path: Path, freeze: bool) -> None:
    vision = llava()
    before = {name: weight.clone() for name, weight in vision.model.named_parameters()}
    vision_trained(tmp_path, vision, rows=picture_pairs(2), max_steps=1, freeze_mm_modules=freeze)
    changed = {name.split(".")[1] for name, weight in vision.model.named_parameters() if not torch.equal(weight, before[name])}
    assert ("vision_tower" in changed, "multi_modal_projector" in changed) == (not freeze, not freeze)
    assert "language_model" in changed


def test_a_text_model_has_nothing_to_freeze(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    keys = {**CONFIG, "output_dir": str(tmp_path), "freeze_mm_modules": True}
    with pytest.raises(ValueError, match="freeze_mm_modules: base_model 'tiny' takes no pictures"):
        HFRLTrainerBuilder(keys, tiny_model(tokenizer), tokenizer).build()


def test_a_model_that_puts_pictures_elsewhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vision = llava()
    monkeypatch.delattr(type(vision.model.base_model), "get_image_features")
    with pytest.raises(ValueError, match="base_model: 'llava' .* doesn't put pictures in place of tokens"):
        vision_trained(tmp_path, vision)
