"""Plan of a config's data: its sources, surveyed, and the resulting fingerprint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any

from pipeline.data.dates import prints_date
from pipeline.data.fingerprint import FORMAT_VERSION, digest, processor_identity, tokenizer_identity
from pipeline.data.keys import DataConfig
from pipeline.data.row_kinds import kind_of
from pipeline.data.sources.shards import Shard, Source, survey
from pipeline.data.store import prepared_root
from pipeline.data.transforms import build_transform, code_of, dataset_template, find_placeholder
from pipeline.data.transforms.base import Context, Placeholder
from pipeline.data.truncation import STRATEGIES
from pipeline.errors import UserError
from pipeline.io.storage import Folder
from pipeline.secrets import redact
from strategies.models.processor import chat_template_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    from strategies.types import BatchKind

__all__ = ["Plan", "make_plan", "remember_day"]


@dataclass(frozen=True)
class Plan:
    """`datasets` are the training sets followed by the test sets, which begin at index `test_from`.

    `day` is the date that chat templates print, None when they print none; `undated` holds all other inputs that change the
    store's bytes.
    """

    kind: BatchKind
    datasets: tuple[dict[str, Any], ...]
    templates: tuple[str | None, ...]
    sources: tuple[Source, ...]
    test_from: int
    val_set_size: float
    undated: dict[str, Any]
    day: date | None = None
    processor: ProcessorMixin | None = None
    """Processor of pictures; None where rows are text alone."""
    placeholders: tuple[Placeholder | None, ...] = ()
    """What stands for a picture in the text of each dataset."""

    @property
    def inputs(self) -> dict[str, Any]:
        """All inputs that change the store's bytes."""
        return self.undated if self.day is None else {**self.undated, "template_date": str(self.day)}

    @property
    def fingerprint(self) -> str:
        return digest(self.inputs)

    @property
    def shards(self) -> tuple[Shard, ...]:
        return tuple(shard for source in self.sources for shard in source.shards)

    @property
    def rows(self) -> int | None:
        """Total raw rows; None when some source has to be read to count them."""
        counts = [source.rows for source in self.sources]
        sizes = [count for count in counts if count is not None]
        return sum(sizes) if len(sizes) == len(counts) else None


def make_plan(
    cfg: DataConfig, tokenizer: PreTrainedTokenizerBase, rows_per_part: int, processor: ProcessorMixin | None = None
) -> Plan:
    """Survey every source and collect the inputs of the fingerprint.

    Args:
        cfg: the recipe.
        tokenizer: the recipe's tokenizer.
        rows_per_part: raw rows per staged part.
        processor: the recipe's processor of pictures, if its model takes any.

    Raises:
        UserError: for any problem with a dataset, with its key: `datasets[1].path: ...`.
    """
    kind = kind_of(cfg.rl)
    # Prompts alone are text, and rendered as without a processor.
    processor = processor if kind != "prompt" else None
    train, test = list(cfg.datasets or []), list(cfg.test_datasets or [])
    if not train:
        raise UserError("datasets: must name one dataset at least")
    if cfg.excess_length_strategy not in (None, *STRATEGIES):
        raise UserError(f"excess_length_strategy: must be one of {', '.join(STRATEGIES)}, got {cfg.excess_length_strategy!r}")
    surveyed = list(_survey([*train, *test], len(train), cfg.rl, tokenizer, rows_per_part, processor))
    # test_datasets replace a split of the training data.
    val_set_size = 0.0 if test else float(cfg.val_set_size or 0)
    inputs = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "datasets": [_dataset_inputs(each.keys, each.template, each.source, each.code) for each in surveyed],
        # The same entries as train or test data make other files.
        "test_from": len(train),
        "tokenizer": tokenizer_identity(tokenizer),
        "sequence_len": cfg.sequence_len,
        "excess_length_strategy": cfg.excess_length_strategy or "drop",
        "dataset_exact_deduplication": bool(cfg.dataset_exact_deduplication),
        "val_set_size": val_set_size,
        # The seed only chooses evaluation rows here; without them, runs with other seeds share the store.
        "seed": (cfg.split_seed if cfg.split_seed is not None else cfg.seed or 0) if val_set_size else None,
        # It decides which rows stand in which file.
        "rows_per_part": rows_per_part,
        # Absent by default, so that the keys left the fingerprints of existing stores unchanged.
        **({} if cfg.encode_special_tokens else {"encode_special_tokens": False}),
        **({} if cfg.split_by == "prompt" else {"split_by": cfg.split_by}),
        **({} if processor is None else {"processor": processor_identity(processor)}),
    }
    # The stored day is found by the fingerprint of all other inputs, so the same data keep their day.
    is_dated = any(prints_date(each.template or tokenizer.chat_template) for each in surveyed)
    day = day_of(cfg, digest(inputs)) if is_dated else None
    return Plan(
        kind,
        tuple(each.keys for each in surveyed),
        tuple(each.template for each in surveyed),
        tuple(each.source for each in surveyed),
        len(train),
        val_set_size,
        inputs,
        day,
        processor,
        tuple(each.placeholder for each in surveyed) if processor is not None else (),
    )


@dataclass(frozen=True)
class _Surveyed:
    """One dataset of the recipe, and what was found at its path."""

    keys: dict[str, Any]
    template: str | None
    placeholder: Placeholder | None
    code: str | None
    """Digest of the code of its type, where that is the user's."""
    source: Source


def _survey(
    entries: list[Any],
    test_from: int,
    rl: str,
    tokenizer: PreTrainedTokenizerBase,
    rows_per_part: int,
    processor: ProcessorMixin | None,
) -> Iterator[_Surveyed]:
    """Survey the sources of `datasets` and, from index `test_from` on, `test_datasets`. Raises UserError as `make_plan`."""
    for index, entry in enumerate(entries):
        keys = _keys(entry)
        try:
            template, placeholder = dataset_template(tokenizer, keys), None
            if processor is not None:
                template = template or chat_template_of(processor)
                placeholder = find_placeholder(Context(tokenizer, template, keys), processor.image_token)
            # Built only for its errors, before the survey reads whole files; tasks build their own.
            build_transform(rl, Context(tokenizer, template, keys))
            code = code_of(keys, rl)
            yield _Surveyed(keys, template, placeholder, code, survey(keys, index, rows_per_part))
        except UserError as error:
            path = f"datasets[{index}]" if index < test_from else f"test_datasets[{index - test_from}]"
            raise UserError(f"{path}.{error}") from error


def _keys(entry: Any) -> dict[str, Any]:
    values = entry.model_dump(exclude_none=True) if hasattr(entry, "model_dump") else dict(entry)
    # Keys that say their default don't change the fingerprint.
    return {key: value for key, value in values.items() if value is not None and value is not False}


def _dataset_inputs(keys: dict[str, Any], template: str | None, source: Source, code: str | None) -> dict[str, Any]:
    # A template is identified by its text, not by its name; a registered type by its name and code.
    named = {key: value for key, value in keys.items() if key not in ("chat_template", "chat_template_jinja")}
    # Redacted, since the manifest holds the inputs: a path may be a URI with a password.
    inputs = {**redact(named), "template": template, "identity": list(source.identity)}
    return inputs if code is None else {**inputs, "code": code}


def day_of(cfg: DataConfig, undated: str) -> date:
    """Return `template_date`; else the day on which the same data were first prepared; else today.

    Args:
        undated: fingerprint of the data without the day.
    """
    if cfg.template_date is not None:
        return cfg.template_date
    return _stored_day(prepared_root(cfg.dataset_prepared_path), undated) or date.today()


def remember_day(cfg: DataConfig, root: Folder, undated: str, day: date) -> None:
    """Store the day of the first preparation, unless the recipe gives `template_date`. Raises OSError."""
    if cfg.template_date is None and _stored_day(root, undated) is None:
        root.write_bytes(f"{undated}.day", f"{day}\n".encode())


def _stored_day(root: Folder, undated: str) -> date | None:
    with suppress(ValueError):
        return date.fromisoformat((root.read(f"{undated}.day") or "").strip())
    return None
