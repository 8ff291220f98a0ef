"""Loading models from the places that a config can name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from strategies.config import as_config
from strategies.models.config import learned_positions
from strategies.models.loading import build_peft_config, load_model
from strategies.models.tokenizer import MOST_SHARED, load_tokenizer, shared_tokenizer
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer


def config(base: str, **keys: Any) -> Any:
    return as_config({"base_model": base, "rl": "dpo", **keys})


def test_weights_are_float32_unless_asked_otherwise(base: str) -> None:
    assert load_model(config(base)).dtype == torch.float32
    assert load_model(config(base, bf16=True)).dtype == torch.float32
    assert load_model(config(base, bf16="full")).dtype == torch.bfloat16


def test_a_folder_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"base_model: no model could be loaded from '{tmp_path}'"):
        load_model(config(str(tmp_path)))


def test_missing_weights_are_an_error_and_not_drawn_at_random(base: str) -> None:
    with pytest.raises(ValueError, match=r"base_model: '.*' lacks 9 of the model's weights, such as model\.layers\.2"):
        load_model(config(base, overrides_of_model_config={"num_hidden_layers": 3}))


def test_the_reference_is_named_by_its_own_key(base: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reference_model: no such folder"):
        load_model(config(base, reference_model=str(tmp_path / "nothing")), key="reference_model")


def test_config_and_arguments_can_be_overridden(base: str) -> None:
    model = load_model(config(base, overrides_of_model_config={"attention_dropout": 0.1}, attn_implementation="eager"))
    assert model.config.attention_dropout == 0.1
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match=r"overrides_of_model_config\.hidden_sise: the config of .* has no such value"):
        load_model(config(base, overrides_of_model_config={"hidden_sise": 3}))


@pytest.mark.parametrize(("to_32", "expected"), [(None, 261), (True, 288)])
def test_embeddings_grow_with_added_tokens_the_same_each_time(base: str, to_32: bool | None, expected: int) -> None:
    keys = {} if to_32 is None else {"resize_token_embeddings_to_32x": to_32}
    cfg = config(base, tokens=["<a>", "<b>"], **keys)
    tokenizer = load_tokenizer(cfg)
    first, second = load_model(cfg, tokenizer), load_model(cfg, tokenizer)
    assert first.embeddings_grew
    assert first.get_input_embeddings().num_embeddings == expected
    assert torch.equal(first.get_input_embeddings().weight, second.get_input_embeddings().weight)


def test_embeddings_never_shrink(tmp_path: Path) -> None:
    cfg = config(save_tiny(tmp_path, vocab_size=300))
    model = load_model(cfg, load_tokenizer(cfg))
    assert model.get_input_embeddings().num_embeddings == 300
    assert not model.embeddings_grew


def test_a_process_loads_a_tokenizer_once(tmp_path: Path) -> None:
    base, template = save_tiny(tmp_path / "base"), tmp_path / "a.jinja"
    template.write_text("a")
    cfg = config(base, chat_template_jinja=str(template))
    shared = shared_tokenizer(cfg)
    # What trials of a sweep search doesn't decide it.
    assert shared_tokenizer(config(base, chat_template_jinja=str(template), learning_rate=1.0, adapter="lora")) is shared
    assert load_tokenizer(cfg) is not shared
    for keys in ({"tokens": ["<a>"]}, {"special_tokens": {"pad_token": "<p>"}}, {"chat_template": "chatml"}):
        assert shared_tokenizer(config(base, **keys)) is not shared
    assert len(shared_tokenizer(config(base, tokens=["<a>"]))) == len(shared) + 1


def test_a_tokenizer_whose_files_have_changed_is_loaded_again(tmp_path: Path) -> None:
    base, template = save_tiny(tmp_path / "base"), tmp_path / "a.jinja"
    template.write_text("a")
    cfg = config(base, chat_template_jinja=str(template))
    assert shared_tokenizer(cfg).chat_template == "a"
    template.write_text("ab")
    assert shared_tokenizer(cfg).chat_template == "ab"
    before = len(shared_tokenizer(cfg))
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(base)
    assert len(shared_tokenizer(cfg)) == before + 1
    for number in range(MOST_SHARED):
        shared_tokenizer(config(base, tokens=[f"<{number}>"]))
    with pytest.raises(ValueError, match="no tokenizer could be loaded"):
        shared_tokenizer(config(str(tmp_path)))


def test_lora_defaults() -> None:
    lora = build_peft_config(config("tiny", adapter="lora"), tiny_model(tiny_tokenizer()))
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.target_modules, lora.task_type) == (
        8,
        16,
        0.0,
        "all-linear",
        "CAUSAL_LM",
    )


def write_gguf(folder: Path) -> str:
    """The tiny model as a GGUF file of 32-bit weights, without a tokenizer."""
    gguf = pytest.importorskip("gguf")
    model = tiny_model(tiny_tokenizer())
    writer = gguf.GGUFWriter(str(folder / "tiny.gguf"), "llama")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(259)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, weight in model.state_dict().items():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads:  # GGUF interleaves the two halves that rotary embedding turns
            weight = weight.reshape(heads, 2, -1, 64).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(folder / "tiny.gguf")


def test_gguf_weights_become_plain_and_can_be_saved(tmp_path: Path) -> None:
    model = load_model(config(write_gguf(tmp_path)))
    expected = tiny_model(tiny_tokenizer())
    assert model.dtype == torch.float32
    ids = torch.tensor([[1, 2, 3]])
    assert torch.allclose(model(ids).logits, expected(ids).logits, atol=1e-5)
    model.save_pretrained(tmp_path / "plain")
    again = load_model(config(str(tmp_path / "plain")))
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_a_gguf_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    file = Path(write_gguf(tmp_path))
    first, status = load_model(config(str(file))), file.stat()
    file.write_bytes(bytes(status.st_size))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert torch.equal(load_model(config(str(file))).lm_head.weight, first.lm_head.weight)
    os.utime(file)
    with pytest.raises(ValueError, match="base_model: no model could be loaded from .*tiny.gguf"):
        load_model(config(str(file)))


def test_a_gguf_file_is_loaded_where_nothing_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").write_text("a file, no folder")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    assert load_model(config(write_gguf(tmp_path))).dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "positions"),
    [
        ("gpt2", 1024),
        ("opt", 2048),
        ("gptj", 2048),
        ("xglm", 2048),
        ("llama", None),
        ("bloom", None),
        ("jamba", None),
        ("rwkv", None),
    ],
)
def test_positions_that_a_model_has_a_table_for(kind: str, positions: int | None) -> None:
    assert learned_positions(CONFIG_MAPPING[kind]()) == positions
