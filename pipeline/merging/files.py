"""What stands beside a merged model's weights: config, generation config, tokenizer, model card."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig
from transformers.trainer_utils import align_special_tokens

from strategies.gguf import unpacked
from strategies.locations import resolve_model_location

if TYPE_CHECKING:
    from pipeline.merging.merge import MergeResult
    from pipeline.merging.source import Source

__all__ = ["write_card", "write_configs"]


def write_configs(folder: Path, config: Any, tokenizer: Any, cfg: Any) -> None:
    """Write config, generation config and tokenizer, special tokens the same in all three, as training sets them.

    Args:
        config: the merged model's.
        cfg: names the base model.
    """
    location = unpacked(resolve_model_location(cfg.base_model), "weights")
    revision = {"revision": cfg.revision_of_model} if cfg.revision_of_model else {}
    try:
        generation = GenerationConfig.from_pretrained(location.path, **revision)
    except OSError:  # a base without one: transformers makes it from the config
        generation = GenerationConfig.from_model_config(config)
    align_special_tokens(SimpleNamespace(config=config, generation_config=generation), tokenizer)
    config.save_pretrained(folder)
    generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if cfg.trust_remote_code:
        for file in Path(location.path).glob("*.py"):  # the model's own code, where the base is a folder
            shutil.copy(file, folder)


def write_card(folder: Path, source: Source, result: MergeResult) -> None:
    """Write `README.md`: what was merged into what, and how far it is from base and adapter."""
    base = source.cfg.base_model
    facts = {
        "Base model": base,
        "Adapter": source.given,
        "Tensors changed": f"{result.merged} of {result.tensors}",
        "Stored as": result.dtype,
    }
    found = result.differences
    if found is None:
        facts["Compared with base and adapter"] = "no"
    else:
        facts |= {
            "Compared with base and adapter": f"{found.tokens} tokens in {found.sequences} sequences",
            "Largest difference of a logit": f"{found.logits:.2g}",
            "Largest difference of a log-probability": f"{found.logps.largest:.2g}",
            "Same most probable token": f"{found.same_argmax:.1%} of positions",
        }
    lines = ["---", "library_name: transformers", *_base_tag(base), "tags:", "- prefray", "- merged", "---", ""]
    lines += [f"# {Path(base).name}, merged with an adapter", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _base_tag(base: str) -> list[str]:
    """A hub id in the card's header; a path says nothing to others."""
    return [f"base_model: {base}"] if base.count("/") == 1 and not Path(base).exists() and "://" not in base else []
