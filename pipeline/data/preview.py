"""Shows a prepared store: counts, lengths, and examples with the trained tokens marked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.data.kinds import COMPLETIONS
from pipeline.data.store import TRAIN, Prepared

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

__all__ = ["Preview", "preview", "print_counts", "render_preview"]

COUNTS = ("read", "rejected", "too_long", "truncated", "duplicates", "train", "eval")
STYLES = {"chosen": "green", "rejected": "red", "completion": "cyan"}
MARK = "▏"
"""Stands before every trained token, so that the marking reads without colour."""
MAX_TOKENS = 400
MAX_CHARACTERS = 400


@dataclass(frozen=True)
class Preview:
    """Prepared rows with their trained tokens marked, for a person to look at in a notebook."""

    prepared: Prepared
    tokenizer: PreTrainedTokenizerBase
    examples: int

    def _repr_html_(self) -> str:
        from pipeline.notebook import html_of

        return html_of(lambda console: render_preview(self.prepared, self.tokenizer, console, self.examples))


def preview(cfg: Any, examples: int = 3) -> Preview:
    """The first rows of the prepared data of `cfg`, which are prepared now where they aren't yet.

    Raises:
        UserError: as `pipeline.prepare`.
    """
    from pipeline.data.preparation import prepare
    from strategies.tokenizer import load_tokenizer

    return Preview(prepare(cfg), load_tokenizer(cfg), examples)


def render_preview(prepared: Prepared, tokenizer: PreTrainedTokenizerBase, console: Console, examples: int = 3) -> None:
    """Print what was prepared: a table of counts, one of lengths, and the first `examples` rows token by token."""
    print_counts(prepared, console)
    if COMPLETIONS[prepared.manifest["kind"]]:
        console.print(f"Trained tokens are coloured, each behind a {MARK}; the prompt is not trained on.", style="dim")
    for row in _first_rows(prepared, examples):
        _print_example(row, tokenizer, console)


def print_counts(prepared: Prepared, console: Console) -> None:
    """Print where prepared rows are, how many, and how long."""
    console.print(f"prepared {prepared.path}", soft_wrap=True)
    console.print(_counts(prepared))
    console.print(_lengths(prepared))
    for note in prepared.notes:
        console.print(f"note: {note}", soft_wrap=True, markup=False, highlight=False)


def _counts(prepared: Prepared) -> Any:
    from rich.table import Table

    table = Table(title="rows")
    table.add_column("source", overflow="fold")
    for name in COUNTS:
        table.add_column(name.replace("_", " "), justify="right")
    for source in prepared.manifest["sources"]:
        table.add_row(source["path"], *(f"{source[name]:,}" for name in COUNTS))
    return table


def _lengths(prepared: Prepared) -> Any:
    from rich.table import Table

    lengths = prepared.manifest["lengths"]
    table = Table(title="tokens per row")
    table.add_column("")
    for label in next(iter(lengths.values())):
        table.add_column(label, justify="right")
    for name, values in lengths.items():
        table.add_row(name, *(f"{value:,}" for value in values.values()))
    return table


def _first_rows(prepared: Prepared, number: int) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = []
    for file in prepared.train_files():
        rows += next(pq.ParquetFile(file).iter_batches(number)).to_pylist()
        if len(rows) >= number:
            break
    return rows[:number]


def _print_example(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    from rich.text import Text

    answers = [name for name in STYLES if f"{name}_ids" in row]
    console.rule(f"{TRAIN} row {row['row_id']} ({row['source']} row {row['row_number']})")
    console.print(Text.assemble(("prompt ", "bold"), f"{row['prompt_length']} tokens"))
    console.print(Text(tokenizer.decode(row["prompt_ids"][-MAX_TOKENS:]), style="dim"))
    for name in answers:
        label = f", label {str(row['label']).lower()}" if "label" in row else ""
        console.print(Text.assemble((f"{name} ", f"bold {STYLES[name]}"), f"{row[f'{name}_length']} tokens{label}"))
        console.print(_marked(row[f"{name}_ids"], tokenizer, STYLES[name]))
    for name, value in _others(row).items():
        console.print(Text.assemble((f"{name} ", "bold"), _short(value)))


def _others(row: dict[str, Any]) -> dict[str, Any]:
    """The columns that reward functions are given beside a prompt."""
    handed = json.loads(row["row"]) if "row" in row else {}
    return {name: value for name, value in handed.items() if name != "prompt"}


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} ..."


def _marked(ids: list[int], tokenizer: PreTrainedTokenizerBase, style: str) -> Text:
    """Every token behind a mark; a line end shows as a sign, since it is a token too."""
    from rich.text import Text

    text = Text()
    pending: list[int] = []
    for token in ids[:MAX_TOKENS]:
        pending.append(token)
        piece = tokenizer.decode(pending)
        if piece.endswith("\ufffd") and len(pending) < 4:  # the first bytes of a character that several tokens spell
            continue
        text.append(MARK * len(pending), style="dim")
        text.append(piece.replace("\n", "⏎\n"), style=style)
        pending = []
    if len(ids) > MAX_TOKENS:
        text.append(f" ... {len(ids) - MAX_TOKENS} more tokens", style="dim")
    return text
