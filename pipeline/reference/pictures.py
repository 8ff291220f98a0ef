"""Check before anything starts: policy and reference take the pictures of the rows, and make the same pixels of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.config import RunConfig
from pipeline.errors import UserError
from strategies import models
from strategies.models.config import load_config
from strategies.models.tokenizer import load_tokenizer
from strategies.vision.checks import image_settings, takes_pictures

if TYPE_CHECKING:
    from pipeline.data import Prepared

__all__ = ["check_given_reference", "check_models", "check_pictures"]


def check_pictures(cfg: RunConfig, prepared: Prepared) -> dict[str, Any] | None:
    """Check a store's pictures; return what decides their pixels, as JSON values, or None where no row has any.

    Raises:
        UserError: for a method or a model that takes no pictures, a processor that belongs to another model, and a reference
            that makes other pixels of a picture.
    """
    if not (number := prepared.manifest.get("pictures")):
        return None
    if prepared.manifest["kind"] == "prompt":
        raise UserError(
            f"rl: {cfg.rl} generates answers from text alone, and the rows have {number} pictures; leave these rows out, or "
            "choose a method of pairs or labelled completions, such as rl: dpo or rl: kto"
        )
    return check_models(cfg)


def check_models(cfg: RunConfig) -> dict[str, Any]:
    """Return what decides the pixels of a picture, as JSON values, of a policy and its reference alike.

    Raises:
        UserError: as `check_pictures`.
    """
    # What belongs to the policy alone.
    own = {"revision_of_model": None, "base_model_config": None, "overrides_of_model_config": None, "lora_model_dir": None}
    try:
        settings = _settings(cfg, "base_model")
        if cfg.reference_model is None:
            return settings
        other = _settings(cfg.model_copy(update={"base_model": cfg.reference_model, **own}), "reference_model")
    except ValueError as error:
        raise UserError(str(error)) from error
    _compare(settings, other, f"reference_model: {cfg.reference_model!r}")
    return settings


def check_given_reference(policy: RunConfig, reference: RunConfig, name: str) -> None:
    """Check that `--reference` takes pictures, and makes the policy's pixels of them. Raises UserError."""
    _compare(check_models(policy), check_models(reference), f"--reference: {name!r}")


def _compare(settings: dict[str, Any], other: dict[str, Any], reference: str) -> None:
    # The size first: without one there is no way to resize either.
    for name in sorted(settings.keys() | other.keys(), key=lambda name: (name != "image_size", name)):
        if settings.get(name) != other.get(name):
            raise UserError(
                f"{reference} makes other pixels of a picture ({name}: {other.get(name)} where the policy has "
                f"{settings.get(name)}); give a reference with the policy's processor"
            )


def _settings(cfg: RunConfig, key: str) -> dict[str, Any]:
    """Return the settings of the processor of `cfg.base_model`, which a message calls `key`."""
    config, tokenizer = load_config(cfg), load_tokenizer(cfg)
    if not takes_pictures(config):
        raise ValueError(
            f"{key}: {cfg.base_model!r} ({config.model_type}) takes no pictures, and rows have pictures; give a "
            "vision-language model with its preprocessor_config.json, or rows of text alone"
        )
    # A reference has a processor of its own, not that of an adapter beside whose tokenizer it reads.
    cfg = cfg.model_copy(update={"tokenizer_config": None}) if key == "reference_model" else cfg
    try:
        processor = models.load_processor(cfg, tokenizer)
    except ValueError as error:
        raise ValueError(str(error).replace("base_model:", f"{key}:", 1)) from error
    return image_settings(processor)
