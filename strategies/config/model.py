"""Keys of the model, the tokenizer and the precision."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt

from strategies.keys import Keys, key

__all__ = ["ModelKeys", "SpecialTokens"]

ImageResizeAlgorithm = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]


class SpecialTokens(Keys):
    """Special tokens to set on the tokenizer; a token that is new to the vocabulary is added."""

    bos_token: str | None = key("Beginning-of-sequence token.")
    eos_token: str | None = key("End-of-sequence token; ends every completion of plain text.")
    pad_token: str | None = key("Padding token; the eos token where a tokenizer has none.")
    unk_token: str | None = key("Unknown token.")
    additional_special_tokens: list[str] | None = key("Further tokens that are never split.")


class ModelKeys(Keys):
    """Model, tokenizer and precision."""

    # The only required key; `key` always has a default.
    base_model: str = Field(
        description="Folder, hub id, `.gguf` file, URI of a folder or such a file (`s3://...`), or `pkg://PACKAGE/FILE` for a "
        "file that an installed package carries."
    )
    base_model_config: str | None = key("Folder, URI or hub id of the model config, where it is not base_model's own.")
    revision_of_model: str | None = key("Hub revision of base_model.")
    tokenizer_config: str | None = key("Folder, URI or hub id of the tokenizer, where it is not base_model's own.")
    tokenizer_use_fast: bool | None = key("Use the fast (Rust) tokenizer; the tokenizer's own default when not set.")
    trust_remote_code: bool = key("Run Python code that the model's repository carries.", False)
    reference_model: str | None = key(
        "Reference policy, in the forms of base_model. Not set: the policy before its first step "
        "(a frozen copy; with a new adapter, the base model)."
    )
    overrides_of_model_config: dict[str, Any] | None = key("Values that replace those of the model's config.")
    overrides_of_model_kwargs: dict[str, Any] | None = key("Extra arguments of `from_pretrained`.")
    attn_implementation: str | None = key("Attention of transformers: sdpa, eager, flash_attention_2, ...")
    special_tokens: SpecialTokens | None = key("Special tokens to set on the tokenizer.")
    tokens: list[str] | None = key("Tokens to add to the vocabulary; the embeddings grow with them.")
    resize_token_embeddings_to_32x: bool | None = key("Round the grown vocabulary up to a multiple of 32.")
    processor_type: str | None = key(
        "Class of the processor of pictures, of transformers; `AutoProcessor`, which finds the model's own, when not set."
    )
    processor_kwargs: dict[str, Any] | None = key("Further arguments of the processor's `from_pretrained`.")
    image_size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = key(
        "Size in pixels that pictures get before the processor: a number pads them to a square with black, `[width, height]` "
        "stretches them. Not set: as they are; the processor's own resizing follows either way."
    )
    image_resize_algorithm: ImageResizeAlgorithm | None = key("Resampling with image_size; bilinear when not set.")
    freeze_mm_modules: bool = key(
        "Leave the weights that encode pictures (tower and projector) as they are; rows of text alone always do. An adapter "
        "leaves them alone unless lora_target_modules names a part of them.",
        False,
    )
    chat_template: str | None = key(
        "`tokenizer_default` (also when not set), `tokenizer_default_fallback_NAME`, `jinja` with "
        "chat_template_jinja, or a built-in NAME."
    )
    chat_template_jinja: str | None = key("A Jinja chat template, inline or the path of a file.")
    bf16: Literal["auto", "full"] | bool = key(
        "bfloat16 autocast. `auto`: where the GPU has it; on a CPU that multiplies it (AVX512-BF16, AMX) for models of width "
        "512 or more. `full`: weights and evaluation too.",
        "auto",
    )
    fp16: bool = key("float16 autocast with loss scaling (GPU only).", False)
    tf32: Literal["auto"] | bool | None = key("TensorFloat-32 products on GPUs that have them.")
    load_in_8bit: bool = key("8-bit base weights (bitsandbytes, GPU only); needs an adapter.", False)
    load_in_4bit: bool = key("4-bit base weights (bitsandbytes, GPU only); needs `adapter: qlora`.", False)
    bnb_config_kwargs: dict[str, Any] | None = key("Further arguments of BitsAndBytesConfig.")
    gradient_checkpointing: bool = key("Recompute activations in the backward pass: less memory, more time.", False)
    gradient_checkpointing_kwargs: dict[str, Any] | None = key("Arguments of torch's checkpointing (use_reentrant).")
    torch_compile: bool = key("Compile the model with torch.compile.", False)
    torch_compile_backend: str | None = key("Backend of torch.compile.")
    torch_compile_mode: Literal["default", "reduce-overhead", "max-autotune"] | None = key("Mode of torch.compile.")
