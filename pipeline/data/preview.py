"""Display of a prepared store: row counts, token lengths, and example rows with the trained tokens marked."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.text import Text

from pipeline.data.keys import DataConfig
from pipeline.data.pictures import IMAGES, read_picture
from pipeline.data.preparation import prepare
from pipeline.data.row_kinds import COMPLETIONS
from pipeline.data.store import TRAIN, Prepared
from pipeline.ui.console import Printable
from strategies.models.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Preview", "preview"]

STYLES = {"chosen": "green", "rejected": "red", "completion": "cyan"}
MARK = "▏"
"""Precedes every trained token, so that the marking is readable without colour."""
WRAPPED: dict[str, Any] = {"no_wrap": False, "overflow": "fold"}
MAX_TOKENS = 400
MAX_CHARACTERS = 400
PROMPT_CHARACTERS = 4 * MAX_TOKENS


@dataclass(frozen=True)
class Preview(Printable):
    """A prepared store: row counts, token lengths, and its first rows with the trained tokens marked."""

    prepared: Prepared
    tokenizer: PreTrainedTokenizerBase
    examples: int = 3

    def __rich__(self) -> Group:
        parts: list[RenderableType] = [self.prepared]
        if COMPLETIONS[self.prepared.manifest["kind"]]:
            parts.append(Text(f"Trained tokens are coloured, each behind a {MARK}; the prompt is not trained on.", "dim"))
        for row in _first_rows(self.prepared, self.examples):
            parts += _example(row, self.prepared, self.tokenizer)
        return Group(*parts)


def preview(cfg: DataConfig, examples: int = 3) -> Preview:
    """Return the first prepared rows of `cfg`; prepares the data unless the store is cached.

    Raises:
        UserError: as `pipeline.prepare`.
    """
    return Preview(prepare(cfg), load_tokenizer(cfg), examples)


def _first_rows(prepared: Prepared, count: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for part in prepared.parts(TRAIN):
        rows += prepared.read_part(part).slice(0, count - len(rows)).to_pylist()
        if len(rows) >= count:
            break
    return rows


def _example(row: dict[str, Any], prepared: Prepared, tokenizer: PreTrainedTokenizerBase) -> list[RenderableType]:
    label = f", label {str(row['label']).lower()}" if "label" in row else ""
    parts: list[RenderableType] = [
        Rule(Text(f"{TRAIN} row {row['row_id']} ({row['source']} row {row['row_number']})", "rule.text")),
        Text.assemble(("prompt ", "bold"), f"{row['prompt_length']} tokens"),
        Text(_prompt(row, prepared, tokenizer), "dim", **WRAPPED),
    ]
    for name, style in STYLES.items():
        if f"{name}_ids" in row:
            parts.append(Text.assemble((f"{name} ", f"bold {style}"), f"{row[f'{name}_length']} tokens{label}"))
            parts.append(_marked_tokens(row[f"{name}_ids"], tokenizer, style))
    parts += [Text.assemble((f"{name} ", "bold"), _short(value), **WRAPPED) for name, value in _reward_columns(row).items()]
    return parts


def _prompt(row: dict[str, Any], prepared: Prepared, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the end of a prompt, which is what the answer follows; pictures as their names and sizes."""
    if not row.get(IMAGES):
        return tokenizer.decode(row["prompt_ids"][-MAX_TOKENS:])
    # Of the text, where one token stands for a picture: its ids have hundreds.
    first, *others = row["prompt"].split(prepared.manifest["inputs"]["processor"]["token"])
    pictures = [_picture(prepared, name) for name in row[IMAGES]]
    # Not so where the row's own text holds what is written for a picture (encode_special_tokens: false).
    if len(others) == len(pictures):
        shown = "".join([first, *(f"{picture}{text}" for picture, text in zip(pictures, others, strict=True))])
    else:
        shown = f"{' '.join(pictures)} {row['prompt']}"
    return shown[-PROMPT_CHARACTERS:]


def _picture(prepared: Prepared, name: str) -> str:
    from PIL import Image

    data = read_picture(prepared.folder, name)
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
    return f"[{name} {width}x{height}, {len(data) / 1024:,.0f} KiB]"


def _reward_columns(row: dict[str, Any]) -> dict[str, Any]:
    """Return the columns that reward functions receive beside the prompt."""
    columns = json.loads(row["row"]) if "row" in row else {}
    return {name: value for name, value in columns.items() if name != "prompt"}


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} ..."


def _marked_tokens(ids: list[int], tokenizer: PreTrainedTokenizerBase, style: str) -> Text:
    """Decode token by token with `MARK` before each; a line break is shown as a symbol, since it is a token too."""
    text = Text(**WRAPPED)
    pending: list[int] = []
    for token in ids[:MAX_TOKENS]:
        pending.append(token)
        piece = tokenizer.decode(pending)
        if piece.endswith("\ufffd") and len(pending) < 4:  # the first bytes of a character that several tokens spell
            continue
        # As many marks as tokens, also where several of them spell one character.
        text.append(MARK * len(pending), style="dim")
        text.append(piece.replace("\n", "⏎\n"), style=style)
        pending = []
    if len(ids) > MAX_TOKENS:
        text.append(f" ... {len(ids) - MAX_TOKENS} more tokens", style="dim")
    return text
