"""The settings of the tasks that prepare rows, and what follows from them."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.row_kinds import kind_of
from pipeline.data.shard_pictures import ShardPictures
from pipeline.data.sources.shards import Shard
from pipeline.data.staged_parts import STAGING
from pipeline.data.transforms import Rendered, Transform, build_transform
from pipeline.data.transforms.base import Context, Placeholder
from pipeline.data.transforms.control import ENDS, control_pattern, control_tokens, end_tokens
from pipeline.io.storage import Folder
from strategies.plugins import Plugins
from strategies.types import BatchKind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

__all__ = ["Job"]


@dataclass(frozen=True)
class Job:
    """Settings of the tasks. `datasets` and `templates` (Jinja or None) are indexed by `Shard.dataset`."""

    rl: str
    tokenizer: PreTrainedTokenizerBase
    datasets: tuple[dict[str, Any], ...]
    templates: tuple[str | None, ...]
    shards: tuple[Shard, ...]
    sequence_len: int
    excess_length_strategy: str
    rows_per_part: int
    store: Folder
    """Of the prepared data; its subfolder `staging` gets the parts."""
    plugins: Plugins
    encode_special_tokens: bool = True
    day: date | None = None
    """The date that chat templates print."""
    processor: ProcessorMixin | None = None
    """Processor of pictures; None where the model takes none."""
    placeholders: tuple[Placeholder | None, ...] = ()
    """Of each dataset."""

    @property
    def kind(self) -> BatchKind:
        return kind_of(self.rl)

    @property
    def staging(self) -> Folder:
        return self.store.subfolder(STAGING)

    @cached_property
    def _max_characters(self) -> int:
        """Upper bound of the characters of a row that may fit into `sequence_len`.

        A token covers at most the characters of the longest one, times four for characters that normalisation removes. There
        is no bound where an unknown token may cover any number of characters (without byte-level tokens or byte fallback).
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        model = backend.to_str() if backend is not None else ""
        if self.tokenizer.unk_token is not None and '"ByteLevel"' not in model and '"byte_fallback":true' not in model:
            return sys.maxsize // 2
        return 4 * self.sequence_len * max(map(len, self.tokenizer.get_vocab()), default=1)

    def _is_short(self, text: Rendered) -> bool:
        """Return whether a row is short enough to be tokenised without a check of its length in characters."""
        return all(len(part) <= 4 * self.sequence_len for part in (text.prompt, *text.sequences))

    @cached_property
    def escaped_tokens(self) -> re.Pattern[str] | None:
        """Control tokens that rows hold as plain text; None where they are encoded as control tokens."""
        return None if self.encode_special_tokens else control_pattern(self.tokenizer)

    @cached_property
    def is_control_id(self) -> NDArray[np.bool_]:
        """Mask of the ids of control tokens. Shape: (vocabulary,)."""
        # Ids may have gaps, so the largest one can exceed the number of tokens.
        control = np.zeros(max([len(self.tokenizer), *self.tokenizer.get_vocab().values()]) + 1, dtype=bool)
        control[self.tokenizer.convert_tokens_to_ids(sorted(control_tokens(self.tokenizer)))] = True
        return control

    @cached_property
    def foreign_ends(self) -> frozenset[str]:
        """End-of-turn tokens of other models, which this tokenizer encodes as text."""
        return frozenset(ENDS - control_tokens(self.tokenizer))

    @cached_property
    def ends(self) -> tuple[str, ...]:
        """End-of-turn tokens of this tokenizer."""
        return end_tokens(self.tokenizer)

    def foreign_end(self, sequence: str) -> str | None:
        """Return the foreign end token that a text ends in, this tokenizer's own end tokens aside; None without one."""
        text = sequence.rstrip()
        while (end := next((end for end in self.ends if text.endswith(end)), None)) is not None:
            text = text.removesuffix(end).rstrip()
        return next((end for end in self.foreign_ends if text.endswith(end)), None)

    def is_too_long(self, texts: list[Rendered]) -> bool:
        """Return whether a row is certainly too long, by its characters: to tokenise megabytes of text takes a minute."""
        if self.excess_length_strategy == "raise":  # its message reports the number of tokens
            return False
        # First the cheap test, which most rows pass: `_max_characters` serialises the tokenizer once.
        if all(map(self._is_short, texts)):
            return False
        is_cut = self.excess_length_strategy == "truncate"
        lengths = [len(text.prompt) if is_cut else max(map(len, (text.prompt, *text.sequences))) for text in texts]
        would_be_equal = any(len(set(text.sequences)) < len(text.sequences) for text in texts)  # once `clip` has cut both
        # The shortest: of a split pair, one half may still fit, which only tokenising shows.
        return min(lengths) > self._max_characters or would_be_equal

    def clip(self, text: Rendered) -> Rendered:
        """Return the text without most of what truncation will cut off, so that less has to be tokenised."""
        if self.excess_length_strategy != "truncate" or self._is_short(text):
            return text
        # Twice the bound: the prompt may take all of it, and the completion as much again.
        return replace(text, sequences=tuple(sequence[: 2 * self._max_characters] for sequence in text.sequences))

    def transform(self, dataset: int) -> Transform:
        placeholder = self.placeholders[dataset] if self.placeholders else None
        context = Context(self.tokenizer, self.templates[dataset], self.datasets[dataset], self.day, placeholder)
        return build_transform(self.rl, context)

    def pictures(self, shard: Shard) -> ShardPictures | None:
        """Return what prepares the pictures of a shard's rows; None where rows have none."""
        if self.processor is None:
            return None
        location = None if shard.located.format == "hub" else shard.located.location
        return ShardPictures(self.processor, location, self.store)
