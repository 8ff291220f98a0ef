"""What a config asks for: the sources, surveyed, and the fingerprint that follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.config.secrets import redact
from pipeline.data.fingerprint import FORMAT_VERSION, digest, tokenizer_identity
from pipeline.data.kinds import kind_of
from pipeline.data.length import STRATEGIES
from pipeline.data.sources.shards import Shard, Source, survey
from pipeline.data.transforms import build_transform, code_of, dataset_template
from pipeline.data.transforms.base import Context
from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from strategies.base import BatchKind

__all__ = ["Plan", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """`datasets` are the training sets and then the test sets; `test_from` is where the latter begin."""

    kind: BatchKind
    datasets: tuple[dict[str, Any], ...]
    templates: tuple[str | None, ...]
    sources: tuple[Source, ...]
    test_from: int
    val_set_size: float
    inputs: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        return digest(self.inputs)

    @property
    def shards(self) -> tuple[Shard, ...]:
        return tuple(shard for source in self.sources for shard in source.shards)

    @property
    def rows(self) -> int | None:
        """Raw rows in all; None when some source has to be read to know."""
        counts = [source.rows for source in self.sources]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None


def make_plan(cfg: Any, tokenizer: PreTrainedTokenizerBase, rows_per_part: int) -> Plan:
    """Survey every source and compute the fingerprint's inputs.

    Raises:
        UserError: for whatever is wrong with a dataset, with its key: `datasets[1].path: ...`.
    """
    kind = kind_of(cfg.rl)
    train, test = list(cfg.datasets or []), list(cfg.test_datasets or [])
    if not train:
        raise UserError("datasets: must name one dataset at least")
    if cfg.excess_length_strategy not in (None, *STRATEGIES):
        raise UserError(f"excess_length_strategy: must be one of {', '.join(STRATEGIES)}, got {cfg.excess_length_strategy!r}")
    entries = [(f"datasets[{place}]", _keys(entry)) for place, entry in enumerate(train)]
    entries += [(f"test_datasets[{place}]", _keys(entry)) for place, entry in enumerate(test)]
    datasets, templates, sources, codes = [], [], [], []
    for index, (place, keys) in enumerate(entries):
        try:
            template = dataset_template(tokenizer, keys)
            build_transform(cfg.rl, Context(tokenizer, template, keys))
            codes.append(code_of(keys, cfg.rl))
            sources.append(survey(keys, index, rows_per_part))
        except UserError as error:
            raise UserError(f"{place}.{error}") from error
        datasets.append(keys)
        templates.append(template)
    val_set_size = 0.0 if test else float(cfg.val_set_size or 0)
    inputs = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "datasets": [_dataset_inputs(*each) for each in zip(datasets, templates, sources, codes, strict=True)],
        "test_from": len(train),
        "tokenizer": tokenizer_identity(tokenizer),
        "sequence_len": cfg.sequence_len,
        "excess_length_strategy": cfg.excess_length_strategy or "drop",
        "dataset_exact_deduplication": bool(cfg.dataset_exact_deduplication),
        "val_set_size": val_set_size,
        "seed": (cfg.seed or 0) if val_set_size else None,
        "rows_per_part": rows_per_part,
        **({} if cfg.encode_special_tokens else {"encode_special_tokens": False}),
    }
    return Plan(kind, tuple(datasets), tuple(templates), tuple(sources), len(train), val_set_size, inputs)


def _keys(entry: Any) -> dict[str, Any]:
    given = entry.model_dump(exclude_none=True) if hasattr(entry, "model_dump") else dict(entry)
    return {key: value for key, value in given.items() if value is not None and value is not False}


def _dataset_inputs(keys: dict[str, Any], template: str | None, source: Source, code: str | None) -> dict[str, Any]:
    """A template counts by its text, not by its name; a type from outside by name and code."""
    named = {key: value for key, value in keys.items() if key not in ("chat_template", "chat_template_jinja")}
    inputs = {**redact(named), "template": template, "identity": list(source.identity)}
    return inputs if code is None else {**inputs, "code": code}
