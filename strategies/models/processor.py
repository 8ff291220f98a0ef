"""The processor of a config: how its model takes pictures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies import vision
from strategies.models.config import load_config
from strategies.models.location import ADAPTER_CONFIG, ModelLocation, resolve_model_location
from strategies.vision.checks import check_belongs, takes_pictures

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

__all__ = ["PROCESSOR_FILES", "chat_template_of", "find_processor", "load_processor", "processor_or_reason"]

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
"""Files of which a folder with a processor has one."""

KEYS = ("processor_type", "processor_kwargs", "image_size", "image_resize_algorithm")
"""Keys that only a processor reads."""
LOADING = ("backend", "cache_dir", "force_download", "local_files_only", "subfolder", "token", "use_fast")
"""Arguments of `from_pretrained` that are no settings."""


def find_processor(cfg: Any, tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin | None:
    """Return the processor of `processor_or_reason`; None without one."""
    return processor_or_reason(cfg, tokenizer)[0]


def processor_or_reason(cfg: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[ProcessorMixin | None, str | None]:
    """Load the processor of a vision-language model, or return why it can't be used; neither for a text model.

    Rows of text alone need none.

    Raises:
        ValueError: if there is none, and the config has keys for it.
    """
    given = [name for name in KEYS if getattr(cfg, name) is not None]
    if not _has_tower(cfg):
        if given:
            raise ValueError(f"{given[0]}: base_model {cfg.base_model!r} takes no pictures; remove the key")
        return None, None
    try:
        processor = load_processor(cfg, tokenizer)
        # One that expands no token takes its pictures in a way of its own.
        if getattr(processor, "image_token", None) is None:
            kind = type(processor).__name__
            raise ValueError(f"base_model: {cfg.base_model!r} has a {kind}, which has no token that stands for a picture")
    except ValueError as error:
        if given:
            raise
        return None, str(error)
    return processor, None


def _has_tower(cfg: Any) -> bool:
    # A GGUF file has the text model's weights alone, and reading its config would convert it.
    if cfg.base_model.endswith(".gguf"):
        return False
    try:
        config = load_config(cfg)
    # A folder of a tokenizer alone is enough to prepare text.
    except ValueError:
        return False
    return takes_pictures(config)


def load_processor(cfg: Any, tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    """Load the processor of `cfg.base_model`, with the config's keys of pictures, its tokenizer and its chat template.

    With an adapter in `lora_model_dir`, or beside the tokenizer, it is the one that was saved there: the adapter was trained
    with its settings.

    Raises:
        ValueError: if the model has none, its picture processor can't be loaded or has no setting of a name that
            `processor_kwargs` gives, or `processor_type` is no class of one.
    """
    from transformers import ProcessorMixin

    location = _beside_adapter(cfg) or resolve_model_location(cfg.base_model)
    key = "processor_type" if cfg.processor_type else location.key
    processor = _open(cfg, location)
    # For a folder without a processor AutoProcessor returns its tokenizer, or its image processor alone.
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(
            f"{key}: {location.given!r} has no processor of pictures (a {type(processor).__name__} was found); "
            "give a vision-language model, whose folder has preprocessor_config.json"
        )
    _check_arguments(processor, cfg.processor_kwargs or {})
    try:
        check_belongs(load_config(cfg), processor, cfg.base_model)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    # Otherwise the processor keeps its own template: the tokenizer's may have no placeholders for pictures.
    if cfg.chat_template or cfg.chat_template_jinja:
        processor.chat_template = tokenizer.chat_template
    # The policy's, with the added tokens of the config: rows with pictures are tokenised by the processor.
    processor.tokenizer = tokenizer
    vision.with_size(processor, cfg.image_size, cfg.image_resize_algorithm)
    # One without such a token is refused where it is found.
    if cfg.processor_type and getattr(processor, "image_token", None) is not None:
        _check_use(processor)
    return processor


def _beside_adapter(cfg: Any) -> ModelLocation | None:
    """Return the folder of an adapter that has a processor of its own; None where there is none."""
    for key in ("lora_model_dir", "tokenizer_config"):
        if (given := getattr(cfg, key)) is None:
            continue
        location = resolve_model_location(given, key)
        folder = Path(location.path)
        if (folder / ADAPTER_CONFIG).is_file() and any((folder / name).is_file() for name in PROCESSOR_FILES):
            return location
    return None


def chat_template_of(processor: ProcessorMixin) -> str | None:
    """Return the processor's chat template: of several, the one that it uses by default."""
    template = processor.chat_template
    return template.get("default") if isinstance(template, dict) else template


def _check_arguments(processor: ProcessorMixin, names: Iterable[str]) -> None:
    """Raise ValueError for an argument that a processor doesn't have, which transformers would leave out silently."""
    images = getattr(processor, "image_processor", None)
    known = {*LOADING, *getattr(getattr(images, "valid_kwargs", None), "__annotations__", ())}
    parts = (processor, images, processor.tokenizer, getattr(processor, "video_processor", None))
    for name in names:
        if name not in known and not any(hasattr(part, name) for part in parts):
            raise ValueError(f"processor_kwargs.{name}: {type(processor).__name__} has no such setting; correct or remove it")


def _check_use(processor: ProcessorMixin) -> None:
    """Raise ValueError where a class was chosen that can't use the model's own picture processor or tokens."""
    try:
        vision.VisionProcessing(processor).blank()
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
        raise ValueError(
            f"processor_type: a {type(processor).__name__} can't take pictures with the model's settings "
            f"({type(error).__name__}: {error}); remove the key to have the model's own"
        ) from error


def _open(cfg: Any, location: ModelLocation) -> Any:
    import transformers

    name = cfg.processor_type or "AutoProcessor"
    kind = getattr(transformers, name, None)
    is_processor = isinstance(kind, type) and issubclass(kind, (transformers.ProcessorMixin, transformers.AutoProcessor))
    if kind is None or not is_processor:
        raise ValueError(f"processor_type: transformers has no processor {name!r}; remove the key to have the model's own")
    revision = {"revision": cfg.revision_of_model} if cfg.revision_of_model else {}
    try:
        return kind.from_pretrained(
            location.path, trust_remote_code=cfg.trust_remote_code, **revision, **(cfg.processor_kwargs or {})
        )
    # AttributeError: of a class whose tokens the tokenizer doesn't have.
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{'processor_type' if cfg.processor_type else location.key}: no processor of pictures could be loaded from "
            f"{location.given!r}: {error}"
        ) from error
